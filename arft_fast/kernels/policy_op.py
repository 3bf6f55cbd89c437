"""``policy_loss`` in one pass as a ``torch.library`` operator: loss and gradients of all chunks in the forward pass."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from . import checks, reference
from .dispatch import Chosen
from .head import Head, Needs, policy_gradients, score
from .linear_logprob import empty_gradients
from .objective import Objective, Rows, known_without_gradient, policy_terms, row_problem, weighted_sum
from .rows import Transform
from .shared_rows import merge, read, read_by


def fused_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    bias: Tensor | None,
    transform: Transform,
    rows: Rows,
    objective: Objective,
    measure_all: bool,
    chunk_bytes: int,
    chosen: Chosen,
    row_index: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss of an objective that single rows decide (``row_problem``, ``stand_for_terms``), arguments checked.

    Returns:
        loss 0-dim, differentiable; logprobs and entropy [N] and the rows' coefficient [M], 0 where not computed;
        computed [N] bool.
    """
    grad = torch.is_grad_enabled()
    needs = [grad and operand is not None and operand.requires_grad for operand in (hidden, weight, bias)]
    loss, logprobs, entropy, coefficient, computed, *_ = torch.ops.arft_fast.policy_loss(
        *(hidden, weight, token_ids, bias, *rows),
        *(list(transform), objective.to_numbers(), measure_all, needs, chunk_bytes, chosen, row_index),
    )
    return loss, logprobs, entropy, coefficient, computed


@torch.library.custom_op("arft_fast::policy_loss", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    bias: Tensor | None,
    advantage: Tensor,
    scale: Tensor,
    sequence: Tensor,
    lengths: Tensor,
    old: Tensor | None,
    ref: Tensor | None,
    sampler: Tensor | None,
    sampler_weight: Tensor | None,
    transform: list[float],
    objective: list[float],
    measure_all: bool,
    needs: list[bool],
    chunk_bytes: int,
    chosen: str,
    row_index: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    checks.token_range("token_ids", token_ids, weight.shape[0])
    if row_index is not None:
        checks.row_range("row_index", row_index, len(hidden))
    head = Head(hidden, weight, token_ids, bias, Transform(*transform), chunk_bytes, cast(Chosen, chosen))
    rows = Rows(advantage, scale, sequence, lengths, old, ref, sampler, sampler_weight)
    settings = Objective.from_numbers(objective)
    problem = row_problem(rows, settings)
    assert problem is not None, "fused_policy_loss takes objectives that single rows decide"

    terms, wanted = ~known_without_gradient(rows, settings), Needs(*needs)
    live, vectors = merge(*problem, row_index, terms, len(hidden))
    computed = scale != 0 if measure_all else terms & read(live, row_index)
    measured = read_by(computed, row_index, len(hidden))
    if any(wanted):
        logprobs, entropy, coefficient, gradients = policy_gradients(head, wanted, _selected(live), problem[0], vectors)
        if measure_all:
            rest = score(head, _selected(measured & ~live))
            logprobs, entropy = logprobs + rest[0], entropy + rest[1]  # each 0 where the other is not
        collected = gradients.collect(hidden, weight, bias)
    else:
        logprobs, entropy = score(head, _selected(measured))
        coefficient, collected = torch.zeros_like(logprobs), empty_gradients(hidden, weight, bias, wanted)
    logprobs, entropy = (read(values, row_index, computed) for values in (logprobs, entropy))
    loss = weighted_sum(policy_terms(logprobs, entropy, rows, settings).loss, rows)
    return loss, logprobs, entropy, coefficient, computed, *collected


def _selected(mask: Tensor) -> Tensor | None:
    """Row numbers where ``mask`` [N] holds; None for all rows, which saves copying them."""
    index = mask.nonzero()[:, 0]
    return None if len(index) == len(mask) else index


@_forward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    bias: Tensor | None,
    advantage: Tensor,
    scale: Tensor,
    sequence: Tensor,
    lengths: Tensor,
    old: Tensor | None,
    ref: Tensor | None,
    sampler: Tensor | None,
    sampler_weight: Tensor | None,
    transform: list[float],
    objective: list[float],
    measure_all: bool,
    needs: list[bool],
    chunk_bytes: int,
    chosen: str,
    row_index: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    coefficient = hidden.new_empty(hidden.shape[0], dtype=reference.compute_dtype(hidden, weight))
    logprobs = coefficient.new_empty(scale.shape[0])
    computed = torch.empty_like(logprobs, dtype=torch.bool)
    gradients = empty_gradients(hidden, weight, bias, Needs(*needs))
    return logprobs.new_empty(()), logprobs, torch.empty_like(logprobs), coefficient, computed, *gradients


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # or a zero is made for each gradient, in the size of the weight
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[5:])


def _gradient(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 19
    needed = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    hidden, weight, bias = (
        scaled(gradient, grad_loss) if need else None for gradient, need in zip(ctx.saved_tensors, needed, strict=True)
    )
    return hidden, weight, None, bias, *[None] * 15


def scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """``gradient * factor``; without a pass over it where the factor can be seen to be 1 for free."""
    if checks.on_host(factor) and float(factor) == 1.0:
        return gradient
    return gradient * factor.to(gradient.dtype)


_forward.register_autograd(_gradient, setup_context=_setup_context)
