"""What a benchmark found, as lines for the terminal and as a record for ``plot.py`` and whoever compares later."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import arft_fast

from .meter import Measurement

PACKAGES = ("torch", "triton", "trl", "liger-kernel", "verl", "transformers", "tantivy")


@dataclass(frozen=True)
class Entry:
    """One side."""

    side: str
    ms: float
    samples_ms: tuple[float, ...]
    peak_mib: float | None

    def cells(self) -> Mapping[str, str]:
        """Its line of the table: heading -> value, the same headings for all of a table's entries."""
        return {"ms": cell(self.ms, 2), "fastest": cell(min(self.samples_ms), 2)}


@dataclass(frozen=True)
class Row(Entry):
    """``floor_ratio``: time over that of the bare products; ``error_ratio``: error over PyTorch's."""

    floor_ratio: float
    error_ratio: float | None

    def cells(self) -> Mapping[str, str]:
        return {
            **super().cells(),
            "x floor": cell(self.floor_ratio, 2),
            "peak MiB": cell(self.peak_mib, 0),
            "x error": cell(self.error_ratio, 2),
        }


@dataclass
class Table:
    """One problem, all sides; ``left_out`` says why a side has no row."""

    title: str
    rows: list[Entry] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def lines(self) -> Iterable[str]:
        yield self.title
        lines = [{"side": row.side, **row.cells()} for row in self.rows]
        headings = {heading: heading for line in lines for heading in line}
        widths = {heading: max(len(line[heading]) for line in (headings, *lines)) for heading in headings}
        for line in [headings, *lines] if lines else []:
            cells = (f"{line[heading]:{'<' if heading == 'side' else '>'}{width}}" for heading, width in widths.items())
            yield f"  {'  '.join(cells)}"
        for name, reason in self.left_out.items():
            yield f"  {name}: left out ({reason})"


def cell(value: float | None, digits: int) -> str:
    """A number as it stands in a table, ``-`` for None."""
    return "-" if value is None else f"{value:,.{digits}f}"


def row(side: str, found: Measurement, floor: Measurement, error_ratio: float | None) -> Row:
    """A row of measurements."""
    peak = None if found is floor else found.peak_mib
    return Row(side, found.ms, found.samples_ms, peak, found.over(floor), error_ratio)


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
