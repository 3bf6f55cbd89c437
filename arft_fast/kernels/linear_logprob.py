"""Log-probs of sampled tokens from hidden states. Dimension letters: N rows, D hidden, V vocabulary, S stashed rows."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from . import checks, reference
from .dispatch import Chosen, Impl, head_impl
from .head import Head, Needs, default_chunk_bytes, given_gradients, rows_within, score
from .rows import Transform


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_bytes: int | None = None,
    stash_bytes: int | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """``logp[i, token_ids[i]]`` with ``logp = log_softmax((hidden @ weight.T + bias) / temperature)``, and the entropy.

    ``entropy[i] = -sum_v exp(logp[i, v]) * logp[i, v]`` in nats, of the distribution that was sampled from (bias and
    temperature included). Differentiable once in ``hidden``, ``weight`` and ``bias``, both outputs, so any loss can
    follow.

    The logits [N, V] are never materialised: rows go through in chunks. The backward pass takes the logits of the
    first rows from a stash and computes the others again: 3 products of 2 N V D operations with everything stashed, 4
    with nothing, 1 without a gradient. Rows whose incoming gradient is zero cost nothing in the backward pass. Both
    passes see the same logits. Statistics run in float32 (float64 if an operand is float64), whatever autocast says;
    so do sums over rows, rounded once to the dtype of ``weight``.

    Args:
        hidden: [N, D] floating, the rows that predict ``token_ids`` (already shifted by the caller).
        weight: [V, D] floating, as ``lm_head.weight``; whole, not sharded.
        token_ids: [N] int64 or int32 in 0 .. V - 1.
        bias: [V] added to the products; -inf forbids an id. Give the sampler the same one and the two agree. Forbidden
            ids count 0 in entropy and gradient; a forbidden ``token_ids[i]`` has log-prob -inf.
        temperature: the sampler's, > 0.
        softcap: ``softcap * tanh(logits / softcap)`` before the temperature (Gemma 2, arXiv 2408.00118, section 2).
        logit_scale: factor of the logits before the cap (Cohere's models).
        chunk_bytes: budget of one chunk of logits, one row at least; None: 64 MiB on a CPU, 1.75 GiB on CUDA.
        stash_bytes: budget of the logits kept for the backward pass; None: as much as one chunk.
        impl: ``"triton"``, ``"native"``, ``"reference"`` (plain PyTorch) or ``"auto"``; see ``head_impl``.

    Returns:
        logprobs [N], entropy [N]: float64 if ``hidden`` or ``weight`` is, else float32.

    Raises:
        TypeError: a dtype or type is wrong.
        ValueError: a shape, device or value is wrong. Values of tensors are read on a CPU only; on CUDA an id out of
            range ends in NaN.
        RuntimeError: ``impl`` is not available here.
    """
    arguments = checks.Arguments()
    checks.head(arguments, hidden, weight, token_ids, bias)
    transform = checks.transform(temperature, softcap, logit_scale)
    chunk_bytes, stash_bytes = checks.budgets(chunk_bytes, stash_bytes, default_chunk_bytes(hidden))
    chosen = head_impl(hidden, impl)
    if chosen == "reference":
        return reference.linear_logprob(hidden, weight, token_ids, bias, transform, chunk_bytes)
    return fused_logprob(hidden, weight, token_ids, bias, transform, chunk_bytes, stash_bytes, chosen)


def fused_logprob(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    bias: Tensor | None,
    transform: Transform,
    chunk_bytes: int,
    stash_bytes: int,
    chosen: Chosen,
) -> tuple[Tensor, Tensor]:
    """``linear_logprob`` by a row kernel, on arguments that were checked."""
    operands = (hidden, weight) if bias is None else (hidden, weight, bias)
    if not (torch.is_grad_enabled() and any(operand.requires_grad for operand in operands)):
        stash_bytes = 0
    logprobs, entropy, _ = torch.ops.arft_fast.linear_logprob(
        hidden, weight, token_ids, bias, list(transform), chunk_bytes, stash_bytes, chosen
    )
    return logprobs, entropy


@torch.library.custom_op("arft_fast::linear_logprob", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    bias: Tensor | None,
    transform: list[float],
    chunk_bytes: int,
    stash_bytes: int,
    chosen: str,
) -> tuple[Tensor, Tensor, Tensor]:
    checks.token_range("token_ids", token_ids, weight.shape[0])
    head = Head(hidden, weight, token_ids, bias, Transform(*transform), chunk_bytes, cast(Chosen, chosen))
    stash = _empty_stash(hidden, weight, stash_bytes, head.logits_dtype)
    return *score(head, None, stash), stash


@_forward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    bias: Tensor | None,
    transform: list[float],
    chunk_bytes: int,
    stash_bytes: int,
    chosen: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = reference.compute_dtype(hidden, weight)
    row = hidden.new_empty(hidden.shape[0], dtype=dtype)
    return row, torch.empty_like(row), _empty_stash(hidden, weight, stash_bytes, dtype)


def _empty_stash(hidden: Tensor, weight: Tensor, stash_bytes: int, dtype: torch.dtype) -> Tensor:
    """[S, V] with as many rows as the budget holds."""
    fits = 0 if stash_bytes == 0 else rows_within(stash_bytes, weight.shape[0], dtype)
    return hidden.new_empty((min(hidden.shape[0], fits), weight.shape[0]), dtype=dtype)


@torch.library.custom_op("arft_fast::linear_logprob_backward", mutates_args=())
def _backward(
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    stash: Tensor,
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    bias: Tensor | None,
    transform: list[float],
    chunk_bytes: int,
    needs: list[bool],
    chosen: str,
) -> tuple[Tensor, Tensor, Tensor]:
    head = Head(hidden, weight, token_ids, bias, Transform(*transform), chunk_bytes, cast(Chosen, chosen))
    gradients = given_gradients(head, Needs(*needs), grad_logprobs, grad_entropy, stash)
    return gradients.collect(hidden, weight, bias)


@_backward.register_fake
def _(
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    stash: Tensor,
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    bias: Tensor | None,
    transform: list[float],
    chunk_bytes: int,
    needs: list[bool],
    chosen: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(hidden, weight, bias, Needs(*needs))


def empty_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Needs) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised tensors of the shapes that ``Gradients.collect`` returns."""

    def like(operand: Tensor | None, needed: bool) -> Tensor:
        return hidden.new_empty(0) if operand is None or not needed else operand.new_empty(operand.shape)

    return like(hidden, needs.hidden), like(weight, needs.weight), like(bias, needs.bias)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, token_ids, bias, transform, chunk_bytes, _, chosen = inputs
    stash = output[2]
    ctx.set_materialize_grads(False)  # or a zero is made for the stash
    ctx.mark_non_differentiable(stash)
    ctx.save_for_backward(hidden, weight, token_ids, bias, stash)
    ctx.settings = transform, chunk_bytes, chosen


def _gradient(
    ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    given = grad_entropy if grad_logprobs is None else grad_logprobs
    if given is None:
        return (None,) * 8
    grad_logprobs = torch.zeros_like(given) if grad_logprobs is None else grad_logprobs
    hidden, weight, token_ids, bias, stash = ctx.saved_tensors
    transform, chunk_bytes, chosen = ctx.settings
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    gradients = torch.ops.arft_fast.linear_logprob_backward(
        *(grad_logprobs, grad_entropy, stash, hidden, weight, token_ids, bias, transform, chunk_bytes, needs, chosen)
    )
    hidden, weight, bias = (gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
    return hidden, weight, None, bias, None, None, None, None


_forward.register_autograd(_gradient, setup_context=_setup_context)
