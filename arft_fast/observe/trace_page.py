"""A step's timeline as one self-contained page: a lane for each trajectory, coloured by what it was doing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any, get_args

from arft_fast.observe.timeline import Kind, Span
from arft_fast.observe.trace import COUNTERS, count_steps, lanes, span_name

_ROW = 15
"""Height of a lane in pixels."""
_TIP_CHARACTERS = 300


def trace_html(spans: Sequence[Span], title: str, figures: Mapping[str, float]) -> str:
    """The page: figures on top, then counts of requests and tools over time, then the lanes; nothing is loaded.

    Lanes stand in the order of ``trace.lanes``. Hovering shows a span's details, Ctrl and the wheel zoom. Names and
    details may be anybody's text: they are escaped, and the page is ASCII.

    Args:
        figures: shown as they are; a common ``timeline/`` in front of a name is left out, nan is a dash.
    """
    tracks = lanes(spans)
    origin = min((span.start for span in spans), default=0.0)
    seconds = max((span.end for span in spans), default=0.0) - origin or 1.0
    page = Template(Path(__file__).with_name("trace.html").read_text(encoding="utf-8")).substitute(
        title=escape(title),
        figures="".join(
            f"<div><dt>{escape(name.removeprefix('timeline/'))}</dt><dd>{_number(value)}</dd></div>"
            for name, value in figures.items()
        ),
        legend="".join(
            f'<span class="key {kind}" data-kind="{kind}"><i></i>{kind}</span>' for kind in get_args(Kind)
        ),
        only="\n".join(
            f'#chart[data-only="{kind}"] rect.{kind} {{ opacity: 1; }}' for kind in get_args(Kind)
        ),
        counts="\n".join(_count(spans, kind, name, origin, seconds) for kind, name in COUNTERS.items()),
        lanes=len(tracks),
        names="".join(f'<div title="{escape(track)}">{escape(track)}</div>' for track in tracks),
        rects="\n".join(
            _rect(span, row, origin, seconds)
            for row, own in enumerate(tracks.values())
            for span in own
            if span.seconds > 0
        ),
        seconds=repr(seconds),
        height=_ROW * len(tracks),
        row=_ROW,
        row2=2 * _ROW,
    )  # fmt: skip
    return page.encode("ascii", "xmlcharrefreplace").decode("ascii")


def _rect(span: Span, row: int, origin: float, seconds: float) -> str:
    x, width = 100 * (span.start - origin) / seconds, 100 * span.seconds / seconds
    return (
        f'<rect class="{span.kind}" x="{x:.4f}%" width="{width:.4f}%" y="{_ROW * row + 2}" height="{_ROW - 4}" '
        f'data-tip="{escape(_tip(span, origin))}"/>'
    )


def _tip(span: Span, origin: float) -> str:
    lines = [
        f"{span_name(span)}: {span.seconds:.4g} s",
        f"{span.start - origin:.4f} to {span.end - origin:.4f} s, {span.track}",
        *(f"{name}: {_value(value)}" for name, value in span.detail.items()),
    ]
    return "\n".join(line[:_TIP_CHARACTERS] for line in lines)


def _count(spans: Sequence[Span], kind: Kind, name: str, origin: float, seconds: float) -> str:
    """A strip that shows how many spans of ``kind`` are under way."""
    steps = count_steps(span for span in spans if span.kind == kind)
    most = max((count for _, count in steps), default=0)
    path = "M0 {0}" + "".join(f"H{moment - origin:.6f}V{most - count}" for moment, count in steps)
    return (
        f'<div class="label count">{name} <small>up to {most}</small></div>'
        f'<svg class="count {kind}" viewBox="0 0 {seconds:.6f} {max(most, 1)}" preserveAspectRatio="none">'
        f'<path d="{path.format(most)}Z"/></svg>'
    )


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "&ndash;"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
