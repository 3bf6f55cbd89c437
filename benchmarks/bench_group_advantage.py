"""``group_advantage`` against a Python loop over samples, the usual way to write it (verl 0.9's GRPO estimator)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from arft_fast.kernels import group_advantage, native

SAMPLES, GROUP, EPSILON = 1024, 8, 1e-4


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
