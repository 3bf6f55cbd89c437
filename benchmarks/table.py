"""What a benchmark found, as lines for the terminal and as a record for ``plot.py`` and whoever compares later."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import arft_fast

from .meter import Measurement

PACKAGES = ("torch", "triton", "trl", "liger-kernel", "verl", "transformers")


@dataclass(frozen=True)
class Row:
    """One side. ``floor_ratio``: time over that of the bare products; ``error_ratio``: error over PyTorch's."""

    side: str
    ms: float
    samples_ms: tuple[float, ...]
    floor_ratio: float
    peak_mib: float | None
    error_ratio: float | None


@dataclass
class Table:
    """One problem, all sides; ``left_out`` says why a side has no row."""

    title: str
    rows: list[Row] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def lines(self) -> Iterable[str]:
        width = max((len(row.side) for row in self.rows), default=0)
        yield self.title
        yield f"  {'side':{width}}  {'ms':>9}  {'fastest':>9}  {'x floor':>7}  {'peak MiB':>8}  {'x error':>7}"
        for row in self.rows:
            cells = (f"{row.floor_ratio:7.2f}", _cell(row.peak_mib, 8, 0), _cell(row.error_ratio, 7, 2))
            yield f"  {row.side:{width}}  {row.ms:9.2f}  {min(row.samples_ms):9.2f}  {'  '.join(cells)}"
        for name, reason in self.left_out.items():
            yield f"  {name}: left out ({reason})"


def _cell(value: float | None, width: int, digits: int) -> str:
    return f"{'-' if value is None else format(value, f'.{digits}f'):>{width}}"


def row(side: str, found: Measurement, floor: Measurement, error_ratio: float | None) -> Row:
    """A row of measurements."""
    peak = None if found is floor else found.peak_mib
    return Row(side, found.ms, found.samples_ms, found.over(floor), peak, error_ratio)


@dataclass(frozen=True)
class Point:
    """One side at one point of a sweep along ``axis``: ``"N"``, ``"V"`` or ``"f"`` (share of live sequences)."""

    axis: str
    rows: int
    hidden: int
    vocabulary: int
    live: float
    side: str
    ms: float
    peak_mib: float | None


def device_name(device: torch.device) -> str:
    """As the maker calls it; a CPU with the number of torch's threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M) if cpuinfo.is_file() else []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str | None]:
    """Of what was measured; None: not installed."""
    found: dict[str, str | None] = {"arft_fast": arft_fast.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def write_record(
    folder: Path,
    device: torch.device,
    arguments: Sequence[str],
    tables: Sequence[Table],
    points: Sequence[Point],
    figures: dict[str, float],
) -> Path:
    """Write everything to ``<device-name>.json``; returns where."""
    name = device_name(device)
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower().replace("(r)", "").replace("(tm)", "")).strip("-")
    record = {
        "device": name,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],  # above the threads: others disturbed the timing
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["pytest", *arguments]),
        "versions": versions(),
        "figures": dict(sorted(figures.items())),
        "tables": [asdict(table) for table in tables],
        "sweep": [asdict(point) for point in points],
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{slug}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path
