"""A typed Python function with a docstring is a tool::

    def zoom(image: Image, box: tuple[int, int, int, int]) -> Image:
        '''Enlarge a part of the image.

        Args:
            box: left, top, right, bottom in pixels.
        '''

    tool = function_tool(zoom)
    await tool.call('{"box": [0, 0, 50, 50]}', image)

``function_schema`` says which types parameters may have, ``function_runner`` how a function is run and what it may
return. ``tool.schemas`` is what a chat template takes in its list of tools.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from arft_fast.tools.bounds import error_line
from arft_fast.tools.function_runner import FunctionRunner
from arft_fast.tools.function_schema import FunctionSchema, read_function
from arft_fast.tools.json_argument import ArgumentRejected, read_object
from arft_fast.tools.tool import ToolResult

if TYPE_CHECKING:
    from PIL.Image import Image


class FunctionTool:
    """A tool whose argument is a JSON object: checked against ``schema``, then given to ``run`` as keywords.

    Made by ``function_tool``, and by ``stateful_tool`` for each method of an object.
    """

    def __init__(
        self,
        schema: FunctionSchema,
        run: Callable[[dict[str, object]], Awaitable[ToolResult]],
        close: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self.name = schema.name
        self.schemas: Sequence[Mapping[str, object]] = [schema.as_json()]
        self._schema = schema
        self._run = run
        self._close = close

    async def call(self, argument: str, image: Image | None = None) -> ToolResult:
        """Run the function on ``argument``, a JSON object of its parameters. A bad argument is the model's error.

        Raises:
            InfraFault: see ``FunctionRunner.run``.
        """
        started = time.perf_counter()
        try:
            keywords = self._schema.keywords(read_object(argument), image)
        except ArgumentRejected as rejected:
            return ToolResult(error=error_line(str(rejected)), seconds=time.perf_counter() - started)
        return await self._run(keywords)

    async def start(self) -> str:
        return f"{self.name}: a function"

    async def close(self) -> None:
        """A stateless function holds nothing: a thread that still runs ends with its call, or with the process."""
        if self._close is not None:
            await self._close()


def function_tool(
    function: Callable[..., object],
    *,
    name: str | None = None,
    deadline_s: float = 30.0,
    threads: int = 4,
    text_limit: int = 4000,
) -> FunctionTool:
    """``function`` as a tool, called ``name`` (default: its own name). It may be ``async``.

    It must keep no state between calls: they come from many trajectories, several at a time, from several threads. Its
    ``ValueError`` is an observation; any other exception is an ``InfraFault``, and the call may be tried again.

    Args:
        deadline_s: bound on one call (``function_runner``: what happens to a synchronous one behind it).
        threads: calls of a synchronous function that run at the same time.
        text_limit: characters of a result's text.

    Raises:
        Unsupported: no docstring, or a parameter without a type or of one that JSON cannot give.
        ValueError: a number is out of range.
    """
    schema = read_function(function, name=name)
    runner = FunctionRunner(deadline_s=deadline_s, threads=threads, text_limit=text_limit)

    async def run(keywords: dict[str, object]) -> ToolResult:
        return await runner.run(schema.name, function, keywords)

    return FunctionTool(schema, run)
