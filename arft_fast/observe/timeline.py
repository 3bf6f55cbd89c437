"""What happened when: spans of work, recorded by those who do it. Reading them is ``overlap``'s and ``trace``'s job."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["engine", "queue", "generate", "tool", "reward", "train", "sync"]
"""``engine``: the engine computes. ``queue``: a request waits for it. ``generate``: a request is being computed.
``tool``, ``reward``: as they say. ``train``: the update. ``sync``: the new weights go to the engine."""
TRAJECTORY_KINDS: frozenset[Kind] = frozenset({"queue", "generate", "tool", "reward"})
"""What a trajectory's own track holds."""


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of time."""

    kind: Kind
    track: str
    """Whose it is: a trajectory (``uid#sample``), ``engine`` or ``trainer``."""
    start: float
    """``time.perf_counter()`` seconds."""
    end: float
    detail: Mapping[str, Any] = field(default_factory=dict)
    """Figures and names for a reader, JSON values."""

    @property
    def seconds(self) -> float:
        return self.end - self.start


class Timeline:
    """The spans of one step. Not for several threads: everything is recorded on the event loop's."""

    def __init__(self) -> None:
        self._spans: list[Span] = []

    def add(self, kind: Kind, track: str, start: float, end: float, **detail: Any) -> None:
        """Record what is over."""
        self._spans.append(Span(kind, track, start, end, detail))

    @contextmanager
    def span(self, kind: Kind, track: str, **detail: Any) -> Iterator[None]:
        """Record what happens inside, an exception included."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(kind, track, start, time.perf_counter(), **detail)

    def take(self) -> list[Span]:
        """All spans since the last call, in order of their ends."""
        spans, self._spans = self._spans, []
        return spans
