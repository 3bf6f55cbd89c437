"""Landlock by raw system calls: which files, TCP ports and processes the calling process may still reach.

Unprivileged, inherited by every child, and irrevocable. Linux >= 5.13; the ABI number that the kernel reports says what
it can restrict: 1 files, 4 TCP, 6 signals and abstract sockets. See ``man 7 landlock``. Standard library only.
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Sequence

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same numbers on every architecture
_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = (1 << bit for bit in range(4))
_MAKE_CHAR, _MAKE_SOCK, _MAKE_BLOCK = 1 << 6, 1 << 9, 1 << 11
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
_ALL_FILE_RIGHTS_ABI_1 = (1 << 13) - 1
_TCP_BIND_AND_CONNECT = 0b11
_ABSTRACT_SOCKETS_AND_SIGNALS = 0b11

_libc = ctypes.CDLL(None, use_errno=True)


class _RulesetAttr(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _PathBeneathAttr(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


def abi() -> int:
    """The kernel's Landlock ABI, 0 where there is none (old kernel, switched off, refused by a container)."""
    version: int = _libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _CREATE_RULESET_VERSION)
    return max(0, version)


def layers(version: int) -> tuple[str, ...]:
    """Names of what ``restrict`` confines under ABI ``version``."""
    floors = ((1, "landlock-files"), (4, "landlock-tcp"), (6, "landlock-signals"))
    return tuple(name for floor, name in floors if version >= floor)


def restrict(version: int, *, read: Sequence[str], write: Sequence[str]) -> None:
    """Confine the calling thread and its future children, for good.

    Afterwards: reading below ``read`` and ``write``, writing below ``write``, executing nothing, no TCP (ABI 4), no
    signal to and no abstract socket of a process outside (ABI 6). Descriptors that are already open keep working.
    ``PR_SET_NO_NEW_PRIVS`` must be set. ``version`` is what ``abi`` returned, >= 1.

    Raises:
        OSError: a path does not exist or the kernel refused a rule; nothing is confined then.
    """
    handled = _ALL_FILE_RIGHTS_ABI_1
    for floor, right in ((2, _REFER), (3, _TRUNCATE), (5, _IOCTL_DEV)):
        handled |= right if version >= floor else 0
    attr = _RulesetAttr(handled, _TCP_BIND_AND_CONNECT, _ABSTRACT_SOCKETS_AND_SIGNALS)
    size = 8 if version < 4 else 16 if version < 6 else 24  # an older kernel refuses fields that it does not know
    ruleset = _call(_CREATE_RULESET, ctypes.byref(attr), ctypes.c_size_t(size), 0)
    try:
        for path in read:
            _allow(ruleset, path, _READ_FILE | _READ_DIR)
        for path in write:
            _allow(ruleset, path, handled & ~(_EXECUTE | _MAKE_CHAR | _MAKE_BLOCK | _MAKE_SOCK | _IOCTL_DEV))
        _call(_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            rights &= _READ_FILE | _WRITE_FILE | _TRUNCATE  # the kernel refuses directory rights on a file
        _call(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, ctypes.byref(_PathBeneathAttr(rights, fd)), 0)
    finally:
        os.close(fd)


def _call(number: int, *arguments: object) -> int:
    result: int = _libc.syscall(number, *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"landlock system call {number}: {os.strerror(code)}")
    return result
