"""``group_advantage`` against the usual ways to write it.

GRPO: a Python loop over samples (verl 0.9's estimator). GDPO: about 20 PyTorch operations (TRL 1.16's
``multi_objective_aggregation="normalize_then_sum"``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from arft_fast.kernels import group_advantage, native

SAMPLES, GROUP, COMPONENTS, EPSILON = 1024, 8, 3, 1e-4


def advantages_in_a_loop(scores: Tensor, prompts: list[int]) -> Tensor:
    """Collect by prompt, statistics for each prompt, then normalise sample by sample."""
    scores_of: dict[int, list[Tensor]] = defaultdict(list)
    for i, prompt in enumerate(prompts):
        scores_of[prompt].append(scores[i])
    mean = {prompt: torch.stack(group).mean() for prompt, group in scores_of.items()}
    std = {prompt: torch.stack(group).std() for prompt, group in scores_of.items()}
    advantages = torch.empty_like(scores)
    for i, prompt in enumerate(prompts):
        advantages[i] = (scores[i] - mean[prompt]) / (std[prompt] + EPSILON)
    return advantages


@pytest.mark.skipif(not native.available(), reason="the native library is not built")
def test_native_against_a_loop_over_samples(
    figures: dict[str, float], median_seconds: Callable[..., dict[str, float]]
) -> None:
    rewards = torch.rand(SAMPLES, generator=torch.Generator().manual_seed(0))
    prompts = [i // GROUP for i in range(SAMPLES)]

    def ours() -> Tensor:
        return group_advantage(rewards, GROUP, epsilon=EPSILON, impl="native").advantages

    def loop() -> Tensor:
        return advantages_in_a_loop(rewards, prompts)

    def reference() -> Tensor:
        return group_advantage(rewards, GROUP, epsilon=EPSILON, impl="reference").advantages

    torch.testing.assert_close(ours(), loop(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(reference(), loop(), rtol=1e-4, atol=1e-5)

    seconds = median_seconds(50, ours=ours, loop=loop, reference=reference)
    figures["group_advantage.native_us"] = seconds["ours"] * 1e6
    figures["group_advantage.speedup_vs_loop"] = seconds["loop"] / seconds["ours"]
    figures["group_advantage.speedup_vs_reference"] = seconds["reference"] / seconds["ours"]


def nanstd(values: Tensor, dim: int | None = None) -> Tensor:
    squares = (values - values.nanmean(dim, keepdim=dim is not None)).square()
    count = (~values.isnan()).sum(dim, keepdim=dim is not None)
    return (squares.nanmean(dim, keepdim=dim is not None) * (count / (count - 1))).sqrt()


def decoupled_advantages_in_torch(rewards: Tensor, weights: Tensor) -> Tensor:
    """Normalise each component within its group, add up, whiten over the batch."""
    left_out = rewards.isnan().all(dim=1)
    grouped = rewards.view(-1, GROUP, COMPONENTS)
    each = (grouped - grouped.nanmean(dim=1, keepdim=True)) / (nanstd(grouped, 1) + EPSILON)
    combined = (each.view(-1, COMPONENTS) * weights).nansum(dim=1)
    combined[left_out] = torch.nan
    return ((combined - combined.nanmean()) / (nanstd(combined) + EPSILON)).nan_to_num(nan=0.0)


@pytest.mark.skipif(not native.available(), reason="the native library is not built")
def test_decoupled_normalization_against_torch_operations(
    figures: dict[str, float], median_seconds: Callable[..., dict[str, float]]
) -> None:
    rewards = torch.rand(SAMPLES, COMPONENTS, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([1.0, 0.5, 0.25])

    def ours() -> Tensor:
        order = "normalize_then_sum"
        return group_advantage(rewards, GROUP, weights=weights, order=order, epsilon=EPSILON, impl="native").advantages

    def operations() -> Tensor:
        return decoupled_advantages_in_torch(rewards, weights)

    torch.testing.assert_close(ours(), operations(), rtol=1e-4, atol=1e-5)

    seconds = median_seconds(200, ours=ours, torch=operations)
    figures["group_advantage.gdpo_native_us"] = seconds["ours"] * 1e6
    figures["group_advantage.gdpo_speedup_vs_torch"] = seconds["torch"] / seconds["ours"]
