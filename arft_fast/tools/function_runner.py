"""Runs functions for tools: off the event loop, a bounded number at a time, under a deadline.

A thread cannot be killed. A synchronous function that runs past its deadline is left behind: nobody reads what it
returns, and until it ends it keeps one of ``threads``. Its thread is a daemon, so it does not keep the process alive.
A function that may hang belongs into a process, or should be ``async``: that one is cancelled.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from PIL.Image import Image

from arft_fast.tools.bounds import clean_image, clean_images, error_line, printable
from arft_fast.tools.tool import InfraFault, ToolResult

MAX_IMAGES = 8
"""Images of one result."""

_Outcome = tuple[ToolResult | None, BaseException | None]


class FunctionRunner:
    """Belongs to the event loop that uses it first.

    Args:
        deadline_s: bound on one call; the wait for a free thread is bounded by as much again.
        threads: synchronous functions that run at the same time.
        text_limit: characters of a result's text.
    """

    def __init__(self, *, deadline_s: float = 30.0, threads: int = 4, text_limit: int = 4000) -> None:
        if not deadline_s > 0:
            raise ValueError(f"deadline_s must be positive, got {deadline_s}")
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        if text_limit < 0:
            raise ValueError(f"text_limit must not be negative, got {text_limit}")
        self._deadline_s = deadline_s
        self._threads = threads
        self._text_limit = text_limit
        self._free = asyncio.Semaphore(threads)

    async def run(self, name: str, function: Callable[..., object], keywords: dict[str, object]) -> ToolResult:
        """What ``function(**keywords)`` returns, bounded and cleaned: ``str | Image | (str, Image) | ToolResult``.

        A ``ValueError`` is the model's fault: its text becomes the result's ``error``.

        Raises:
            InfraFault: another exception, another type of result, or the deadline; the exception is the cause.
        """
        started = time.perf_counter()
        if inspect.iscoroutinefunction(function):
            result, error = await self._awaited(name, function, keywords)
        else:
            result, error = await self._in_thread(name, lambda: self._result(function(**keywords)))
        if isinstance(error, InfraFault):
            raise error
        if isinstance(error, ValueError):
            result = ToolResult(error=error_line(str(error)) or "the arguments were refused")
        elif error is not None:
            raise InfraFault(f"{name} broke: {error_line(f'{type(error).__name__}: {error}')}") from error
        assert result is not None, "no error, so there is a result"
        return replace(result, seconds=time.perf_counter() - started)

    async def _awaited(self, name: str, function: Callable[..., Any], keywords: dict[str, object]) -> _Outcome:
        try:
            async with asyncio.timeout(self._deadline_s) as deadline:
                value = await function(**keywords)
            return await asyncio.to_thread(self._result, value), None
        except Exception as error:
            if deadline.expired():
                raise InfraFault(f"{name} took longer than deadline_s = {self._deadline_s:g}") from error
            return None, error

    async def _in_thread(self, name: str, work: Callable[[], ToolResult]) -> _Outcome:
        try:
            async with asyncio.timeout(self._deadline_s):
                await self._free.acquire()
        except TimeoutError as error:
            wait = f"waited deadline_s = {self._deadline_s:g} for a thread"
            raise InfraFault(f"{name} {wait}: all {self._threads} run earlier calls, perhaps hung ones") from error
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[_Outcome] = loop.create_future()

        def settle(value: _Outcome) -> None:
            self._free.release()
            if not outcome.done():
                outcome.set_result(value)

        def run() -> None:
            try:
                value: _Outcome = work(), None
            except BaseException as error:  # SystemExit too: otherwise nobody would learn of it
                value = None, error
            with suppress(RuntimeError):  # the loop is closed, and with it everybody who waited
                loop.call_soon_threadsafe(settle, value)

        try:
            threading.Thread(target=contextvars.copy_context().run, args=(run,), daemon=True).start()
        except RuntimeError as error:  # the system has no thread left
            self._free.release()
            return None, error
        try:
            async with asyncio.timeout(self._deadline_s):
                return await outcome
        except TimeoutError as error:
            late = f"took longer than deadline_s = {self._deadline_s:g}; its thread goes on"
            raise InfraFault(f"{name} {late}") from error

    def _result(self, value: object) -> ToolResult:
        match value:
            case ToolResult():
                images = clean_images(value.images, MAX_IMAGES)
                error = None if value.error is None else error_line(value.error)
                return ToolResult(text=self._text(value.text), images=images, error=error)
            case str():
                return ToolResult(text=self._text(value))
            case Image():
                return ToolResult(images=[clean_image(value)])
            case (str() as text, Image() as image):
                return ToolResult(text=self._text(text), images=[clean_image(image)])
        raise TypeError(f"returned {type(value).__name__}; return str, Image, (str, Image) or ToolResult")

    def _text(self, text: str) -> str:
        return printable(text[: 2 * self._text_limit])[: self._text_limit]
