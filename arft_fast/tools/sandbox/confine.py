"""What a forked child gives up before it sees a line of the model's code. Linux; standard library only.

Each step raises ``OSError`` when it cannot be taken. Namespaces are entered before (``namespaces.py``).
"""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Sequence
from dataclasses import dataclass

from arft_fast.tools.sandbox import landlock, seccomp
from arft_fast.tools.sandbox.libc import check, libc
from arft_fast.tools.sandbox.namespaces import die_with_parent, prctl

_PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 38, 47, 4
_CAPABILITY_VERSION_3 = 0x20080522

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Hard rlimits of each process of a call."""

    cpu_s: int
    memory_bytes: int
    """Address space, interpreter and preloaded libraries included."""
    file_bytes: int = 64 << 20
    open_files: int = 64
    processes: int = 32
    """Threads too. Per user, since Linux 5.14 per user in the namespace; root is not bound."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that a child applies to itself."""

    limits: Limits
    landlock_abi: int
    """0: without Landlock."""
    readable: Sequence[str]
    """Files and folders that the code may read (Landlock)."""
    seccomp: bool
    threads: bool
    """Whether the seccomp filter lets the code start threads; not where nothing bounds their number."""


def confine(plan: Plan, directory: str) -> None:
    """After ``setsid``: empty environment, ``directory`` as home, limits, no privileges, Landlock, seccomp."""
    die_with_parent()
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(PATH="/usr/bin:/bin", LANG="C.UTF-8", HOME=directory, TMPDIR=directory, **ONE_THREAD)
    _limit(plan.limits)
    prctl(_PR_SET_NO_NEW_PRIVS, 1)
    prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    check(libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")
    if plan.landlock_abi:
        landlock.restrict(plan.landlock_abi, read=plan.readable, write=[directory, os.devnull])
    if plan.seccomp:
        seccomp.install(seccomp.assemble(os.uname().machine, pid=os.getpid(), threads=plan.threads))


def _limit(limits: Limits) -> None:
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
