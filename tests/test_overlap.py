from __future__ import annotations

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arft_fast.observe.overlap import overlap_metrics
from arft_fast.observe.timeline import TRAJECTORY_KINDS, Kind, Span, Timeline


def _figures(*spans: Span) -> dict[str, float]:
    return {name.removeprefix("timeline/"): value for name, value in overlap_metrics(spans).items()}


def _engine(start: float, end: float) -> Span:
    return Span("engine", "engine", start, end)


def _tool(start: float, end: float, track: str = "p#0", **detail: object) -> Span:
    return Span("tool", track, start, end, detail)


def test_a_tool_under_a_busy_engine_is_hidden() -> None:
    assert _figures(_engine(0, 10), _tool(2, 5), _tool(4, 8, "p#1"))["hidden_tool_fraction"] == 1.0


def test_a_tool_that_the_engine_waits_for_is_not_hidden() -> None:
    assert _figures(_engine(0, 2), _tool(2, 5), _engine(5, 6))["hidden_tool_fraction"] == 0.0


def test_time_in_which_several_tools_are_pending_counts_once() -> None:
    # Tools from 1 to 9, the engine idle from 5 to 7 and behind 8.
    figures = _figures(_engine(0, 5), _engine(7, 8), _tool(1, 6), _tool(2, 9, "p#1"), _tool(5, 6, "p#2"))
    assert figures["hidden_tool_fraction"] == pytest.approx(1 - 3 / 8)
    assert figures["engine_busy"] == pytest.approx(6 / 9)


def test_what_requests_do_stands_in_for_an_engine_that_records_nothing() -> None:
    figures = _figures(Span("generate", "p#0", 0, 2), Span("generate", "p#1", 1, 3), _tool(3, 4))
    assert figures["engine_busy"] == pytest.approx(3 / 4)
    assert _figures(Span("generate", "p#0", 0, 4), _engine(1, 2))["engine_busy"] == pytest.approx(1 / 4)


def test_the_rollout_ends_before_the_update() -> None:
    figures = _figures(
        Span("generate", "p#0", 1, 4), Span("reward", "p#0", 4, 5), Span("reward", "p#1", 4, 5),
        Span("train", "trainer", 6, 9), Span("sync", "trainer", 9, 9.5),
    )  # fmt: skip
    names = ("rollout_s", "reward_s", "train_s", "sync_s")
    assert [figures[name] for name in names] == [4.0, 1.0, 3.0, 0.5]


def test_the_critical_path_is_that_of_the_trajectory_that_ended_last() -> None:
    figures = _figures(
        Span("generate", "fast#0", 0, 3), _tool(3, 7, "fast#0"),
        Span("queue", "slow#0", 1, 2), Span("generate", "slow#0", 2, 4), _tool(4, 5, "slow#0"),
        Span("generate", "slow#0", 5.5, 9), Span("reward", "slow#0", 9, 9.25),
    )  # fmt: skip
    path = [figures[f"critical_{kind}_s"] for kind in ("generate", "queue", "tool", "other")]
    assert path == [5.5, 1.0, 1.0, pytest.approx(1 + 0.5 + 0.25)]
    assert sum(path) == pytest.approx(figures["rollout_s"])


def test_latencies_are_those_of_single_calls() -> None:
    calls = [_tool(0, k / 100, f"p#{k}", shared=k > 90) for k in range(101)]
    figures = _figures(*calls)
    assert [figures[f"tool_p{share}_s"] for share in (50, 95, 99)] == pytest.approx([0.5, 0.95, 0.99])
    assert (figures["tool_calls"], figures["tool_shared"]) == (101.0, 10.0)


def test_names_stay_the_same_and_what_was_not_measured_is_nan() -> None:
    empty = _figures()
    assert empty.keys() == _figures(_engine(0, 1), _tool(0, 1)).keys()
    assert empty.pop("tool_calls") == empty.pop("tool_shared") == 0.0
    assert all(math.isnan(value) for value in empty.values())


@st.composite
def _spans(draw: st.DrawFn) -> list[Span]:
    """Spans between whole seconds, so that seconds can be counted one by one."""
    spans = []
    for _ in range(draw(st.integers(1, 12))):
        kind: Kind = draw(st.sampled_from(["engine", "generate", "tool", "queue"]))
        start = draw(st.integers(0, 20))
        track = "engine" if kind == "engine" else f"p#{draw(st.integers(0, 3))}"
        spans.append(Span(kind, track, start, start + draw(st.integers(1, 8))))
    return spans


@given(_spans())
def test_intervals_say_what_counting_seconds_says(spans: list[Span]) -> None:
    def seconds(kind: str) -> set[int]:
        return {t for span in spans if span.kind == kind for t in range(int(span.start), int(span.end))}

    engine, tool = seconds("engine") or seconds("generate"), seconds("tool")
    whole = max(span.end for span in spans) - min(span.start for span in spans)
    figures = _figures(*spans)
    assert figures["engine_busy"] == pytest.approx(len(engine) / whole)
    if tool:
        assert figures["hidden_tool_fraction"] == pytest.approx(len(tool & engine) / len(tool))
    if any(span.kind in TRAJECTORY_KINDS for span in spans):
        parts = ("generate", "queue", "tool", "other")
        assert sum(figures[f"critical_{part}_s"] for part in parts) == pytest.approx(whole)


def test_a_hundred_thousand_spans_take_no_quadratic_time() -> None:
    spans = [_tool(k * 0.01, k * 0.01 + 0.5, f"p#{k % 64}") for k in range(50_000)]
    spans += [_engine(k * 0.01, k * 0.01 + 0.005) for k in range(50_000)]
    started = time.perf_counter()
    assert _figures(*spans)["engine_busy"] == pytest.approx(0.5, abs=0.001)
    assert time.perf_counter() - started < 5.0


def test_a_timeline_gives_its_spans_once_and_keeps_what_an_exception_cut_short() -> None:
    timeline = Timeline()
    with pytest.raises(RuntimeError), timeline.span("tool", "p#0", tool="search"):
        raise RuntimeError
    (span,) = timeline.take()
    assert (span.kind, span.track, span.detail) == ("tool", "p#0", {"tool": "search"}) and span.seconds >= 0
    assert timeline.take() == []
