"""A step's timeline in Chrome's trace-event format, which https://ui.perfetto.dev opens.

Format: "Trace Event Format" (the Chromium project): complete events ``X``, counters ``C``, names as metadata ``M``;
times in microseconds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from arft_fast.observe.timeline import TRAJECTORY_KINDS, Kind, Span

COUNTERS: dict[Kind, str] = {"generate": "running requests", "queue": "waiting requests", "tool": "pending tools"}
_PROCESSES = ("engine and trainer", "trajectories")


def lanes(spans: Iterable[Span]) -> dict[str, list[Span]]:
    """The spans of each track in order of time: engine and trainer first, then trajectories as they started."""
    tracks: dict[str, list[Span]] = {}
    for span in sorted(spans, key=lambda span: (span.start, span.end)):
        tracks.setdefault(span.track, []).append(span)
    # Sorting keeps the order of what compares equal: that of the first starts. "engine" stands before "trainer".
    top = sorted(track for track, own in tracks.items() if not _is_trajectory(own))
    return {track: tracks[track] for track in [*top, *(track for track in tracks if track not in top)]}


def count_steps(spans: Iterable[Span]) -> list[tuple[float, int]]:
    """How many of ``spans`` are under way: (from this second on, so many), in order of time, without repeats."""
    changes: dict[float, int] = {}
    for span in spans:
        changes[span.start] = changes.get(span.start, 0) + 1
        changes[span.end] = changes.get(span.end, 0) - 1
    steps, running = [], 0
    for moment in sorted(changes):
        if changes[moment]:
            running += changes[moment]
            steps.append((moment, running))
    return steps


def chrome_trace(spans: Sequence[Span]) -> dict[str, Any]:
    """The trace as JSON values; time 0 is the first start.

    A track a trajectory; above them engine and trainer, and as counters the running requests, the waiting ones and the
    pending tool calls.
    """
    origin = min((span.start for span in spans), default=0.0)
    events: list[dict[str, Any]] = []
    for process, name in enumerate(_PROCESSES, start=1):
        events.append(_metadata(process, 0, "process_name", {"name": name}))
        events.append(_metadata(process, 0, "process_sort_index", {"sort_index": process}))
    for thread, (track, own) in enumerate(lanes(spans).items(), start=len(_PROCESSES) + 1):
        process = 2 if _is_trajectory(own) else 1
        events.append(_metadata(process, thread, "thread_name", {"name": track}))
        events.append(_metadata(process, thread, "thread_sort_index", {"sort_index": thread}))
        events += (_complete(span, process, thread, origin) for span in own)
    events += _counters(spans, origin)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def write_trace(path: Path, spans: Sequence[Span]) -> None:
    """Write ``chrome_trace(spans)`` as a JSON file."""
    trace = json.dumps(chrome_trace(spans), allow_nan=False, separators=(",", ":"), default=str)
    path.write_text(trace, encoding="utf-8")


def span_name(span: Span) -> str:
    """``tool search``, ``generate``: what a reader sees on the span."""
    tool = span.detail.get("tool")
    return f"{span.kind} {tool}" if isinstance(tool, str) else span.kind


def _is_trajectory(spans: Iterable[Span]) -> bool:
    return any(span.kind in TRAJECTORY_KINDS for span in spans)


def _metadata(process: int, thread: int, name: str, values: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "name": name, "pid": process, "tid": thread, "args": values}


def _complete(span: Span, process: int, thread: int, origin: float) -> dict[str, Any]:
    start, end = _nanoseconds(span.start - origin), _nanoseconds(span.end - origin)
    return {
        "ph": "X",
        "name": span_name(span),
        "cat": span.kind,
        "pid": process,
        "tid": thread,
        "ts": start / 1000,
        "dur": (end - start) / 1000,  # of the rounded ends: spans that touch must not overlap by a rounding error
        "args": {name: _finite(value) for name, value in span.detail.items()},
    }


def _counters(spans: Sequence[Span], origin: float) -> Iterator[dict[str, Any]]:
    for kind, name in COUNTERS.items():
        for moment, count in count_steps(span for span in spans if span.kind == kind):
            at = _nanoseconds(moment - origin) / 1000
            yield {"ph": "C", "name": name, "pid": 1, "tid": 0, "ts": at, "args": {"count": count}}


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)


def _finite(value: Any) -> Any:
    """JSON has no nan."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
