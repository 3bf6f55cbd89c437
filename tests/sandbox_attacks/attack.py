"""One attack: code for the sandbox, and how its success would show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from arft_fast.tools.sandbox import SandboxResult, seccomp

if TYPE_CHECKING:
    from tests.sandbox_attacks.world import World

WON = "ATTACK-" + "SUCCEEDED"
TIMEOUT_S = 4.0
HURRY_S = 0.4
LATE_S = 0.5

PRELUDE = """
import ctypes, os
NUMBERS = {numbers!r}
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
def call(name, *arguments):  # long, so that pointers and 64-bit flags survive
    libc.syscall.restype = ctypes.c_long
    return libc.syscall(ctypes.c_long(NUMBERS[name]), *[a if isinstance(a, bytes) or a is None or
        not isinstance(a, int) else ctypes.c_long(a) for a in arguments])
def won(condition=True):
    if condition:
        print({won!r}, flush=True)
"""

Harm = Callable[[SandboxResult, "World"], bool]


def it_says_so(result: SandboxResult, world: World) -> bool:
    return WON in result.stdout


def it_is_late(result: SandboxResult, world: World) -> bool:
    return result.seconds > HURRY_S + LATE_S or not result.timed_out


@dataclass(frozen=True, kw_only=True)
class Attack:
    """``code`` prints ``WON`` through ``won(condition)`` where it sees its own success; ``harm`` decides."""

    name: str
    code: str
    harm: Harm = it_says_so
    collect: tuple[str, ...] = ()
    hurried: bool = False
    """In a sandbox with the deadline ``HURRY_S``."""
    unconfined: bool = False
    """Succeeds without a sandbox, on any Linux and for any user; safe to show."""

    def source(self, world: World) -> str:
        """What the sandbox runs; names in capitals stand for the world's things."""
        machine = world.machine
        numbers = {**seccomp.denied(machine), **seccomp.limited(machine)}
        aims = "\n".join(f"{name} = {value!r}" for name, value in world.aims.items())
        return f"{PRELUDE.format(numbers=numbers, won=WON)}\n{aims}\n{self.code.strip()}\n"


def attack(name: str, code: str, **more: object) -> Attack:
    return Attack(name=name, code=code, **more)  # type: ignore[arg-type]
