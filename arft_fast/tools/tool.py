"""What a tool is: an async call from model text (and the episode's current image) to an observation.

A fault of the model (failing code, an empty query) is a ``ToolResult`` with ``error``: an observation like any other.
A fault of the world (sandbox worker died, index unreadable) is raised as ``InfraFault``: the caller may retry, then
masks the trajectory from loss and baseline.

Most tools are stateless: one object serves every trajectory. A tool that remembers what a trajectory did to it is a
``StatefulTool``; it hands out the tools of one trajectory, and ``episode_tools`` says how an agent asks for them::

    async with episode_tools(task.tools) as tools:
        result = await tools[kind].call(argument, image)
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from PIL.Image import Image


class InfraFault(RuntimeError):
    """The world failed, not the model."""

    permanent = False
    """Whether another try cannot help."""


@dataclass(frozen=True, kw_only=True)
class ToolResult:
    """What a tool gives back."""

    text: str = ""
    """Text for the model, bounded by the tool."""
    images: Sequence[Image] = ()
    """Images for the model, checked, re-encoded and bounded by the tool."""
    error: str | None = None
    """One line, when what the model asked for failed; ``None`` when it worked."""
    seconds: float = 0.0
    """Wall time of the call, queueing included."""


class Tool(Protocol):
    """A stateless tool. ``close`` releases what it holds (processes, connections)."""

    name: str

    async def call(self, argument: str, image: Image | None = None) -> ToolResult:
        """Carry out ``argument`` (code, a query) on the episode's current ``image``.

        Raises:
            InfraFault: the tool itself is broken; nothing is known about the model's argument.
        """
        ...

    async def start(self) -> str:
        """Start what the tool needs, before any engine or CUDA work; returns a line that says what runs."""
        ...

    async def close(self) -> None: ...


@runtime_checkable
class StatefulTool(Protocol):
    """Operations on a state, one state for each trajectory. It cannot be called itself, so no state can be shared."""

    name: str

    def for_episode(self) -> Mapping[str, Tool]:
        """The operations, by name, on a state that nobody else has. Closing any of them ends that state."""
        ...

    async def start(self) -> str:
        """As ``Tool.start``, once for all trajectories."""
        ...

    async def close(self) -> None: ...


@asynccontextmanager
async def episode_tools(tools: Mapping[str, Tool | StatefulTool]) -> AsyncIterator[Mapping[str, Tool]]:
    """The tools of one trajectory, by action kind: stateless ones as they are, stateful ones as their operations.

    On leaving, the states of this trajectory are closed, whatever happened; stateless tools stay open.

    Raises:
        ValueError: two tools have one name.
        InfraFault: a state could not be closed.
    """
    found: dict[str, Tool] = {}
    async with AsyncExitStack() as states:
        for kind, tool in tools.items():
            operations: Mapping[str, Tool] = {kind: tool} if not isinstance(tool, StatefulTool) else tool.for_episode()
            for name, operation in operations.items():
                if name in found:
                    raise ValueError(f"two tools are called {name!r}; rename one")
                found[name] = operation
                if isinstance(tool, StatefulTool):
                    states.push_async_callback(operation.close)
        yield found
