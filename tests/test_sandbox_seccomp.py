"""The filter as the kernel would run it, for both architectures, by an interpreter of its few instructions."""

from __future__ import annotations

import errno
import re
import struct
from pathlib import Path

import pytest

from arft_fast.tools.sandbox import seccomp

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
PID = 41
ALLOW, KILL, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}

both = pytest.mark.parametrize("machine", ARCHITECTURES)


def verdict(machine: str, number: int, *arguments: int, threads: bool = True, architecture: int | None = None) -> int:
    """What the filter returns for a call."""
    audit = ARCHITECTURES[machine] if architecture is None else architecture
    data = struct.pack("<IIQ6Q", number, audit, 0, *arguments, *[0] * (6 - len(arguments)))
    program = seccomp.assemble(machine, pid=PID, threads=threads)
    accumulator, at = 0, 0
    while True:
        code, if_true, if_false, operand = program[at]
        at += 1
        if code == 0x06:
            return operand
        if code == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, operand)
        else:
            holds = {0x15: accumulator == operand, 0x35: accumulator >= operand, 0x45: accumulator & operand != 0}[code]
            at += if_true if holds else if_false


@both
def test_what_is_denied_is_refused_and_what_python_needs_is_allowed(machine: str) -> None:
    denied, limited = seccomp.denied(machine), seccomp.limited(machine)
    assert {verdict(machine, number) for number in denied.values()} == {EPERM}
    others = set(range(463)) - set(denied.values()) - set(limited.values())
    assert {verdict(machine, number) for number in others} == {ALLOW}


@both
def test_calls_newer_than_the_table_do_not_exist(machine: str) -> None:
    assert {verdict(machine, number) for number in (463, 500, 0x40000000, 0x40000027, 0xFFFFFFFF)} == {ENOSYS}


@both
def test_another_architecture_kills(machine: str) -> None:
    assert {verdict(machine, 0, architecture=other) for other in (0x40000003, 0x40000028, 0)} == {KILL}


@both
def test_threads_start_and_processes_do_not(machine: str) -> None:
    clone, thread = seccomp.limited(machine)["clone"], 0x003D0F00
    assert verdict(machine, clone, thread) == ALLOW
    assert verdict(machine, clone, thread, threads=False) == EPERM
    assert {verdict(machine, clone, flags) for flags in (17, 0x4111, thread | 0x20000000, 0x10000011)} == {EPERM}
    assert verdict(machine, seccomp.limited(machine)["clone3"]) == ENOSYS


@both
@pytest.mark.parametrize(
    ("name", "allowed", "refused"),
    [
        ("kill", (PID,), (PID + 1, 0, 2**64 - 1)),
        ("tgkill", (PID,), (1,)),
        ("prlimit64", (0,), (1, PID)),
    ],
)
def test_only_the_process_itself_is_within_reach(
    machine: str, name: str, allowed: tuple[int, ...], refused: tuple[int, ...]
) -> None:
    number = seccomp.limited(machine)[name]
    assert {verdict(machine, number, pid) for pid in allowed} == {ALLOW}
    assert {verdict(machine, number, pid) for pid in refused} == {EPERM}


@both
@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("ioctl", (0, 0x5401), ALLOW),
        ("ioctl", (0, 0x5412), EPERM),
        ("ioctl", (0, 0x5412 | 7 << 32), EPERM),  # the kernel looks at the low half only
        ("fcntl", (0, 1), ALLOW),
        ("fcntl", (0, 8), EPERM),
        ("prctl", (38, 1), ALLOW),
        ("prctl", (1, 9), EPERM),
    ],
)
def test_some_calls_depend_on_an_argument(machine: str, name: str, arguments: tuple[int, ...], expected: int) -> None:
    assert verdict(machine, seccomp.limited(machine)[name], *arguments) == expected


@both
def test_the_numbers_are_those_of_the_headers(machine: str) -> None:
    if not HEADERS[machine].exists():
        pytest.skip(f"no {HEADERS[machine]}")
    found = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", HEADERS[machine].read_text())
    known = {name: int(number) for name, number in found}
    table = {**seccomp.denied(machine), **seccomp.limited(machine)}
    wrong = {name: number for name, number in table.items() if known.get(name, number) != number}
    assert wrong == {} and len(table.keys() & known.keys()) > 100
