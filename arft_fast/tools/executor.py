"""Calls tools for an agent: a deadline around every call, and another try when the world, not the model, failed."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from arft_fast.tools.tool import InfraFault, Tool, ToolResult

if TYPE_CHECKING:
    from PIL.Image import Image


async def call_tool(
    tool: Tool, argument: str, image: Image | None, *, deadline_s: float, attempts: int = 2
) -> ToolResult:
    """The tool's result with the wall time of all tries.

    Args:
        deadline_s: bound on one try. A tool ends the model's code by its own, shorter deadline; this one ends the tool.

    Raises:
        InfraFault: every try failed for a reason that is not the model's.
    """
    started = time.perf_counter()
    for attempt in range(1, attempts + 1):
        try:
            result = await asyncio.wait_for(tool.call(argument, image), deadline_s)
            return replace(result, seconds=time.perf_counter() - started)
        except InfraFault:
            if attempt == attempts:
                raise
        except TimeoutError as error:
            if attempt == attempts:
                raise InfraFault(f"tool {tool.name!r} gave no answer in {deadline_s:g} s, {attempts} times") from error
    raise AssertionError("unreachable: the last try returns or raises")
