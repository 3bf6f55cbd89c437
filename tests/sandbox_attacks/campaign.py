"""Running attacks: what the tests, the benchmark and an unprivileged user do alike."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from arft_fast.tools.sandbox import Mode, Sandbox, SandboxResult
from tests.sandbox_attacks import ATTACKS, Attack, World
from tests.sandbox_attacks.attack import HURRY_S, TIMEOUT_S
from tests.sandbox_attacks.resources import LEFT
from tests.sandbox_attacks.world import made

CONTROL = f"import numpy, os\nopen('out', 'w').write('{LEFT}')\nprint(numpy.arange(4).sum(), os.listdir(), '{LEFT}')"
"""Harmless code that must work before and after every attack; leaves a mark for the attack to find."""


class Campaign:
    """A patient and a hurried sandbox, one process each, and a world to attack."""

    def __init__(self, patient: Sandbox, hurried: Sandbox, world: World) -> None:
        self.patient, self.hurried, self.world = patient, hurried, world

    async def run(self, attack: Attack) -> SandboxResult:
        sandbox = self.hurried if attack.hurried else self.patient
        return await sandbox.run(attack.source(self.world), {}, attack.collect)

    async def succeeds(self, attack: Attack) -> bool:
        """Whether ``attack`` does harm."""
        return attack.harm(await self.run(attack), self.world)

    async def check(self) -> None:
        """Raises ``AssertionError`` when harmless code does not work."""
        control = await self.patient.run(CONTROL, {}, ["out"])
        assert (control.error, control.files) == (None, {"out": LEFT.encode()}), control
        assert control.stdout == f"6 ['out'] {LEFT}\n"


@asynccontextmanager
async def campaign(mode: Mode, folder: Path) -> AsyncIterator[Campaign]:
    """Sandboxes of ``mode`` and a world in ``folder``."""
    sandboxes = [
        Sandbox(workers=1, timeout_s=timeout_s, memory_mib=256, output_bytes=4096, mode=mode)
        for timeout_s in (TIMEOUT_S, HURRY_S)
    ]
    try:
        with made(folder) as world:
            for sandbox in sandboxes:
                await sandbox.start()
            yield Campaign(sandboxes[0], sandboxes[1], world)
    finally:
        for sandbox in sandboxes:
            await sandbox.close()


async def successes(attacks: Sequence[Attack], mode: Mode, folder: Path) -> list[str]:
    """The names of the attacks that do harm."""
    found = []
    async with campaign(mode, folder) as running:
        for number, attack in enumerate(attacks):
            if number % 10 == 0:
                await running.check()
            if await running.succeeds(attack):
                found.append(attack.name)
        await running.check()
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        found = asyncio.run(successes(ATTACKS, "strict", Path(temporary)))
    print(f"{len(ATTACKS)} attacks, {len(found)} succeeded: {', '.join(found) or 'none'}")
    sys.exit(bool(found))
