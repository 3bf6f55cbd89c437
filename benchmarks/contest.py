"""All sides of one problem: first the gate, then time and memory, turn by turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from .accuracy import gate
from .meter import Call, Measurement, measure
from .problem import Problem
from .sides import PLAIN, Side
from .table import Table, row

GATE_ROWS = 256
FLOOR = "floor: bare products"


def contest(
    title: str,
    problem: Problem,
    sides: Sequence[Side],
    floor: Call,
    *,
    device: torch.device,
    rounds: int,
    extra: Mapping[str, Call] | None = None,
) -> tuple[Table, dict[str, Measurement]]:
    """Gate the sides, then measure them, the ``floor`` that times are divided by, and ``extra`` calls.

    A peer that does not pass is left out, with the reason in the table; ours must pass.
    """
    table = Table(title)
    torch.compiler.reset()
    for side in sides:
        if side.cuda_only and device.type != "cuda":
            table.left_out[side.name] = "runs on CUDA only"
    taking_part = {side.name: side for side in sides if side.name not in table.left_out}
    ratios = gate(
        {name: side.step for name, side in taking_part.items()},
        {name for name, side in taking_part.items() if side.is_ours},
        taking_part[PLAIN].step,
        problem.part(GATE_ROWS),
        table.left_out,
    )
    calls: dict[str, Call] = {name: partial(taking_part[name].step, problem) for name in ratios}
    found = measure({FLOOR: floor, **calls, **(extra or {})}, rounds, device, problem.forget_gradients, table.left_out)
    problem.forget_gradients()
    for name, measurement in found.items():
        table.rows.append(row(name, measurement, found[FLOOR], ratios.get(name)))
    return table, found
