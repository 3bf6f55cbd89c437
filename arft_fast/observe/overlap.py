"""How much of a step's waiting was hidden: figures of a timeline.

With ``|X|`` the length of a union of intervals, E the engine's time and T the time in which some tool call is pending,
the engine is idle under a pending tool for ``|T| - |T and E| = |E or T| - |E|``. Nothing but unions is needed, and a
union is one sort and one pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import get_args

import numpy as np

from arft_fast.observe.timeline import TRAJECTORY_KINDS, Kind, Span

Intervals = list[tuple[float, float]]


def overlap_metrics(spans: Iterable[Span]) -> dict[str, float]:
    """Figures of one step on one rank. The names are always the same; what was not measured is nan, a count 0.

    ``<kind>_s`` is wall time in which at least one span of the kind was under way, however many there were.

    Returns:
        ``timeline/rollout_s``: from the first start to the last end of engine, queue, generate, tool and reward spans.
        ``timeline/reward_s``, ``train_s``, ``sync_s``.
        ``timeline/engine_busy``: share of ``rollout_s`` in which the engine computes; where no engine recorded itself,
        in which some request is being generated.
        ``timeline/hidden_tool_fraction``: share of the time with a pending tool call in which the engine computes; 1
        means that it never waited for a tool.
        ``timeline/tool_p50_s``, ``tool_p95_s``, ``tool_p99_s``: of a call as its trajectory felt it, queueing and
        repeated tries included; ``tool_calls`` their number; ``tool_shared`` those that an identical call in flight
        answered.
        ``timeline/critical_generate_s``, ``critical_queue_s``, ``critical_tool_s``, ``critical_other_s``: what the
        trajectory that ended last did in ``rollout_s``; the four add up to it. ``other`` is waiting for a start, image
        preparation, its reward, and the event loop.
    """
    by_kind: dict[Kind, list[Span]] = {kind: [] for kind in get_args(Kind)}
    for span in spans:
        by_kind[span.kind].append(span)
    calls = by_kind["tool"]
    engine = _union(by_kind["engine"] or by_kind["generate"])
    tools = _union(calls)
    engine_s, tool_s = _length(engine), _length(tools)
    idle_s = _length(_merge([*engine, *tools])) - engine_s
    own = [span for kind in TRAJECTORY_KINDS for span in by_kind[kind]]
    rollout_s = _extent([*by_kind["engine"], *own])
    p50, p95, p99 = np.quantile([call.seconds for call in calls], (0.5, 0.95, 0.99)) if calls else (math.nan,) * 3
    figures = {
        "rollout_s": rollout_s,
        "reward_s": _seconds(by_kind["reward"]),
        "train_s": _seconds(by_kind["train"]),
        "sync_s": _seconds(by_kind["sync"]),
        "engine_busy": engine_s / rollout_s if rollout_s > 0 else math.nan,
        "hidden_tool_fraction": 1 - idle_s / tool_s if tool_s > 0 else math.nan,
        "tool_calls": float(len(calls)),
        "tool_shared": float(sum(bool(call.detail.get("shared")) for call in calls)),
        "tool_p50_s": float(p50),
        "tool_p95_s": float(p95),
        "tool_p99_s": float(p99),
        **_critical(own, rollout_s),
    }
    return {f"timeline/{name}": value for name, value in figures.items()}


def _critical(own: Sequence[Span], rollout_s: float) -> dict[str, float]:
    """What the trajectory that ended last spent the rollout on."""
    last = max(own, key=lambda span: span.end).track if own else None
    parts: dict[str, float] = {}
    for kind in ("generate", "queue", "tool"):
        spans = [span for span in own if span.track == last and span.kind == kind]
        parts[f"critical_{kind}_s"] = _length(_union(spans)) if own else math.nan
    return parts | {"critical_other_s": rollout_s - sum(parts.values())}


def _extent(spans: Sequence[Span]) -> float:
    """Seconds from the first start to the last end."""
    return max(span.end for span in spans) - min(span.start for span in spans) if spans else math.nan


def _seconds(spans: Sequence[Span]) -> float:
    return _length(_union(spans)) if spans else math.nan


def _union(spans: Iterable[Span]) -> Intervals:
    return _merge((span.start, span.end) for span in spans)


def _merge(intervals: Iterable[tuple[float, float]]) -> Intervals:
    """Disjoint intervals in order that cover the same time."""
    merged: Intervals = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def _length(disjoint: Intervals) -> float:
    return sum(end - start for start, end in disjoint)
