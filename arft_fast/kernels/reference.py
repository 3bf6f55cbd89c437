"""The definitions of the three kernels in plain PyTorch: what correct means, in any floating dtype, on any device.

Nothing is checked here; call the public functions of the same names with ``impl="reference"``.

Dimension letters: N rows (tokens that the policy sampled), D hidden, V vocabulary, B sequences, P groups, K reward
components.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 64 * 2**20
"""Default budget of one chunk of logits; a few temporaries of the same size live beside it."""

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-this before ``exp``: e^20 is finite in float32, and no honest ratio comes near it."""

Scale = Literal["group", "batch", "none"]
Reduction = Literal["grpo", "dapo"]


@torch.no_grad()
def group_advantage(
    rewards: Tensor, offsets: Tensor, weights: Tensor | None, scale: Scale, epsilon: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(r - mean) / (std + epsilon)`` of each group; see ``arft_fast.group_advantage``.

    Args:
        rewards: [B, K] float32 or float64, NaN where a component does not apply.
        offsets: [P + 1] int64.
        weights: [K] in the dtype of ``rewards``, or None for ones.

    Returns:
        advantages [B], mean [P], std [P] in the dtype of ``rewards``; no_signal [P] bool.
    """
    # Sums in float64; the reward itself is rounded to its dtype, so that rows tie whose components add up to the same.
    weighted = rewards.double() if weights is None else rewards.double() * weights.double()
    reward = weighted.nansum(dim=1).to(rewards.dtype).double()
    valid = ~rewards.isnan().all(dim=1)
    groups = offsets.numel() - 1
    group = torch.repeat_interleave(
        torch.arange(groups, device=rewards.device), offsets.diff(), output_size=rewards.shape[0]
    )

    def per_group(value: Tensor) -> Tensor:
        return rewards.new_zeros(groups, dtype=torch.float64).index_add(0, group, value * valid)

    def extreme(reduce: str, start: float) -> Tensor:
        start_values = rewards.new_full((groups,), start, dtype=torch.float64)
        return start_values.scatter_reduce(0, group, torch.where(valid, reward, start), reduce)

    count = per_group(torch.ones_like(reward))
    low, high = extreme("amin", math.inf), extreme("amax", -math.inf)
    # float64 rewards: sum / count may be one rounding away from a constant, and that would be divided by epsilon alone.
    mean = torch.where(low == high, low, per_group(reward) / count)
    centred = torch.where(valid, reward - mean[group], 0.0)
    std = (per_group(centred.square()) / (count - 1).clamp(min=1)).sqrt()  # 0 with fewer than two valid rows

    if scale == "group":
        centred = centred / (std + epsilon)[group]
    elif scale == "batch":
        everything = reward[valid]
        batch_std = everything.std() if everything.numel() > 1 else rewards.new_zeros((), dtype=torch.float64)
        centred = centred / (batch_std + epsilon)
    advantages = centred.to(rewards.dtype)
    no_signal = per_group((advantages != 0).double()) == 0
    return advantages, mean.to(rewards.dtype), std.to(rewards.dtype), no_signal


def compute_dtype(*operands: Tensor) -> torch.dtype:
    """float64 if an operand is, else float32: a bfloat16 product is 35 times slower on a CPU and blurs the ratio."""
    return torch.float64 if any(operand.dtype == torch.float64 for operand in operands) else torch.float32


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, Tensor]:
    """``log_softmax((hidden @ weight.T + bias) / temperature)`` at ``token_ids``, and the entropy of each row.

    Rows go through in chunks; with a gradient to come, each chunk is computed again in the backward pass, so the logits
    of one chunk are all that ever lives.

    Returns:
        logprobs [N], entropy [N] in ``compute_dtype``.
    """
    dtype = compute_dtype(hidden, weight)
    with torch.autocast(hidden.device.type, enabled=False):  # autocast would undo the upcast
        # Once, outside the chunks: their gradients then meet in ``dtype`` and are rounded once.
        weight = weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        rows = max(1, chunk_bytes // (weight.shape[0] * dtype.itemsize))
        operands = [hidden, weight] if bias is None else [hidden, weight, bias]
        # A single chunk fits the budget as it is; only several would add up until the backward pass.
        again = (
            hidden.shape[0] > rows and torch.is_grad_enabled() and any(operand.requires_grad for operand in operands)
        )
        pieces = []
        # No rows: split gives one empty chunk, and the result stays connected to the graph.
        for rows_of_chunk, ids_of_chunk in zip(torch.split(hidden, rows), torch.split(token_ids, rows), strict=True):
            piece = (rows_of_chunk, weight, ids_of_chunk, bias, temperature)
            if again:
                pieces.append(checkpoint(_chunk_logprob, *piece, use_reentrant=False, preserve_rng_state=False))
            else:
                pieces.append(_chunk_logprob(*piece))
    logprobs, entropy = zip(*pieces, strict=True)
    return torch.cat(logprobs), torch.cat(entropy)


def _chunk_logprob(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, bias: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    logits = linear(hidden.to(weight.dtype), weight, bias) / temperature
    logprobs = logits.log_softmax(dim=1)
    # A forbidden id has p = 0 and log p = -inf: filled before the product, it counts 0 forward and backward.
    plogp = logprobs.exp() * logprobs.masked_fill(logprobs == -math.inf, 0.0)
    return logprobs.gather(1, token_ids.long()[:, None])[:, 0], -plogp.sum(dim=1)


def policy_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    sampler_logprobs: Tensor | None,
    bias: Tensor | None,
    temperature: float,
    epsilon_low: float,
    epsilon_high: float,
    beta: float,
    reduction: Reduction,
    denominator: float,
    chunk_bytes: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate of GRPO with a k3 KL; see ``arft_fast.policy_loss`` for the identity and the arguments."""
    logprobs, entropy = linear_logprob(hidden, weight, token_ids, bias, temperature, chunk_bytes)
    lengths = cu_seqlens.diff().long()
    sequence = torch.repeat_interleave(
        torch.arange(lengths.numel(), device=hidden.device), lengths, output_size=hidden.shape[0]
    )
    advantage = advantages.detach().to(logprobs.dtype)[sequence]

    old = logprobs.detach() if old_logprobs is None else old_logprobs.detach().to(logprobs.dtype)
    ratio = (logprobs - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    loss = -torch.minimum(ratio * advantage, clipped * advantage)
    kl = torch.zeros_like(entropy)
    if ref_logprobs is not None:
        gap = (ref_logprobs.detach().to(logprobs.dtype) - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        kl = gap.expm1() - gap
    if beta > 0:
        loss = loss + beta * kl
    if reduction == "grpo":
        loss = loss / lengths[sequence]
    loss = loss.sum() / denominator

    with torch.no_grad():
        count = max(1, hidden.shape[0])
        sampler = logprobs if sampler_logprobs is None else sampler_logprobs.to(logprobs.dtype)
        low, high = (ratio < 1 - epsilon_low) & (advantage < 0), (ratio > 1 + epsilon_high) & (advantage > 0)
        stats = {
            "entropy": entropy.sum() / count,
            "kl": kl.sum() / count,
            "clip_ratio/low_mean": low.sum() / count,
            "clip_ratio/high_mean": high.sum() / count,
            "ratio_max": torch.cat([ratio, ratio.new_zeros(1)]).max(),
            "sampler_gap": (logprobs - sampler).abs().sum() / count,
            "tokens": ratio.new_tensor(hidden.shape[0]),
        }
    return loss, {name: value.detach() for name, value in stats.items()}
