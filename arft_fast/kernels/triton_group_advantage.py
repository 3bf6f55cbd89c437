"""``group_advantage`` in Triton: one launch with a program for each group, of any size.

``scale="batch"`` adds a launch before it (moments of every group, which each program then merges), ``whiten`` two after
it (moments of the advantages of every group, then the division). Nothing waits for the device. The settings are
compiled in as float64 constants, so a new epsilon or gate threshold costs a compilation.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from .group_advantage_reference import Normalization
from .triton_group_advantage_kernels import advantage_kernel, moments_kernel, whiten_kernel

_BLOCK = 128
"""Elements of a block [R, C]: a typical group in one block, four elements a thread of its one warp, no spills."""


def group_advantage(
    rewards: Tensor, offsets: Tensor, weights: Tensor | None, rule: Normalization
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results as in ``reference.group_advantage``, on a CUDA device (or under Triton's interpreter)."""
    rewards, offsets = rewards.contiguous(), offsets.contiguous()
    weights = None if weights is None else weights.contiguous()
    rows, components = rewards.shape
    groups = offsets.numel() - 1
    advantages, mean, std = (rewards.new_empty(size) for size in (rows, groups, groups))
    no_signal = torch.empty(groups, dtype=torch.bool, device=rewards.device)
    if groups == 0:
        return advantages, mean, std, no_signal

    with torch.cuda.device_of(rewards):
        grid = (groups,)
        flags = no_signal.view(torch.uint8)
        columns = _columns(components, rule)
        moments = None
        if rule.scale == "batch":
            moments = rewards.new_empty(3, groups, columns["C"], dtype=torch.float64)
            moments_kernel[grid](rewards, weights, offsets, moments, groups, **columns, num_warps=1)
        raw = torch.empty_like(advantages, dtype=torch.float64) if rule.whiten else advantages
        advantage_kernel[grid](
            *(rewards, weights, offsets, moments, raw, mean, std, flags, groups),
            **columns,
            CENTER=rule.center,
            SCALE=rule.scale,
            WHITEN=rule.whiten,
            STD_FLOOR=rule.std_floor,
            EPSILON=rule.epsilon,
            num_warps=1,
        )
        if rule.whiten:
            moments = rewards.new_empty(3, groups, 1, dtype=torch.float64)
            moments_kernel[grid](raw, None, offsets, moments, groups, **_columns(1, Normalization()), num_warps=1)
            subtract = rule.center == "none"
            whiten_kernel[grid](
                *(raw, offsets, moments, advantages, flags, groups),
                R=_BLOCK,
                SUBTRACT=subtract,
                EPSILON=rule.epsilon,
                num_warps=1,
            )
    return advantages, mean, std, no_signal


def _columns(components: int, rule: Normalization) -> dict[str, Any]:
    """The compile-time sizes and gates that both kernels over rewards take."""
    padded = triton.next_power_of_2(components)
    sum_first = rule.order == "sum_then_normalize"
    return {
        "K": components,
        "K_PADDED": padded,
        "C": 1 if sum_first else components,
        "C_PADDED": 1 if sum_first else padded,
        "R": max(1, _BLOCK // padded),
        "GATE_BY": rule.gate_by,
        "THRESHOLD": rule.gate_threshold,
        "SUM_FIRST": sum_first,
    }
