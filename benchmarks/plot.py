"""Draw the sweep of a record: ``python benchmarks/plot.py benchmarks/results/DEVICE.json OUT.png``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.ticker import LogLocator

PANELS = {"N": ("rows", "rows N"), "V": ("vocabulary", "vocabulary V"), "f": ("live", "share of live sequences f")}
VALUES = {"ms": "time, ms", "peak_mib": "peak extra memory, MiB"}
FIXED = {"N": ("hidden", "vocabulary"), "V": ("rows", "hidden"), "f": ("rows", "hidden", "vocabulary")}
LETTERS = {"rows": "N", "hidden": "D", "vocabulary": "V"}


def draw(record: dict[str, Any], out: Path) -> None:
    """Time and peak memory against N, V and f, one line a side."""
    sides = list(dict.fromkeys(point["side"] for point in record["sweep"]))
    figure, panels = pyplot.subplots(len(VALUES), len(PANELS), figsize=(12, 6.5), layout="constrained")
    for column, (axis, (key, label)) in enumerate(PANELS.items()):
        points = [point for point in record["sweep"] if point["axis"] == axis]
        for line, (value, name) in enumerate(VALUES.items()):
            panel = panels[line][column]
            for number, side in enumerate(sides):
                found = sorted((p[key], p[value]) for p in points if p["side"] == side and p[value] is not None)
                if found:
                    width = 2.5 if number == 0 else 1.5
                    panel.plot(*zip(*found, strict=True), "o-", color=f"C{number}", label=side, linewidth=width)
            panel.set_xlabel(label)
            panel.set_ylabel(name)
            panel.grid(alpha=0.3)
            if axis == "f":
                panel.set_xlim(left=0)
                panel.set_ylim(bottom=0)
            else:
                panel.set_xscale("log")
                panel.set_yscale("log")
                values = sorted({point[key] for point in points})
                panel.set_xticks(values, [f"{value:,}" for value in values])
                panel.minorticks_off()
                panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                panel.yaxis.set_major_formatter("{x:,.0f}")
        if points:
            fixed = "  ".join(f"{LETTERS[name]}={points[0][name]:,}" for name in FIXED[axis])
            panels[0][column].set_title(fixed, fontsize="medium")
    panels[0][0].legend(frameon=False)
    versions = record["versions"]
    shown = ", ".join(f"{name} {versions[name]}" for name in ("torch", "trl", "liger-kernel") if versions[name])
    figure.suptitle(f"policy_loss, forward and backward: {record['device']}; {shown}")
    figure.savefig(out, dpi=150)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("record", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    record = json.loads(arguments.record.read_text())
    if not record["sweep"]:
        parser.error(f"{arguments.record} holds no sweep: run `pytest benchmarks --record --sweep`")
    draw(record, arguments.out)


if __name__ == "__main__":
    main()
