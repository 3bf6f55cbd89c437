"""The definition of ``group_advantage`` in plain PyTorch. Dimension letters: B trajectories, P groups, K components."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Center = Literal["mean", "leave_one_out", "none"]
Scale = Literal["group", "batch", "none"]
Order = Literal["sum_then_normalize", "normalize_then_sum"]

CENTERS: tuple[Center, ...] = ("mean", "leave_one_out", "none")
SCALES: tuple[Scale, ...] = ("group", "batch", "none")
ORDERS: tuple[Order, ...] = ("sum_then_normalize", "normalize_then_sum")


@dataclass(frozen=True, kw_only=True)
class Normalization:
    """From rewards to advantages: the settings that every implementation of ``group_advantage`` takes."""

    center: Center = "mean"
    scale: Scale = "group"
    order: Order = "sum_then_normalize"
    whiten: bool = False
    std_floor: float = 0.0
    epsilon: float = 1e-4
    gate_by: tuple[int, ...] = ()
    """[K] the component that gates component k, -1 where none does; empty: no gates."""
    gate_threshold: tuple[float, ...] = ()
    """[K] k counts 0 in rows whose gate component is below this; representable in the dtype of the rewards."""


@torch.no_grad()
def group_advantage(
    rewards: Tensor, offsets: Tensor, weights: Tensor | None, rule: Normalization
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``arft_fast.group_advantage``; sums run in float64.

    Both orders are one computation on columns [B, C]: the combined reward as the only column, or one for each component
    (C = K). Each column is centred and scaled on its own, then the columns are added up with their weights.

    Args:
        rewards: [B, K] float32 or float64, NaN where a component does not apply.
        offsets: [P + 1] int64.
        weights: [K] in the dtype of ``rewards``, or None for ones.

    Returns:
        advantages [B], mean [P], std [P] in the dtype of ``rewards``; no_signal [P] bool.
    """
    rows, components = rewards.shape
    groups = offsets.numel() - 1
    group = torch.repeat_interleave(torch.arange(groups, device=rewards.device), offsets.diff(), output_size=rows)
    everyone = torch.zeros_like(group)

    values = _gated(rewards, rule)
    weight = rewards.new_ones(components).double() if weights is None else weights.double()
    valid = ~rewards.isnan().all(dim=1)
    # The combined reward is rounded to its dtype, so that rows tie whose components add up to the same.
    combined = (values.double() * weight).masked_fill(values.isnan(), 0.0).sum(dim=1).to(rewards.dtype).double()
    combined = combined.masked_fill(~valid, math.nan)[:, None]
    count, mean, std = _moments(combined, group, groups)

    if rule.order == "sum_then_normalize":
        columns, weight = combined, weight.new_ones(1)
        column_mean, column_std = mean, std
    else:
        columns = values.double()
        count, column_mean, column_std = _moments(columns, group, groups)
    centred = columns if rule.center == "none" else columns - column_mean[group]
    if rule.center == "leave_one_out":  # r - (n mean - r) / (n - 1) = n / (n - 1) (r - mean)
        centred = centred * (count / (count - 1).clamp(min=1))[group]
    if rule.scale == "group":
        centred = centred / (column_std.clamp(min=rule.std_floor) + rule.epsilon)[group]
    elif rule.scale == "batch":
        batch_std = _moments(columns, everyone, 1)[2]
        centred = centred / (batch_std.clamp(min=rule.std_floor) + rule.epsilon)

    advantages = (centred * weight).masked_fill(columns.isnan(), 0.0).sum(dim=1)
    if rule.whiten:
        _, batch_mean, batch_std = _moments(advantages.masked_fill(~valid, math.nan)[:, None], everyone, 1)
        if rule.center == "none":  # otherwise it is 0, and its rounding error would blur the exact zeros
            advantages = advantages - batch_mean[0]
        advantages = advantages / (batch_std[0] + rule.epsilon)
    advantages = advantages.masked_fill(~valid, 0.0).to(rewards.dtype)
    signal = torch.zeros(groups, dtype=torch.int64, device=rewards.device).index_add(0, group, (advantages != 0).long())
    return advantages, mean[:, 0].to(rewards.dtype), std[:, 0].to(rewards.dtype), signal == 0


def _gated(rewards: Tensor, rule: Normalization) -> Tensor:
    """``rewards`` with 0 where a gate is shut. A comparison with NaN is false: it leaves the gate open."""
    values = rewards.clone()
    for k, by in enumerate(rule.gate_by):
        if by >= 0:
            shut = (rewards[:, by] < rule.gate_threshold[k]) & ~rewards[:, k].isnan()
            values[:, k] = rewards[:, k].masked_fill(shut, 0.0)
    return values


def _moments(columns: Tensor, group: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean (NaN if 0) and std (ddof 1; 0 with fewer than two) [P, C] of the values that are not NaN."""
    present = ~columns.isnan()
    index = group[:, None].expand_as(columns)
    empty = columns.new_zeros(groups, columns.shape[1])

    def total(value: Tensor) -> Tensor:
        return empty.index_add(0, group, value.masked_fill(~present, 0.0))

    low = (empty + math.inf).scatter_reduce(0, index, columns.masked_fill(~present, math.inf), "amin")
    high = (empty - math.inf).scatter_reduce(0, index, columns.masked_fill(~present, -math.inf), "amax")
    count = total(torch.ones_like(columns))
    # sum / count may be one rounding away from a constant, and that would be divided by epsilon alone.
    mean = torch.where(low == high, low, total(columns) / count)
    std = (total((columns - mean[group]).square()) / (count - 1).clamp(min=1)).sqrt()
    return count, mean, std
