"""What every benchmark shares: ``pytest benchmarks --figures FILE`` writes the named figures as one flat JSON object.

A benchmark first asserts that both sides agree, then times them in the same run and records figures: one exists only
where its correctness gate passed. It is named ``<kernel>.<what>``, with a unit at the end unless it is a ratio.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
import torch

from .table import Point, Table, write_record

RESULTS = Path(__file__).parent / "results"
FIGURES = pytest.StashKey[dict[str, float]]()
TABLES = pytest.StashKey[list[Table]]()
POINTS = pytest.StashKey[list[Point]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--figures", type=Path, metavar="FILE", help="write the benchmarks' named figures to FILE (JSON)")
    parser.addoption("--record", action="store_true", help="write tables, sweep and versions to RESULTS/<device>.json")
    parser.addoption("--results", type=Path, default=RESULTS, help="folder for --record (default: benchmarks/results)")
    parser.addoption("--sweep", action="store_true", help="also vary N, V and the share of live sequences; long runs")
    parser.addoption("--device", help="cpu or cuda; default: cuda where there is one")


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """No worker processes: what is timed has the machine for itself."""
    return 0


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FIGURES], config.stash[TABLES], config.stash[POINTS] = {}, [], []


def _device(config: pytest.Config) -> torch.device:
    return torch.device(config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu"))


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    """Where the benchmarks run."""
    return _device(pytestconfig)


@pytest.fixture
def figures(pytestconfig: pytest.Config) -> dict[str, float]:
    """Name -> value; put the figures of a benchmark in here, after its correctness gate."""
    return pytestconfig.stash[FIGURES]


@pytest.fixture
def tables(pytestconfig: pytest.Config) -> list[Table]:
    """The tables printed at the end; add yours."""
    return pytestconfig.stash[TABLES]


@pytest.fixture
def points(pytestconfig: pytest.Config) -> list[Point]:
    """The points of the sweep; add yours. Skips the test unless ``--sweep`` is given."""
    if not pytestconfig.getoption("--sweep"):
        pytest.skip("runs with --sweep")
    return pytestconfig.stash[POINTS]


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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, None, None]:
    """Keep the record up to date after every benchmark: what a time limit cuts off then loses the rest only."""
    yield
    config = item.config
    if config.getoption("--record") and (config.stash[TABLES] or config.stash[POINTS]):
        write_record(
            config.getoption("--results"),
            _device(config),
            ["benchmarks", "--record", *(["--sweep"] if config.getoption("--sweep") else [])],  # no paths of a machine
            *(config.stash[TABLES], config.stash[POINTS], config.stash[FIGURES]),
        )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for table in config.stash[TABLES]:
        for line in table.lines():
            terminalreporter.write_line(line)
        terminalreporter.write_line("")
    for name, value in sorted(config.stash[FIGURES].items()):
        terminalreporter.write_line(f"{name}  {value:.4g}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    path: Path | None = session.config.getoption("--figures")
    if path is not None and not session.config.option.collectonly:
        path.write_text(json.dumps(session.config.stash[FIGURES], indent=2, sort_keys=True) + "\n")
