"""What a tool is: an async call from model text (and the episode's current image) to an observation.

A fault of the model (failing code, an empty query) is a ``ToolResult`` with ``error``: an observation like any other.
A fault of the world (sandbox worker died, index unreadable) is raised as ``InfraFault``: the caller may retry, then
masks the trajectory from loss and baseline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from PIL.Image import Image


class InfraFault(RuntimeError):
    """The world failed, not the model."""


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
