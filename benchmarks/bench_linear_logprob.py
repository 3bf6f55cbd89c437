"""``linear_logprob`` beside its peers: scoring, and forward and backward with and without a stash."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from .contest import FLOOR, contest
from .peers import bare_products
from .problem import HEADLINE, SHAPES, Problem, Shape, of_shape
from .sides import OURS, PLAIN, RECOMPUTE, STASH, TRL, linear_logprob_sides
from .table import Table

CPU_ROWS = 1024
"""Fewer than in ``policy_loss``, to save time; the default stash then holds half of them."""


def problem_of(shape: Shape, device: torch.device) -> tuple[Shape, Problem]:
    if shape.device != device.type:
        pytest.skip(f"a problem for {shape.device}, this is {device.type}")
    problem = of_shape(shape)
    if shape.device == "cpu":
        return replace(shape, rows=CPU_ROWS), problem.part(CPU_ROWS)
    return shape, problem


@pytest.mark.timeout(900)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_forward_and_backward_beside_the_peers(
    shape: Shape, device: torch.device, figures: dict[str, float], tables: list[Table]
) -> None:
    shape, problem = problem_of(shape, device)
    sides = linear_logprob_sides(device, gradient=True)
    table, found = contest(
        *(f"linear_logprob, forward and backward; {shape}", problem, sides, bare_products(problem)),
        device=device,
        rounds=shape.rounds,
    )
    tables.append(table)
    if shape.name not in HEADLINE:
        return
    ours, floor = found[OURS], found[FLOOR]
    figures["linear_logprob.floor_ratio_stash"] = found[STASH].over(floor)
    figures["linear_logprob.floor_ratio_recompute"] = found[RECOMPUTE].over(floor)
    for key, name in {"trl": TRL, "naive": PLAIN}.items():
        if name in found:
            figures[f"linear_logprob.speedup_vs_{key}"] = found[name].over(ours)
    if ours.peak_mib is not None and PLAIN in found and found[PLAIN].peak_mib:
        figures["linear_logprob.peak_vs_naive"] = ours.peak_mib / found[PLAIN].peak_mib


@pytest.mark.timeout(900)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_scoring_beside_the_peers(
    shape: Shape, device: torch.device, figures: dict[str, float], tables: list[Table]
) -> None:
    shape, problem = problem_of(shape, device)
    sides = linear_logprob_sides(device, gradient=False)
    table, found = contest(
        *(f"linear_logprob, scoring; {shape}", problem, sides, bare_products(problem, products=1)),
        device=device,
        rounds=shape.rounds,
    )
    tables.append(table)
    if shape.name in HEADLINE:
        figures["linear_logprob.floor_ratio_score"] = found[OURS].over(found[FLOOR])
