from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from arft_fast.policy.batch import collate, rope_positions
from arft_fast.policy.forward import hidden_rows
from arft_fast.policy.micro_batches import padded
from arft_fast.policy.model import Policy
from arft_fast.policy.parallel import Ranks
from arft_fast.policy.update import GrpoLoss, Optimizer, grpo_update
from arft_fast.rollout.ledger import Ledger
from arft_fast.trajectory import Ending, Prompt, Trajectory

ALONE = Ranks(rank=0, world=1, device=torch.device("cpu"))


def _episode(policy: Policy, seed: int, ending: Ending = Ending.ANSWER) -> Trajectory:
    rng = np.random.default_rng(seed)
    image = policy.images.encode(Image.new("RGB", (56, 56 + 28 * (seed % 2)), (seed * 20 % 255, 30, 60)))
    ledger = Ledger(image_token_id=policy.chat.image_token_id, max_tokens=200)
    ledger.add_context([5, *[policy.chat.image_token_id] * image.tokens, 7], [image])
    for _ in range(2):
        sampled = rng.integers(0, 300, size=3 + seed % 4).tolist()
        ledger.add_sampled(sampled, [-2.0] * len(sampled))
        ledger.add_context([8, 9])
    token_ids, mask, logprobs = ledger.arrays()
    return Trajectory(
        prompt=Prompt(uid=str(seed), task="t", messages=[]), sample=0, token_ids=token_ids, policy_mask=mask,
        logprobs=logprobs, images=ledger.images, turns=[], ending=ending,
    )  # fmt: skip


def _optimizer(policy: Policy, learning_rate: float = 1e-3) -> Optimizer:
    return Optimizer(policy.trainable_parameters(), learning_rate=learning_rate, total_steps=10, ranks=ALONE)


def _weights(policy: Policy) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in policy.trainable_parameters()]).clone()


def _gradient(policy: Policy, episodes: list[Trajectory], advantages: torch.Tensor, settings: GrpoLoss) -> torch.Tensor:
    """The gradient that an update would apply, caught before the step."""
    caught: list[torch.Tensor] = []
    optimizer = _optimizer(policy, learning_rate=0.0)  # a step that changes nothing
    optimizer._adamw.register_step_pre_hook(
        lambda *_: caught.append(
            torch.cat(
                [
                    (p.grad if p.grad is not None else torch.zeros_like(p)).flatten()
                    for p in policy.trainable_parameters()
                ]
            )
        )
    )
    optimizer._max_grad_norm = math.inf
    reference = policy.frozen_copy() if settings.beta else None
    grpo_update(policy, reference, optimizer, episodes, advantages, settings, ALONE)
    return caught[0].clone()


def test_the_update_is_the_gradient_of_the_published_objective(policy: Policy) -> None:
    policy.model.double()
    episodes = [_episode(policy, seed) for seed in range(4)]
    advantages = torch.tensor([1.0, -0.5, 0.3, -0.8], dtype=torch.float64)
    loss = torch.zeros((), dtype=torch.float64)
    for episode, advantage in zip(episodes, advantages, strict=True):  # one sequence at a time, full logits, no packing
        batch = collate(policy, [episode])
        logits = hidden_rows(policy, batch) @ policy.head.weight.T + policy.logit_bias
        logprobs = torch.log_softmax(logits, -1).gather(-1, batch.targets[:, None]).squeeze(-1)
        loss = loss - (torch.exp(logprobs - logprobs.detach()) * advantage).mean() / len(episodes)
    expected = torch.autograd.grad(loss, policy.trainable_parameters(), allow_unused=True)
    flat = torch.cat(
        [
            (g if g is not None else torch.zeros_like(p)).flatten()
            for g, p in zip(expected, policy.trainable_parameters(), strict=True)
        ]
    )
    actual = _gradient(policy, episodes, advantages, GrpoLoss())
    assert flat.norm() > 0
    assert (actual - flat).norm() / flat.norm() < 1e-6  # advantages pass through float32
    wrong = _gradient(policy, episodes, advantages.flip(0), GrpoLoss())
    assert (wrong - flat).norm() / flat.norm() > 1e-2


def test_micro_batches_do_not_change_the_gradient(policy: Policy) -> None:
    policy.model.double()
    episodes = [_episode(policy, seed) for seed in range(6)]
    advantages = torch.linspace(-1, 1, 6)
    whole = _gradient(policy, episodes, advantages, GrpoLoss(beta=0.04))
    parts = _gradient(policy, episodes, advantages, GrpoLoss(beta=0.04, micro_batch_tokens=40))
    # Products of other sizes round the last bit elsewhere, and transformers' norms and angles go through float32.
    assert (whole - parts).norm() / whole.norm() < 1e-6


def test_dropping_zero_advantage_sequences_leaves_the_gradient_as_it_is(policy: Policy) -> None:
    policy.model.double()
    episodes = [_episode(policy, seed) for seed in range(4)]
    some = _gradient(policy, episodes, torch.tensor([1.0, 0.0, -1.0, 0.0]), GrpoLoss())
    tiny = _gradient(policy, episodes, torch.tensor([1.0, 1e-30, -1.0, 1e-30]), GrpoLoss())
    torch.testing.assert_close(some, tiny, atol=1e-15, rtol=1e-9)


