"""``policy_loss`` beside its peers: time against the bare matrix products, peak memory, error against float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from .contest import FLOOR, contest
from .meter import Call, Measurement
from .peers import bare_products, our_loss
from .problem import HEADLINE, SHAPES, Problem, Shape, of_shape
from .sides import COMPILED, LIGER, LIGER_COMPILED, LIGER_TF32, OURS, PLAIN, TRL, policy_loss_sides, training
from .table import Table

LIVE = (0.25, 0.6)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_policy_loss_beside_its_peers(
    shape: Shape, device: torch.device, figures: dict[str, float], tables: list[Table]
) -> None:
    if shape.device != device.type:
        pytest.skip(f"a problem for {shape.device}, this is {device.type}")
    problem = of_shape(shape)
    table, found = contest(
        *(f"policy_loss, forward and backward; {shape}", problem, policy_loss_sides(device), bare_products(problem)),
        device=device,
        rounds=shape.rounds,
        extra=variants(problem),
    )
    tables.append(table)
    if shape.name in HEADLINE:
        figures.update(figures_of(found))


def live_name(share: float) -> str:
    return f"{OURS}, {share:.0%} live"


def variants(problem: Problem) -> dict[str, Call]:
    """What ours can leave out: sequences without advantage, the head's gradient, all gradients."""
    step = training(our_loss)
    return {
        **{live_name(share): partial(step, problem.with_live(share)) for share in LIVE},
        f"{OURS}, frozen head": partial(step, problem.with_frozen_head()),
        f"{OURS}, no gradient": partial(torch.no_grad()(our_loss), problem),
    }


def figures_of(found: dict[str, Measurement]) -> dict[str, float]:
    """The named figures; one whose side was left out is missing."""
    ours = found[OURS]
    figures = {
        "floor_ratio": ours.over(found[FLOOR]),
        "ms": ours.ms,
        "live25_vs_full": found[live_name(0.25)].over(ours),
    }
    peers = {"trl": TRL, "naive": PLAIN, "compiled": COMPILED}
    peers |= {"liger_uncompiled": LIGER, "liger_compiled": LIGER_COMPILED}
    figures |= {f"speedup_vs_{key}": found[name].over(ours) for key, name in peers.items() if name in found}
    ligers = [found[name].over(ours) for name in (LIGER, LIGER_COMPILED, *LIGER_TF32) if name in found]
    if ligers:
        figures["speedup_vs_liger"] = min(ligers)
    if ours.peak_mib is not None:
        figures["peak_mib"] = ours.peak_mib
        if PLAIN in found and found[PLAIN].peak_mib:
            figures["peak_vs_naive"] = ours.peak_mib / found[PLAIN].peak_mib
    return {f"policy_loss.{name}": value for name, value in figures.items()}
