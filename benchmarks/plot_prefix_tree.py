"""Draw the prefix tree's tables: ``python benchmarks/plot_prefix_tree.py benchmarks/results/DEVICE.json OUT.png``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.ticker import LogLocator

PANELS = {"ms": "time, s", "peak_mib": "peak extra memory, GiB", "flops": "operations, TFLOP"}
UNITS = {"ms": 1e3, "peak_mib": 2**10, "flops": 1e12, "formula_flops": 1e12}
BARS = 0.8
"""Share of the room of a shape that its bars take."""


def tree_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of all tables about the prefix tree."""
    return [row for table in record["tables"] for row in table["rows"] if "formula_flops" in row]


def draw(record: dict[str, Any], out: Path) -> None:
    """Time, peak memory and operations of each side, shape by shape; the formula beside what was counted."""
    rows = tree_rows(record)
    sides, shapes = (list(dict.fromkeys(row[key] for row in rows)) for key in ("side", "shape"))
    width = BARS / len(sides)
    figure, panels = pyplot.subplots(len(PANELS), 1, figsize=(9, 9), layout="constrained", sharex=True)
    for panel, (value, label) in zip(panels, PANELS.items(), strict=True):
        for number, side in enumerate(sides):
            mine = [row for row in rows if row["side"] == side and row[value] is not None]
            places = [shapes.index(row["shape"]) + (number + 0.5) * width - BARS / 2 for row in mine]
            panel.bar(places, [row[value] / UNITS[value] for row in mine], width, label=side, color=f"C{number}")
            if value == "flops":
                formula = [row["formula_flops"] / UNITS["formula_flops"] for row in mine]
                panel.plot(places, formula, "k_", markersize=7, label=None if number else "formula")
        panel.set_ylabel(label)
        panel.set_yscale("log")
        panel.minorticks_off()
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.grid(axis="y", alpha=0.3)
    panels[-1].set_xticks(range(len(shapes)), shapes)
    panels[-1].legend(frameon=False, ncols=2)
    versions = record["versions"]
    figure.suptitle(f"forward and backward, 8 samples a prompt: {record['device']}; torch {versions['torch']}")
    figure.savefig(out, dpi=150)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("record", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    record = json.loads(arguments.record.read_text())
    if not tree_rows(record):
        parser.error(f"{arguments.record} holds no prefix tree: run `pytest benchmarks --record --sweep`")
    draw(record, arguments.out)


if __name__ == "__main__":
    main()
