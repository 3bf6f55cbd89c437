"""What a process does to itself so that untrusted code may run in it. Linux; standard library only.

Two moments: the zygote enters namespaces once (``enter_namespaces``), and every forked child gives up the rest
(``confine``) before it sees a line of the model's code. Each step raises ``OSError`` when it cannot be taken.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import resource
import secrets
import signal
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

_NEWNS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
_NAMES = {
    _NEWUSER: "user-namespace",
    _NEWPID: "pid-namespace",
    _NEWNET: "network-namespace",
    _NEWIPC: "ipc-namespace",
    _NEWNS: "mount-namespace",
}
_BASE = _NEWPID | _NEWNET | _NEWIPC
NAMESPACE_SETS = (_BASE | _NEWUSER | _NEWNS, _BASE | _NEWUSER, _BASE | _NEWNS, _BASE)
"""What to try, strictest first: a container may refuse mounts, a kernel user namespaces (root needs none)."""

REQUIRED_LAYERS = ("deadline", "process-group", "rlimits", "environment", "no-new-privs", "no-capabilities")
"""Always active: a child that cannot take one of these steps does not run the code."""

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_SET_CHILD_SUBREAPER, _PR_CAP_AMBIENT = 1, 38, 36, 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_CAPABILITY_VERSION_3 = 0x20080522
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REC, _MS_PRIVATE = 1, 2, 4, 8, 1 << 14, 1 << 18

_INSIDE_ID = 1000
"""User and group id that the code sees; never 0, so nothing in the namespace takes it for root."""
_MAX_PIDS = 300 + 64
"""pid_max of the namespace: bounds a fork bomb even for root, whom RLIMIT_NPROC does not bind. Linux keeps the first
300 numbers back once they were used, so 64 processes are left in the long run."""
_DISK_BYTES = 128 << 20

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Hard rlimits of each process of a call."""

    cpu_s: int
    memory_bytes: int
    """Address space, interpreter and preloaded libraries (about 100 MiB) included."""
    file_bytes: int = 64 << 20
    open_files: int = 64
    processes: int = 32


def namespaces_allowed(flags: int, root: str) -> bool:
    """Try ``enter_namespaces`` in a child that is thrown away."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            enter_namespaces(flags, root)
            with next_child_is_init():
                code = 0
        except OSError:
            pass  # refused: the exit code says so
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def enter_namespaces(flags: int, root: str) -> tuple[str, ...]:
    """Move to new namespaces; returns, in their first process, the names of the layers won.

    The calling process itself stays outside, waits for that first process and exits with it. When it is killed the
    first process is killed too, and with it everything in the namespace. ``root``, an empty directory, becomes a
    memory file system of bounded size that nobody outside sees (with a mount namespace).
    """
    user, group = os.getuid(), os.getgid()
    _check(_libc.unshare(flags), "unshare")
    if flags & _NEWUSER:
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{_INSIDE_ID} {user} 1")
        _write("/proc/self/gid_map", f"{_INSIDE_ID} {group} 1")
    die_with_parent()
    pid = os.fork()
    if pid:
        os.closerange(0, os.sysconf("SC_OPEN_MAX"))  # the pipes must close when the first process is gone
        os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 0xFF)
    die_with_parent()
    names = [name for flag, name in _NAMES.items() if flags & flag]
    if flags & _NEWNS:
        _mount("none", "/", "", _MS_REC | _MS_PRIVATE, "")
        _mount_memory(root, _MS_NOEXEC, f"size={_DISK_BYTES},nr_inodes=4096,mode=700")
        for path in ("/run", "/dev/shm"):  # sockets of daemons (Docker, D-Bus); the trainer's shared tensors
            if os.path.isdir(path) and not sys.prefix.startswith(path):
                _mount_memory(path, _MS_NOEXEC | _MS_RDONLY, "size=4k")
    if flags & _NEWUSER:
        # Both are counted per namespace; outside one these writes would change the whole machine, hence the guards.
        with suppress(OSError):  # /proc/sys is read-only in many containers
            _write("/proc/sys/user/max_user_namespaces", "0")
            names.append("no-nested-namespace")
        if _kernel() >= (6, 14):
            with suppress(OSError):
                _write("/proc/sys/kernel/pid_max", str(_MAX_PIDS))
                names.append("process-count")
    return tuple(names)


@contextmanager
def next_child_is_init() -> Iterator[None]:
    """Fork inside, once: the child is process 1 of its own PID namespace (all in it die with it) with its own IPC."""
    home = os.open("/proc/self/ns/pid_for_children", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.unshare(_NEWPID | _NEWIPC), "unshare")
        yield
        _check(_libc.setns(home, _NEWPID), "setns")
    finally:
        os.close(home)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends (where there is no PID namespace to end them)."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent() -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def confine(limits: Limits, directory: str) -> None:
    """In the forked child, after ``setsid``: empty environment, ``directory`` as home, limits, no privileges.

    Landlock comes after this (it needs no-new-privs).
    """
    die_with_parent()
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(PATH="/usr/bin:/bin", LANG="C.UTF-8", HOME=directory, TMPDIR=directory, **ONE_THREAD)
    for what, value in (
        (resource.RLIMIT_CPU, limits.cpu_s),
        (resource.RLIMIT_AS, limits.memory_bytes),
        (resource.RLIMIT_FSIZE, limits.file_bytes),
        (resource.RLIMIT_NOFILE, limits.open_files),
        (resource.RLIMIT_NPROC, limits.processes),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (bound, bound))
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    _check(_libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")


ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def clear_directory(top: str) -> None:
    """Empty ``top``, whatever was left in it: no link is followed, no depth is too deep, no mode protects.

    A nested directory's entries move up to ``top`` until nothing is nested, so a path never grows. No process may
    still write there. ``top`` itself stays.
    """
    while entries := list(os.scandir(top)):
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
                continue
            os.chmod(entry.path, stat.S_IRWXU)
            for inner in list(os.scandir(entry.path)):
                if inner.is_dir(follow_symlinks=False):
                    os.chmod(inner.path, stat.S_IRWXU)  # moving a directory rewrites its ".."
                    os.rename(inner.path, os.path.join(top, secrets.token_hex(16)))
                else:
                    os.unlink(inner.path)
            os.rmdir(entry.path)


def _kernel() -> tuple[int, int]:
    major, minor, *_ = os.uname().release.split(".")
    return int(major), int("".join(itertools.takewhile(str.isdigit, minor)))


def _mount_memory(path: str, flags: int, options: str) -> None:
    _mount("tmpfs", path, "tmpfs", _MS_NOSUID | _MS_NODEV | flags, options)


def _mount(source: str, target: str, kind: str, flags: int, options: str) -> None:
    _check(
        _libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode()),
        f"mount {target}",
    )


def _prctl(option: int, value: int) -> None:
    _check(_libc.prctl(option, ctypes.c_ulong(value), *[ctypes.c_ulong(0)] * 3), f"prctl {option}")


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _check(result: int, what: str) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
