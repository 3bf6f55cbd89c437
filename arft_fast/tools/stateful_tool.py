"""An object with methods is a tool with a state: one object for each trajectory, its public methods the operations::

    class Notebook:
        '''Remembers lines.'''

        def __init__(self) -> None:
            self.lines: list[str] = []

        def write(self, line: str) -> str:
            '''Write a line.'''
            self.lines.append(line)
            return f"{len(self.lines)} lines"

    async with episode_tools({"notebook": stateful_tool(Notebook)}) as tools:
        await tools["write"].call('{"line": "red"}')

Operations of one trajectory take turns. One that fails by a fault of the world, or is cancelled, may have done half of
its work, so from then on the state is of no use: every later operation, another try too, raises ``InfraFault``.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import get_type_hints

from arft_fast.tools.function_runner import FunctionRunner
from arft_fast.tools.function_schema import FunctionSchema, Unsupported, read_function
from arft_fast.tools.function_tool import FunctionTool
from arft_fast.tools.tool import InfraFault, Tool, ToolResult


class ObjectTool:
    """A ``tool.StatefulTool`` over objects that ``factory`` makes; see ``stateful_tool``."""

    def __init__(self, factory: Callable[[], object], runner: FunctionRunner) -> None:
        made = factory if inspect.isclass(factory) else get_type_hints(factory).get("return")
        if not inspect.isclass(made):
            raise Unsupported(f"{factory!r} does not say what it makes; annotate its result, or give a class")
        try:
            inspect.signature(factory).bind()
        except TypeError as error:
            raise Unsupported(f"{made.__name__} needs arguments to be made; give a function that takes none") from error
        self.name = made.__name__
        self._factory = factory
        self._runner = runner
        self._operations = _operations(made)
        self.schemas: Sequence[Mapping[str, object]] = [schema.as_json() for schema in self._operations]

    def for_episode(self) -> Mapping[str, Tool]:
        """The operations on a new object, which is made when the first of them is called."""
        state = _State(self.name, self._factory, self._runner)
        return {each.name: FunctionTool(each, state.operation(each.name), state.close) for each in self._operations}

    async def start(self) -> str:
        return f"{self.name}: an object for each trajectory, with {', '.join(each.name for each in self._operations)}"

    async def close(self) -> None:
        """Nothing to release: each trajectory closes its own object."""


class _State:
    """The object of one trajectory."""

    def __init__(self, name: str, factory: Callable[[], object], runner: FunctionRunner) -> None:
        self._name = name
        self._factory = factory
        self._runner = runner
        self._turn = asyncio.Lock()
        self._object: object = None
        self._fault: BaseException | None = None
        self._closed = False

    def operation(self, name: str) -> Callable[[dict[str, object]], Awaitable[ToolResult]]:
        async def run(keywords: dict[str, object]) -> ToolResult:
            async with self._turn:
                self._check()
                try:
                    if self._object is None:
                        await self._do("__init__", self._make)
                    return await self._runner.run(f"{self._name}.{name}", getattr(self._object, name), keywords)
                except (InfraFault, asyncio.CancelledError) as fault:  # in both cases a thread may still work on it
                    self._fault = fault
                    raise

        return run

    async def close(self) -> None:
        """Call the object's own ``close``, if it has one. Idempotent. A call that ran out of time may still go on.

        Raises:
            InfraFault: that failed.
        """
        async with self._turn:
            if self._closed:
                return
            self._closed = True
            close = getattr(self._object, "close", None)
            if close is not None:
                await self._do("close", close)

    def _check(self) -> None:
        if self._closed:
            raise InfraFault(f"{self._name} is closed: its trajectory has ended")
        if self._fault is not None:
            reason = str(self._fault) or "a call was cancelled"
            raise InfraFault(f"{self._name} is in an unknown state since: {reason}") from self._fault

    def _make(self) -> None:
        self._object = self._factory()

    async def _do(self, name: str, function: Callable[[], object]) -> None:
        """Run a function that has nothing to say to a model: whatever it raises is a fault."""

        def work() -> str:
            function()
            return ""

        async def work_async() -> str:
            await function()  # type: ignore[misc]
            return ""

        chosen = work_async if inspect.iscoroutinefunction(function) else work
        result = await self._runner.run(f"{self._name}.{name}", chosen, {})
        if result.error is not None:
            raise InfraFault(f"{self._name}.{name} broke: {result.error}")


def stateful_tool(
    factory: Callable[[], object], *, deadline_s: float = 30.0, threads: int = 4, text_limit: int = 4000
) -> ObjectTool:
    """A tool over objects that ``factory``, a class or a function that names its class as its result, makes.

    Public methods are the operations, each held to what ``function_tool`` asks of a function; ``close``, when there is
    one, is called at the end of the trajectory instead. ``deadline_s`` and ``text_limit`` are as there; ``threads`` is
    a bound for the objects of all trajectories together.

    Raises:
        Unsupported: it takes arguments, makes something without public methods, or a method cannot be an operation.
        ValueError: a number is out of range.
    """
    return ObjectTool(factory, FunctionRunner(deadline_s=deadline_s, threads=threads, text_limit=text_limit))


def _operations(made: type) -> list[FunctionSchema]:
    operations = []
    for name in dir(made):
        method = getattr(made, name)
        if inspect.isfunction(method) and not name.startswith("_") and name != "close":
            is_static = isinstance(inspect.getattr_static(made, name), staticmethod)
            operations.append(read_function(method, skip_first=not is_static))
    if not operations:
        raise Unsupported(f"{made.__name__} has no public method; a method is an operation of the tool")
    return operations
