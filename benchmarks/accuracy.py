"""The gate before any timing: every side must find what float64 finds, up to its precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .problem import Problem

OURS_AT_MOST = 3.0
"""Times the error of plain PyTorch in the same precision: what ours may have."""
PEERS_AT_MOST = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 1e-1}
"""Relative error above which a peer does not compute the same thing; it is then left out of the table."""
LOSS_AT_MOST = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Of the loss, absolute: it may be near 0."""


class Outcome(NamedTuple):
    """What a side finds."""

    loss: Tensor
    """0-dim; for scoring, the mean log-prob."""
    tensors: dict[str, Tensor]
    """The gradients of hidden [N, D] and weight [V, D]; for scoring, log-probs and entropy [N]."""


class Errors(NamedTuple):
    """Distances from float64: of the loss absolute, of the tensors relative (root mean squares)."""

    loss: float
    tensors: dict[str, float]


Step = Callable[[Problem], Outcome]


def errors_of(step: Step, problem: Problem, truth: Outcome) -> Errors:
    """How far ``step`` is from the truth on ``problem``, whose gradients are freed again."""
    problem.forget_gradients()
    found = step(problem)
    problem.forget_gradients()
    distances = {
        name: float((found.tensors[name].double() - exact).norm() / exact.norm())
        for name, exact in truth.tensors.items()
    }
    return Errors(float((found.loss.double() - truth.loss).abs()), distances)


def check_ours(name: str, errors: Errors, plain: Errors, dtype: torch.dtype) -> None:
    """Fail loudly: ours is as exact as PyTorch."""
    assert errors.loss <= LOSS_AT_MOST[dtype], f"{name}: the loss is off by {errors.loss:.2e}"
    for tensor, error in errors.tensors.items():
        ratio = error / plain.tensors[tensor]
        assert ratio <= OURS_AT_MOST, f"{name}: {tensor} has {ratio:.2f} times the error of PyTorch"


def why_not(errors: Errors, dtype: torch.dtype) -> str | None:
    """Why a peer is not comparable, or None."""
    if not errors.loss <= LOSS_AT_MOST[dtype]:
        return f"another loss: off by {errors.loss:.1e}"
    name = max(errors.tensors, key=lambda tensor: errors.tensors[tensor])
    worst = errors.tensors[name]
    return None if worst <= PEERS_AT_MOST[dtype] else f"another {name}: relative error {worst:.1e}"


def gate(
    steps: Mapping[str, Step], ours: set[str], plain: Step, problem: Problem, left_out: dict[str, str]
) -> dict[str, float]:
    """Run every side on a small problem; the error of its first tensor, over that of ``plain``, for those that pass.

    A peer that cannot run here or finds something else goes to ``left_out`` with the reason; ours must pass.
    """
    truth = plain(problem.to(torch.float64))
    reference = errors_of(plain, problem, truth)
    first = next(iter(truth.tensors))
    dtype, ratios = problem.hidden.dtype, {}
    for name, step in steps.items():
        if name in ours:
            errors = errors_of(step, problem, truth)
            check_ours(name, errors, reference, dtype)
        else:
            try:
                errors = errors_of(step, problem, truth)
            except Exception as error:  # whatever a peer raises becomes a line of the table
                left_out[name] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:120]}"
                continue
            reason = why_not(errors, dtype)
            if reason is not None:
                left_out[name] = reason
                continue
        ratios[name] = errors.tensors[first] / reference.tensors[first]
    return ratios
