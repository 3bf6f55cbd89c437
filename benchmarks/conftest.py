"""What every benchmark shares: ``pytest benchmarks --figures FILE`` writes the named figures as one flat JSON object.

A benchmark first asserts that both sides agree, then times them in the same run and records figures: one exists only
where its correctness gate passed. It is named ``<kernel>.<what>``, with a unit at the end unless it is a ratio.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest

FIGURES = pytest.StashKey[dict[str, float]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--figures", type=Path, metavar="FILE", help="write the benchmarks' named figures to FILE (JSON)")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FIGURES] = {}


@pytest.fixture
def figures(pytestconfig: pytest.Config) -> dict[str, float]:
    """Name -> value; put the figures of a benchmark in here, after its correctness gate."""
    return pytestconfig.stash[FIGURES]


@pytest.fixture
def median_seconds() -> Callable[..., dict[str, float]]:
    """``median_seconds(rounds, name=function, ...)``: the median of each function's time, the functions taking turns.

    Taking turns lets a slow moment of the machine hit all sides alike. A function on a GPU must end in a sync.
    """

    def measure(rounds: int, **functions: Callable[[], object]) -> dict[str, float]:
        seconds: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(rounds):
            for name, function in functions.items():
                start = time.perf_counter()
                function()
                seconds[name].append(time.perf_counter() - start)
        return {name: statistics.median(values) for name, values in seconds.items()}

    return measure


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for name, value in sorted(config.stash[FIGURES].items()):
        terminalreporter.write_line(f"{name}  {value:.4g}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    path: Path | None = session.config.getoption("--figures")
    if path is not None and not session.config.option.collectonly:
        path.write_text(json.dumps(session.config.stash[FIGURES], indent=2, sort_keys=True) + "\n")
