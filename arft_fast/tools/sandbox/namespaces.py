"""Namespaces for the zygote and, one more, for each call. Linux; standard library only. See ``man 7 namespaces``."""

from __future__ import annotations

import ctypes
import itertools
import os
import signal
import sys
from contextlib import suppress

from arft_fast.tools.sandbox.libc import check, libc

_NEWNS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
_NAMES = {
    _NEWUSER: "user-namespace",
    _NEWPID: "pid-namespace",
    _NEWNET: "network-namespace",
    _NEWIPC: "ipc-namespace",
    _NEWNS: "mount-namespace",
}
_BASE = _NEWPID | _NEWNET | _NEWIPC
SETS = (_BASE | _NEWUSER | _NEWNS, _BASE | _NEWUSER, _BASE | _NEWNS, _BASE)
"""What to try, strictest first: a container may refuse mounts, a kernel user namespaces (root needs none)."""

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REC, _MS_PRIVATE = 1, 2, 4, 8, 1 << 14, 1 << 18
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _ATTR_RDONLY = 442, -100, 0x8000, 1

_INSIDE_ID = 1000
"""User and group id that the code sees; never 0, so nothing in the namespace takes it for root."""
_MAX_PIDS = 300 + 64
"""pid_max of the namespace: bounds threads even for root, whom RLIMIT_NPROC does not bind. Linux keeps the first 300
numbers back once they were used, so 64 are left in the long run."""
_DISK_BYTES = 128 << 20


def allowed(flags: int, root: str) -> bool:
    """Try ``enter`` and ``enter_for_call`` in a child that is thrown away."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            enter(flags, root)
            enter_for_call()
            code = 0
        except OSError:
            pass  # refused: the exit code says so
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def enter(flags: int, root: str) -> tuple[str, ...]:
    """Move to new namespaces; returns, in their first process, the names of the layers won.

    The calling process itself stays outside, waits for that first process and exits with it. When it is killed the
    first process is killed too, and with it everything in the namespace. ``root``, an empty directory, becomes a
    memory file system of bounded size that nobody outside sees; all other files become read-only, their modes, owners
    and times included (with a mount namespace).

    Raises:
        OSError: the kernel refuses one of ``flags``.
    """
    user, group = os.getuid(), os.getgid()
    check(libc.unshare(flags), "unshare")
    if flags & _NEWUSER:
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{_INSIDE_ID} {user} 1")
        _write("/proc/self/gid_map", f"{_INSIDE_ID} {group} 1")
    pid = os.fork()
    if pid:  # holds the pipes open until it exits: their end means that every process is gone
        os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 0xFF)
    die_with_parent()
    names = [name for flag, name in _NAMES.items() if flags & flag]
    if flags & _NEWUSER:
        # Both are counted per namespace; outside one these writes would change the whole machine, hence the guards.
        with suppress(OSError):  # /proc/sys is read-only in many containers
            _write("/proc/sys/user/max_user_namespaces", "0")
            names.append("no-nested-namespace")
        if _kernel() >= (6, 14):
            with suppress(OSError):
                _write("/proc/sys/kernel/pid_max", str(_MAX_PIDS))
                names.append("process-count")
    if flags & _NEWNS:
        _mount("none", "/", "", _MS_REC | _MS_PRIVATE, "")
        with suppress(OSError):  # an older kernel
            _make_all_read_only()
            names.append("read-only-files")
        _mount_memory(root, _MS_NOEXEC, f"size={_DISK_BYTES},nr_inodes=4096,mode=700")
        for path in ("/run", "/dev/shm"):  # sockets of daemons (Docker, D-Bus); the trainer's shared tensors
            if os.path.isdir(path) and not sys.prefix.startswith(path):
                _mount_memory(path, _MS_NOEXEC | _MS_RDONLY, "size=4k")
    return tuple(names)


def enter_for_call() -> None:
    """The caller's next child is process 1 of a PID namespace of its own: all processes in it die with it."""
    check(libc.unshare(_NEWPID | _NEWIPC), "unshare")


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends (where there is no PID namespace to end them)."""
    prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent() -> None:
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def prctl(option: int, value: int) -> None:
    check(libc.prctl(option, ctypes.c_ulong(value), *[ctypes.c_ulong(0)] * 3), f"prctl {option}")


def _kernel() -> tuple[int, int]:
    major, minor, *_ = os.uname().release.split(".")
    return int(major), int("".join(itertools.takewhile(str.isdigit, minor)))


def _make_all_read_only() -> None:
    attributes = (ctypes.c_uint64 * 4)(_ATTR_RDONLY, 0, 0, 0)  # set, clear, propagation, user namespace
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    check(libc.syscall(_MOUNT_SETATTR, _AT_FDCWD, b"/", _AT_RECURSIVE, attributes, size), "mount_setattr")


def _mount_memory(path: str, flags: int, options: str) -> None:
    _mount("tmpfs", path, "tmpfs", _MS_NOSUID | _MS_NODEV | flags, options)


def _mount(source: str, target: str, kind: str, flags: int, options: str) -> None:
    encoded = (source.encode(), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), options.encode())
    check(libc.mount(*encoded), f"mount {target}")


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