def test_an_episode_that_the_world_broke_changes_nothing_not_even_a_denominator(policy: Policy) -> None:
    policy.model.double()
    sound = [_episode(policy, seed) for seed in range(3)]
    broken = _episode(policy, 9, Ending.INFRA_FAULT)
    expected = _gradient(policy, sound, torch.tensor([1.0, -1.0, 0.5]), GrpoLoss())
    actual = _gradient(policy, [*sound, broken], torch.tensor([1.0, -1.0, 0.5, 2.0]), GrpoLoss())
    torch.testing.assert_close(actual, expected, atol=1e-15, rtol=1e-9)


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_reported(policy: Policy, poison: str) -> None:
    before = _weights(policy)
    optimizer = _optimizer(policy)
    parameter = policy.trainable_parameters()[0]

    def backward() -> float:
        parameter.grad = torch.full_like(parameter, math.nan if poison == "gradient" else 1.0)
        return math.inf if poison == "loss" else 1.0

    report = optimizer.step(backward)
    assert report.skipped
    assert torch.equal(before, _weights(policy))

    def sound() -> float:
        parameter.grad = torch.ones_like(parameter)
        return 1.0

    assert not optimizer.step(sound).skipped  # the optimizer's state was not poisoned
    assert _weights(policy).isfinite().all() and not torch.equal(before, _weights(policy))


def test_the_learning_rate_warms_up_and_falls_linearly_to_zero() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = Optimizer([parameter], learning_rate=1.0, total_steps=10, warmup_steps=2, ranks=ALONE)

    def backward() -> float:
        parameter.grad = torch.ones_like(parameter)
        return 0.0

    rates = [optimizer.step(backward).learning_rate for _ in range(11)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert rates[3:] == pytest.approx([7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0.0])


def test_a_gradient_is_clipped_to_the_norm_and_its_own_norm_reported() -> None:
    parameter = torch.nn.Parameter(torch.zeros(4))
    optimizer = Optimizer([parameter], learning_rate=0.0, total_steps=2, max_grad_norm=1.0, ranks=ALONE)
    seen: list[float] = []
    optimizer._adamw.register_step_pre_hook(lambda *_: seen.append(float(parameter.grad.norm())))  # type: ignore[union-attr]

    def backward() -> float:
        parameter.grad = torch.full_like(parameter, 3.0)
        return 0.0

    assert optimizer.step(backward).grad_norm == pytest.approx(6.0)
    assert seen == pytest.approx([1.0], rel=1e-4)


def test_bfloat16_weights_learn_at_the_published_learning_rate() -> None:
    parameter = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = Optimizer([parameter], learning_rate=1e-4, total_steps=10**9, ranks=ALONE)

    def backward() -> float:
        parameter.grad = torch.ones_like(parameter)
        return 0.0

    optimizer.step(backward)
    assert parameter[0].item() == 1.0  # one step is below bfloat16's resolution ...
    for _ in range(99):
        optimizer.step(backward)
    assert parameter[0].item() == pytest.approx(1.0 - 100e-4, abs=4e-3)  # ... and is kept all the same


def test_micro_batches_hold_everything_once_within_the_budget(policy: Policy) -> None:
    episodes = [_episode(policy, seed) for seed in range(9)]
    batches = list(padded(episodes, 60))
    assert sorted(i for batch in batches for i in batch) == list(range(9))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(len(episodes[i].token_ids) for i in batch) <= 60


def test_padding_does_not_change_a_hidden_state(policy: Policy) -> None:
    short, long = _episode(policy, 0), _episode(policy, 3)
    alone = hidden_rows(policy, collate(policy, [short]))
    padded = hidden_rows(policy, collate(policy, [short, long]))[: len(alone)]
    torch.testing.assert_close(alone, padded, atol=2e-5, rtol=1e-4)


def test_positions_are_the_models_own_with_a_time_axis_that_jumps_behind_an_image(policy: Policy) -> None:
    episode = _episode(policy, 1)
    positions = rope_positions(policy.model, episode.token_ids, episode.images)
    (image,) = episode.images
    _, height, width = image.grid_thw
    assert positions[:, 1].tolist() == [1, 1, 1]
    assert positions[:, image.tokens].tolist() == [1, height // 2, width // 2]
    assert positions[:, image.tokens + 1].tolist() == [1 + max(height, width) // 2] * 3


def test_the_statistics_are_means_over_sampled_tokens(policy: Policy) -> None:
    episodes = [_episode(policy, seed) for seed in range(3)]
    report, stats = grpo_update(
        policy, policy.frozen_copy(), _optimizer(policy, 0.0), episodes, torch.ones(3), GrpoLoss(beta=0.1), ALONE
    )
    assert stats["kl"] == pytest.approx(0.0, abs=1e-6) and not report.skipped
    batch = collate(policy, episodes)
    logits = hidden_rows(policy, batch) @ policy.head.weight.T + policy.logit_bias
    distribution = torch.distributions.Categorical(logits=logits)
    assert stats["entropy"] == pytest.approx(distribution.entropy().nan_to_num().mean().item(), rel=1e-4)
    gap = (torch.log_softmax(logits, -1).gather(-1, batch.targets[:, None]).squeeze(-1) + 2.0).abs().mean()
    assert stats["sampler_gap"] == pytest.approx(gap.item(), rel=1e-4)
