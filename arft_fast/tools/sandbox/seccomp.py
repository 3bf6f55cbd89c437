"""A seccomp filter: which system calls the calling process may still make. Standard library only.

Classic BPF, assembled here and installed by one ``prctl``; unprivileged, inherited, irrevocable. See ``man 2 seccomp``.

Policy: what numerical and image code never needs is refused with EPERM, every call that is newer than this list does
not exist (ENOSYS), calls of another architecture kill the process, the rest is allowed. Default deny would be smaller
but breaks with every libc that finds a new call useful; the calls with a history of holes are all named below. Refused:

- programs and processes: ``execve``, ``fork``. The code is one process; its threads are allowed where they are bounded.
- sockets of every family, so also DNS and Unix sockets; System V and POSIX queues, semaphores and shared memory.
- other processes: tracing and reading them, signals to any but itself, their priorities, limits and file descriptors.
- namespaces, mounts, ``chroot``, device nodes and FIFOs, file handles, watching files, quotas, swap, ``sync``.
- identities, capabilities, keys, modules, ``reboot``, clocks, the kernel's log, host names, terminals' input.
- ``bpf``, ``perf_event_open``, ``userfaultfd``, ``io_uring``, Linux AIO, ``splice``; ``memfd_create`` (memory that no
  rlimit counts, files that could be executed).
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterable

from arft_fast.tools.sandbox.libc import check, libc

_X86_64, _AARCH64 = "x86_64", "aarch64"
_AUDIT_ARCH = {_X86_64: 0xC000003E, _AARCH64: 0xC00000B7}
_FIRST_UNKNOWN = 463
"""One more than the newest call (``mseal``) that was considered; x32 numbers lie above it too."""

_DENIED = """
execve 59 221 | execveat 322 281 | fork 57 - | vfork 58 -
socket 41 198 | socketpair 53 199 | connect 42 203 | bind 49 200 | listen 50 201 | accept 43 202 | accept4 288 242
shmget 29 194 | shmat 30 196 | shmctl 31 195 | msgget 68 186 | msgsnd 69 189 | msgrcv 70 188 | msgctl 71 187
semget 64 190 | semop 65 193 | semctl 66 191 | semtimedop 220 192 | mq_open 240 180 | mq_unlink 241 181
mq_timedsend 242 182 | mq_timedreceive 243 183 | mq_notify 244 184 | mq_getsetattr 245 185
ptrace 101 117 | process_vm_readv 310 270 | process_vm_writev 311 271 | process_madvise 440 440
process_mrelease 448 448 | kcmp 312 272 | pidfd_open 434 434 | pidfd_getfd 438 438 | pidfd_send_signal 424 424
tkill 200 130 | rt_sigqueueinfo 129 138 | rt_tgsigqueueinfo 297 240
sched_setparam 142 118 | sched_setscheduler 144 119 | sched_setattr 314 274 | sched_setaffinity 203 122
setpriority 141 140 | ioprio_set 251 30 | migrate_pages 256 238 | move_pages 279 239
unshare 272 97 | setns 308 268 | mount 165 40 | umount2 166 39 | pivot_root 155 41 | chroot 161 51
open_tree 428 428 | move_mount 429 429 | fsopen 430 430 | fsconfig 431 431 | fsmount 432 432 | fspick 433 433
mount_setattr 442 442 | statmount 457 457 | listmount 458 458 | mknod 133 - | mknodat 259 33
name_to_handle_at 303 264 | open_by_handle_at 304 265 | fanotify_init 300 262 | fanotify_mark 301 263
inotify_init 253 - | inotify_init1 294 26 | inotify_add_watch 254 27
quotactl 179 60 | quotactl_fd 443 443 | acct 163 89 | swapon 167 224 | swapoff 168 225 | sync 162 81 | syncfs 306 267
setuid 105 146 | setgid 106 144 | setreuid 113 145 | setregid 114 143 | setresuid 117 147 | setresgid 119 149
setfsuid 122 151 | setfsgid 123 152 | setgroups 116 159 | capset 126 91
keyctl 250 219 | add_key 248 217 | request_key 249 218
lsm_get_self_attr 459 459 | lsm_set_self_attr 460 460 | lsm_list_modules 461 461
kexec_load 246 104 | kexec_file_load 320 294 | reboot 169 142
init_module 175 105 | finit_module 313 273 | delete_module 176 106 | create_module 174 -
settimeofday 164 170 | clock_settime 227 112 | adjtimex 159 171 | clock_adjtime 305 266
sethostname 170 161 | setdomainname 171 162 | syslog 103 116 | vhangup 153 58 | personality 135 92
iopl 172 - | ioperm 173 - | modify_ldt 154 - | uselib 134 - | _sysctl 156 - | nfsservctl 180 42 | lookup_dcookie 212 18
bpf 321 280 | perf_event_open 298 241 | userfaultfd 323 282 | memfd_create 319 279 | memfd_secret 447 447
io_uring_setup 425 425 | io_uring_enter 426 426 | io_uring_register 427 427 | io_setup 206 0 | io_submit 209 2
splice 275 76 | vmsplice 278 75 | tee 276 77
"""
_LIMITED = """
clone 56 220 | clone3 435 435 | kill 62 129 | tgkill 234 131 | ioctl 16 29 | fcntl 72 25 | prctl 157 167
prlimit64 302 261
"""

_CLONE_THREAD, _CLONE_NEW = 0x00010000, 0x7E020000
_IOCTLS = (0x5412, 0x541C, 0x8901, 0x8902)  # TIOCSTI, TIOCLINUX, FIOSETOWN, SIOCSPGRP
_FCNTLS = (
    8,
    10,
    15,
    1024,
    1026,
)  # F_SETOWN, F_SETSIG, F_SETOWN_EX, F_SETLEASE, F_NOTIFY: signals to others, held files
_PRCTLS = (1, 35, 36, 0x59616D61)  # SET_PDEATHSIG, SET_MM, SET_CHILD_SUBREAPER, SET_PTRACER

_LOAD, _IF_EQUAL, _IF_AT_LEAST, _IF_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL_PROCESS, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_REFUSE = (_RETURN, 0, 0, _ERRNO | errno.EPERM)
_PASS = (_RETURN, 0, 0, _ALLOW)
_ABSENT = (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)
_PR_SET_SECCOMP, _MODE_FILTER = 22, 2

Instruction = tuple[int, int, int, int]
"""Code, jump if true, jump if false, operand."""


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def numbers(text: str, machine: str) -> dict[str, int]:
    """Name -> number on ``machine`` of the calls in a table of ``name x86_64 aarch64``; ``-``: not there."""
    column = 1 + (_X86_64, _AARCH64).index(machine)
    entries = (entry.split() for entry in text.replace("\n", "|").split("|") if entry.strip())
    return {fields[0]: int(fields[column]) for fields in entries if fields[column] != "-"}


def denied(machine: str) -> dict[str, int]:
    """The calls that are refused whatever their arguments: name -> number."""
    return numbers(_DENIED, machine)


def limited(machine: str) -> dict[str, int]:
    """The calls that depend on their arguments: name -> number."""
    return numbers(_LIMITED, machine)


def supported() -> bool:
    """Whether this kernel takes filters and this architecture has a table."""
    if os.uname().machine not in _AUDIT_ARCH:
        return False
    libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(_MODE_FILTER), None)
    return ctypes.get_errno() == errno.EFAULT  # the kernel looked for the program


def assemble(machine: str, *, pid: int, threads: bool) -> list[Instruction]:
    """The filter for process ``pid``, the only one that it may signal. ``threads``: whether it may start any."""
    special = limited(machine)
    program: list[Instruction] = [
        (_LOAD, 0, 0, 4),  # the architecture
        (_IF_EQUAL, 1, 0, _AUDIT_ARCH[machine]),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, 0),  # the number of the call
        (_IF_AT_LEAST, 0, 1, _FIRST_UNKNOWN),
        _ABSENT,
        (_IF_EQUAL, 0, 1, special["clone3"]),  # flags in memory cannot be seen; libc falls back to clone
        _ABSENT,
    ]
    for number in denied(machine).values():
        program += [(_IF_EQUAL, 0, 1, number), _REFUSE]
    clone = [(_IF_ANY_BIT, 0, 2, _CLONE_THREAD), (_IF_ANY_BIT, 1, 0, _CLONE_NEW), _PASS, _REFUSE]
    program += _by_argument(special["clone"], 0, clone if threads else [_REFUSE])
    for name in ("kill", "tgkill"):
        program += _by_argument(special[name], 0, _only(pid))
    program += _by_argument(special["prlimit64"], 0, _only(0))
    for name, index, values in (("ioctl", 1, _IOCTLS), ("fcntl", 1, _FCNTLS), ("prctl", 0, _PRCTLS)):
        program += _by_argument(special[name], index, _none_of(values))
    return [*program, _PASS]


def install(program: Iterable[Instruction]) -> None:
    """Filter the calling process (of one thread) for good. ``PR_SET_NO_NEW_PRIVS`` must be set.

    Raises:
        OSError: the kernel refused the program; nothing is filtered then.
    """
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    attribute = _Program(len(code) // 8, code)
    check(libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(_MODE_FILTER), ctypes.byref(attribute)), "seccomp")


def _by_argument(number: int, index: int, body: list[Instruction]) -> list[Instruction]:
    """``body`` decides about call ``number`` by the low half of an argument (all of these are 32 bits wide)."""
    return [(_IF_EQUAL, 0, len(body) + 1, number), (_LOAD, 0, 0, 16 + 8 * index), *body]


def _only(value: int) -> list[Instruction]:
    return [(_IF_EQUAL, 0, 1, value), _PASS, _REFUSE]


def _none_of(values: Iterable[int]) -> list[Instruction]:
    refusals = [line for value in values for line in ((_IF_EQUAL, 0, 1, value), _REFUSE)]
    return [*refusals, _PASS]
