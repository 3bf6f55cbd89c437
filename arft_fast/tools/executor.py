"""Calls tools for agents: deadlines, other tries when the world fails, and one execution for identical calls in flight.

Samples of one prompt often ask the same at the same moment. Such calls are one *flight*: carried out once, its result
or its fault shared by all who wait for it. Nothing is remembered once it has landed.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
import warnings
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field, replace
from random import Random
from typing import TYPE_CHECKING, Any

from arft_fast.tools.tool import InfraFault, Tool, ToolResult

if TYPE_CHECKING:
    from PIL.Image import Image

    from arft_fast.observe.timeline import Timeline

_CANCEL_GRACE_S = 5.0  # for a tool to clean up behind a call that nobody waits for any more

_Key = tuple[int, str, bytes]
"""Identity of the tool, argument, content of the image."""


@dataclass(eq=False)
class _Flight:
    """A call that is being carried out."""

    task: asyncio.Task[ToolResult] = field(init=False)
    waiters: int = 0
    attempts: int = 0


class ToolExecutor:
    """Carries out the tool calls of any number of trajectories, on the event loop of its first one."""

    def __init__(
        self,
        *,
        attempts: int = 2,
        deadline_s: float = 60.0,
        backoff_s: float = 0.5,
        concurrency: int | Mapping[str, int] = 0,
        timeline: Timeline | None = None,
    ) -> None:
        """Args:
        attempts: tries of a call, the first one included.
        deadline_s: bound on one try. A tool ends the model's code by its own, shorter deadline; this one ends the tool.
        backoff_s: the wait before try n + 1 is uniform in 0 .. ``backoff_s * 2**(n - 1)``, at most ``deadline_s``.
        concurrency: calls of a tool that are carried out at a time, for every tool or by tool name; 0 = no bound. The
            wait for a turn does not count for ``deadline_s``.
        timeline: takes a ``tool`` span for each call, with ``tool`` (its name), ``shared`` (another's identical call
            answered it), ``attempts`` and ``failed`` (it brought no result: a fault, or its caller was cancelled).

        Raises:
            ValueError: a number is out of its range.
        """
        if attempts < 1:
            raise ValueError(f"attempts is {attempts}; give 1 or more")
        if deadline_s <= 0 or backoff_s < 0:
            raise ValueError(f"deadline_s is {deadline_s} and backoff_s {backoff_s}; give seconds above 0 and from 0")
        if min([concurrency] if isinstance(concurrency, int) else concurrency.values(), default=0) < 0:
            raise ValueError(f"concurrency is {concurrency}; give 0 for no bound, or 1 or more")
        self._attempts, self._deadline_s, self._backoff_s = attempts, deadline_s, backoff_s
        self._concurrency, self._timeline = concurrency, timeline
        self._permits: dict[str, asyncio.Semaphore] = {}
        self._flights: dict[_Key, _Flight] = {}
        self._random = Random()

    async def call(self, tool: Tool, argument: str, image: Image | None, *, track: str) -> ToolResult:
        """The tool's result; ``seconds`` is the wall time of this call, other tries included.

        A call that is cancelled leaves its flight to those who still wait; the last one to go cancels the flight and
        waits, a few seconds at most, until the tool has ended it.

        Args:
            track: whose call it is, on the timeline.

        Raises:
            InfraFault: every try failed for a reason that is not the model's; names the tool and the cause.
        """
        started, failed = time.perf_counter(), True
        key = (id(tool), argument, b"" if image is None else await asyncio.to_thread(_digest, image))
        flight, shared = self._board(key, tool, argument, image)
        try:
            result = await self._land(key, flight, tool.name)
            failed = False
            return replace(result, seconds=time.perf_counter() - started)
        finally:
            if self._timeline is not None:
                detail: dict[str, Any] = {"tool": tool.name, "shared": shared, "attempts": flight.attempts}
                self._timeline.add("tool", track, started, time.perf_counter(), **detail, failed=failed)

    def _board(self, key: _Key, tool: Tool, argument: str, image: Image | None) -> tuple[_Flight, bool]:
        """The flight of an identical call, or a new one; and whether it was there already."""
        known = self._flights.get(key)
        if known is not None and not known.task.done():
            return known, True
        flight = self._flights[key] = _Flight()
        flight.task = asyncio.create_task(self._carry_out(flight, tool, argument, image), name=f"tool {tool.name}")
        flight.task.add_done_callback(lambda _: self._forget(key, flight))
        return flight, False

    def _forget(self, key: _Key, flight: _Flight) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]

    async def _land(self, key: _Key, flight: _Flight, name: str) -> ToolResult:
        """Wait for the flight; the last one who gives up waiting ends it."""
        flight.waiters += 1
        try:
            await asyncio.wait({flight.task})
        finally:
            flight.waiters -= 1
            if not flight.waiters and not flight.task.done():
                self._forget(key, flight)  # it is ending: an identical call from now on is another flight
                flight.task.cancel()
                await asyncio.wait({flight.task}, timeout=_CANCEL_GRACE_S)
                if not flight.task.done():
                    warnings.warn(f"tool {name!r}: a call goes on {_CANCEL_GRACE_S:g} s after its end", stacklevel=2)
                elif not flight.task.cancelled():
                    flight.task.exception()  # how it took its end concerns nobody
        return flight.task.result()

    async def _carry_out(self, flight: _Flight, tool: Tool, argument: str, image: Image | None) -> ToolResult:
        while True:
            flight.attempts += 1
            try:
                return await self._try(tool, argument, image)
            except InfraFault as fault:
                if fault.permanent or flight.attempts >= self._attempts or not flight.waiters:
                    tries = "once" if flight.attempts == 1 else f"{flight.attempts} times, at last"
                    raise InfraFault(f"tool {tool.name!r} failed {tries}: {fault}") from fault
            longest_s = min(self._backoff_s * 2 ** (flight.attempts - 1), self._deadline_s)
            await asyncio.sleep(self._random.uniform(0, longest_s))

    async def _try(self, tool: Tool, argument: str, image: Image | None) -> ToolResult:
        """One try; whatever comes out of it but a result or our own cancellation is a fault of the world."""
        async with self._permit(tool.name):
            try:
                async with asyncio.timeout(self._deadline_s) as deadline:
                    return await tool.call(argument, image)
            except InfraFault:
                raise
            except asyncio.CancelledError as error:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                raise InfraFault("the tool cancelled its own call") from error
            except Exception as error:
                if deadline.expired():
                    raise InfraFault(f"no answer in {self._deadline_s:g} s") from error
                raise InfraFault(f"{type(error).__name__}: {error}") from error

    def _permit(self, name: str) -> AbstractAsyncContextManager[None]:
        bound = self._concurrency if isinstance(self._concurrency, int) else self._concurrency.get(name, 0)
        if not bound:
            return nullcontext()
        return self._permits.setdefault(name, asyncio.Semaphore(bound))


def _digest(image: Image) -> bytes:
    return hashlib.sha256(f"{image.mode}{image.size}".encode() + image.tobytes()).digest()
