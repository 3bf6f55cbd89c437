"""Ctrl-C and SIGTERM end a run at the next step's edge, on all ranks together, with everything saved."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Coroutine
from types import FrameType, TracebackType
from typing import Any, TypeVar

from arft_fast.policy.parallel import Ranks

T = TypeVar("T")

# torchrun passes a terminal's Ctrl-C on to workers that have it already: only a later one means impatience.
_SAME_SIGNAL_S = 3.0


class Stopped(Exception):
    """The run was asked to stop; what it has so far is to be saved."""


class StopSignal:
    """A context in which the signals are requests; a second one, seconds later, interrupts at once."""

    def __init__(self) -> None:
        self.requested = False
        self._first = 0.0
        self._guarded: tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]] | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        self._old = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested and time.monotonic() - self._first > _SAME_SIGNAL_S:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested, self._first = True, time.monotonic()
        if self._guarded is not None:
            loop, task = self._guarded
            loop.call_soon_threadsafe(task.cancel)

    async def guard(self, work: Coroutine[Any, Any, T]) -> T | None:
        """The result of ``work``; None when a stop was requested meanwhile and ``work`` was cancelled for it."""
        task = asyncio.ensure_future(work)
        self._guarded = asyncio.get_running_loop(), task
        if self.requested:
            task.cancel()
        try:
            with contextlib.suppress(asyncio.CancelledError):
                return await task
            if not self.requested:
                raise asyncio.CancelledError  # somebody else's cancellation is not ours to swallow
            return None
        finally:
            self._guarded = None

    def check(self, ranks: Ranks) -> None:
        """Raises ``Stopped`` on every rank when any rank was asked to stop; a collective call."""
        if ranks.sum(float(self.requested))[0] > 0:
            raise Stopped
