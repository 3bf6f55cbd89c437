"""One zygote as the trainer sees it: how it is started, asked and ended."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from arft_fast.tools.sandbox import frame
from arft_fast.tools.sandbox.confine import ONE_THREAD
from arft_fast.tools.tool import InfraFault

_START_S = 60.0
_END_S = 2.0
_BOOT = """
import sys, types
for name in ("arft_fast", "arft_fast.tools", "arft_fast.tools.sandbox"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = []
sys.modules[name].__path__.append(sys.argv[1])
from arft_fast.tools.sandbox.zygote import run
run(sys.argv[2])
"""
"""-I leaves the package out of the path, and its real parents would load what a zygote does not need."""


class Handle:
    """A zygote and its two pipes. Its processes are no children of ours: they make up the group of the launcher, a
    process that has ended, and the end of their output says that the last of them is gone."""

    def __init__(self, launcher: asyncio.subprocess.Process) -> None:
        assert launcher.stdin is not None and launcher.stdout is not None, "opened with PIPE"
        self._launcher, self._stdin, self._stdout = launcher, launcher.stdin, launcher.stdout

    @property
    def is_dead(self) -> bool:
        return self._stdout.at_eof()

    async def hello(self) -> tuple[str, ...]:
        """Wait until it is ready; returns its active layers. Raises ``InfraFault`` when it does not come up."""
        header, _ = await self.ask(b"", _START_S)
        return tuple(header["layers"])

    async def ask(self, data: bytes, timeout_s: float) -> tuple[dict[str, Any], list[bytes]]:
        """Send a frame (none if empty) and read the answer. Raises ``InfraFault`` when none comes in time."""
        try:
            async with asyncio.timeout(timeout_s):
                self._stdin.write(data)
                await self._stdin.drain()
                (length,) = frame.LENGTH.unpack(await self._stdout.readexactly(frame.LENGTH.size))
                header: dict[str, Any] = json.loads(await self._stdout.readexactly(length))
                blobs = [await self._stdout.readexactly(size) for size in header["sizes"]]
        except TimeoutError as error:
            raise InfraFault(f"a sandbox process gave no answer within {timeout_s:g} s") from error
        except (OSError, asyncio.IncompleteReadError) as error:
            raise InfraFault("a sandbox process died") from error
        if "fault" in header:
            raise InfraFault(f"sandbox: {header['fault']}")
        return header, blobs

    def hang_up(self) -> None:
        """Close its input: a zygote in good health ends its call, cleans up and exits."""
        self._stdin.close()

    def kill(self) -> None:
        if not self.is_dead:
            with suppress(ProcessLookupError):  # gone in this moment
                os.killpg(self._launcher.pid, signal.SIGKILL)

    async def end(self) -> None:
        """Hang up, wait until all its processes are gone, kill them when that takes too long."""
        self.hang_up()
        try:
            async with asyncio.timeout(_END_S):
                await self._gone()
        except TimeoutError:
            self.kill()
            await self._gone()

    async def _gone(self) -> None:
        while await self._stdout.read(1 << 16):
            pass  # the rest of an answer that nobody waits for
        await self._launcher.wait()
        with suppress(OSError):  # what was still to be sent has no reader
            await self._stdin.wait_closed()


async def spawn(settings: Mapping[str, Any]) -> Handle:
    """Start a zygote with the fields of ``zygote.Settings``; ``hello`` waits for it.

    Raises:
        InfraFault: Python cannot be started.
    """
    environment = {"LANG": "C.UTF-8", "MALLOC_ARENA_MAX": "1", **ONE_THREAD}  # an arena a thread takes 64 MiB of space
    if "LD_LIBRARY_PATH" in os.environ:  # some Pythons do not start without it
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    try:
        launcher = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-c", _BOOT, str(Path(__file__).parent), json.dumps(settings)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=environment,
            cwd="/",
            start_new_session=True,  # Ctrl-C in a terminal goes to the trainer, which closes the sandbox in order
        )
    except OSError as error:
        raise InfraFault(f"the sandbox could not start {sys.executable}: {error}") from error
    return Handle(launcher)
