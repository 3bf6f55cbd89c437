"""``policy_loss`` beside its peers along N, V and the share f of live sequences (``--sweep``); ``plot.py`` draws it."""

from __future__ import annotations

import pytest
import torch

from .contest import FLOOR, contest
from .peers import bare_products
from .problem import make_problem
from .sides import LIGER, LIGER_TF32, OURS, PLAIN, TRL, policy_loss_sides
from .table import Point

SIDES = {"cpu": (OURS, PLAIN, LIGER, TRL), "cuda": (OURS, PLAIN, LIGER_TF32[0], TRL)}
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
ROUNDS = 3
SEQUENCES = 8
BASE = {"cpu": {"N": 1024, "D": 512, "V": 16_000, "f": 1.0}, "cuda": {"N": 8192, "D": 3584, "V": 152_064, "f": 1.0}}
AXES = {
    "cpu": {"N": (256, 1024, 4096), "V": (4000, 16_000, 64_000), "f": (0.125, 0.25, 0.5, 1.0)},
    "cuda": {"N": (2048, 8192, 32_768), "V": (32_768, 65_536, 152_064), "f": (0.125, 0.25, 0.5, 0.75, 1.0)},
}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("axis", ["N", "V", "f"])
def test_along(axis: str, device: torch.device, points: list[Point]) -> None:
    sides = [side for side in policy_loss_sides(device) if side.name in SIDES[device.type]]
    for value in AXES[device.type][axis]:
        at = BASE[device.type] | {axis: value}
        rows, hidden, vocabulary = (int(at[letter]) for letter in "NDV")
        problem = make_problem(rows, hidden, vocabulary, SEQUENCES, device=device, dtype=DTYPE[device.type])
        problem = problem.with_live(at["f"])
        table, _ = contest("", problem, sides, bare_products(problem), device=device, rounds=ROUNDS)
        points += [
            Point(axis, rows, hidden, vocabulary, problem.live, row.side, row.ms, row.peak_mib)
            for row in table.rows
            if row.side != FLOOR
        ]
