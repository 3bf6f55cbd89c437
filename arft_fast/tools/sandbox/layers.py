"""Names of the layers of confinement, and which of them the strict mode insists on. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Literal, get_args

Mode = Literal["strict", "best_effort", "off"]
"""strict: all of ``STRICT`` or no start. best_effort: what the kernel gives. off: ``BASE`` only, by request."""

MODES: tuple[Mode, ...] = get_args(Mode)

BASE = ("deadline", "process-group", "rlimits", "environment", "no-new-privs", "no-capabilities")
"""Active in every mode: a child that cannot take one of these steps does not run the code."""

NOT_CONFINED = "NOT-CONFINED"
"""Stands first among the layers of mode off: the code can do what its user can do."""

_NAMESPACES = (
    "allow new namespaces: user.max_user_namespaces > 0, kernel.unprivileged_userns_clone = 1 (older Debian), "
    "kernel.apparmor_restrict_unprivileged_userns = 0 (Ubuntu); for a container CAP_SYS_ADMIN, or a seccomp and an "
    "AppArmor profile that allow unshare and mount"
)
STRICT: Mapping[str, str] = MappingProxyType(
    {
        "seccomp": "use a kernel with CONFIG_SECCOMP_FILTER, on x86_64 or aarch64",
        "landlock-files": "use Linux 5.13 or newer and put landlock into the boot option lsm=; a container's seccomp "
        "profile must allow the calls landlock_*",
        "process-count": "comes with seccomp",
        "pid-namespace": _NAMESPACES,
        "network-namespace": _NAMESPACES,
        "ipc-namespace": _NAMESPACES,
        "mount-namespace": _NAMESPACES,
        "read-only-files": "use Linux 5.12 or newer; a container's seccomp profile must allow mount_setattr",
    }
)
"""What mode strict needs beside ``BASE``: layer -> what to do where it is missing.

Not in it: ``user-namespace``, which root does not need to get the others; ``no-nested-namespace``, ``landlock-tcp`` and
``landlock-signals``, whose work the seccomp filter and the namespaces do as well.
"""


def missing(active: Iterable[str]) -> tuple[str, ...]:
    """The layers of ``STRICT`` that are not ``active``."""
    return tuple(layer for layer in STRICT if layer not in set(active))


def refusal(absent: Iterable[str]) -> str:
    """Why the strict mode does not start, and the remedies, one of a kind."""
    by_remedy: dict[str, list[str]] = {}
    for layer in absent:
        by_remedy.setdefault(STRICT[layer], []).append(layer)
    reasons = "; ".join(f"no {', '.join(names)}: {remedy}" for remedy, names in by_remedy.items())
    return (
        f"the sandbox cannot confine code as its mode strict demands: {reasons}. "
        'Or accept what there is with mode "best_effort"'
    )
