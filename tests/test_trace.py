from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from arft_fast.observe.timeline import Span
from arft_fast.observe.trace import chrome_trace, count_steps, lanes, write_trace
from arft_fast.observe.trace_page import trace_html

EVIL = '"><script>alert(1)</script>\ud800\x1b[31m'
SPANS = [
    Span("sync", "trainer", 109.0, 110.0),
    Span("generate", "b#0", 101.5, 103.0),
    Span("queue", "a#0", 100.0, 100.5),
    Span("generate", "a#0", 100.5, 102.0, {"tokens": 31}),
    Span("tool", "a#0", 102.0, 102.25, {"tool": "search", "shared": False}),
    Span("engine", "engine", 100.5, 103.0),
    Span("train", "trainer", 104.0, 109.0),
]


def _events(trace: dict[str, Any], phase: str) -> list[dict[str, Any]]:
    return [event for event in trace["traceEvents"] if event["ph"] == phase]


def _thread_names(trace: dict[str, Any]) -> dict[int, str]:
    return {event["tid"]: event["args"]["name"] for event in _events(trace, "M") if event["name"] == "thread_name"}


def test_engine_and_trainer_stand_above_trajectories_in_order_of_their_starts() -> None:
    assert list(lanes(SPANS)) == ["engine", "trainer", "a#0", "b#0"]
    names = _thread_names(chrome_trace(SPANS))
    assert [names[thread] for thread in sorted(names)] == ["engine", "trainer", "a#0", "b#0"]


def test_an_event_has_its_track_its_microseconds_and_its_details() -> None:
    trace = chrome_trace(SPANS)
    (tool,) = [event for event in _events(trace, "X") if event["cat"] == "tool"]
    assert _thread_names(trace)[tool["tid"]] == "a#0"
    assert (tool["name"], tool["ts"], tool["dur"]) == ("tool search", 2_000_000.0, 250_000.0)
    assert tool["args"] == {"tool": "search", "shared": False}
    assert len(_events(trace, "X")) == len(SPANS)


def test_spans_that_touch_do_not_overlap_after_rounding() -> None:
    ends = [1000.1 + k / 7 for k in range(500)]
    spans = [Span("generate", "a#0", start, end) for start, end in pairwise(ends)]
    events = _events(chrome_trace(spans), "X")
    for one, other in pairwise(events):
        assert round(1000 * one["ts"]) + round(1000 * one["dur"]) == round(1000 * other["ts"])


def test_counters_count_what_is_under_way() -> None:
    counters = _events(chrome_trace(SPANS), "C")
    running = [(event["ts"] / 1e6, event["args"]["count"]) for event in counters if event["name"] == "running requests"]
    assert running == [(0.5, 1), (1.5, 2), (2.0, 1), (3.0, 0)]
    assert {event["name"] for event in counters} == {"running requests", "waiting requests", "pending tools"}


def test_a_count_does_not_drop_between_spans_that_touch() -> None:
    assert count_steps([Span("tool", "a#0", 0, 1), Span("tool", "a#1", 1, 2)]) == [(0, 1), (2, 0)]


def test_the_file_is_strict_json_whatever_the_details_hold(tmp_path: Path) -> None:
    span = Span("tool", EVIL, 0.0, 1.0, {"tool": EVIL, "ratio": math.nan, "path": Path("x")})
    write_trace(tmp_path / "trace.json", [span])

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    trace = json.loads((tmp_path / "trace.json").read_text(), parse_constant=refuse)
    (event,) = _events(trace, "X")
    assert event["args"] == {"tool": EVIL, "ratio": "nan", "path": "x"}
    with pytest.raises(ValueError):
        json.loads('{"ratio": NaN}', parse_constant=refuse)  # the check can fail


def test_a_step_without_spans_can_be_written(tmp_path: Path) -> None:
    write_trace(tmp_path / "trace.json", [])
    assert _events(json.loads((tmp_path / "trace.json").read_text()), "X") == []
    assert "rect class" not in trace_html([], "empty", {})


class _Page(HTMLParser):
    """Tags, their attributes and the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_a_span_is_drawn_in_its_lane_at_its_time_in_its_colour() -> None:
    rects = _Page(trace_html(SPANS, "step 0", {})).all("rect")
    assert len(rects) == len(SPANS)
    (tool,) = [rect for rect in rects if rect["class"] == "tool"]
    (engine,) = [rect for rect in rects if rect["class"] == "engine"]
    (queue,) = [rect for rect in rects if rect["class"] == "queue"]
    assert (tool["x"], tool["width"]) == ("20.0000%", "2.5000%")  # 2.0 to 2.25 of 10 seconds
    assert tool["y"] == queue["y"] != engine["y"]
    assert "tool search: 0.25 s" in str(tool["data-tip"]) and "shared: False" in str(tool["data-tip"])


def test_the_figures_stand_on_top_and_what_is_unknown_is_a_dash() -> None:
    page = _Page(trace_html(SPANS, "step 7", {"timeline/engine_busy": 0.25, "gpu/energy_j": math.nan}))
    text = "|".join(page.text)
    assert "step 7" in text and "engine_busy|0.25|" in text and "gpu/energy_j|\N{EN DASH}|" in text


def test_nobody_s_text_becomes_markup() -> None:
    hostile = [Span("tool", EVIL, 0, 1, {"tool": EVIL, EVIL: EVIL}), Span("generate", "a#0", 0, 1)]
    page, plain = _Page(trace_html(hostile, EVIL, {EVIL: 1.0})), _Page(trace_html(SPANS, "step 0", {"a": 1.0}))
    assert len(page.all("script")) == len(plain.all("script")) == 1
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in plain.tags}
    allowed = {"class", "x", "y", "width", "height", "data-tip"}
    assert all(set(rect) <= allowed for rect in page.all("rect"))
    assert _Page(f"<p>{EVIL}</p>").all("script")  # the check can fail


def test_the_page_loads_nothing_and_is_ascii() -> None:
    page = trace_html([Span("tool", EVIL, 0, 1)], EVIL, {})
    page.encode("ascii")
    assert not re.search(r"https?:|url\(|@import|\bsrc=|\bhref=", page)


def test_long_details_are_cut() -> None:
    page = trace_html([Span("tool", "a#0", 0, 1, {"argument": "x" * 100_000})], "step 0", {})
    assert len(page) < 20_000
