from __future__ import annotations

import math

import numpy as np
import pytest

from arft_fast.observe.metrics import group_metrics
from arft_fast.trajectory import Ending, Group, Prompt, Trajectory, Turn

PROMPT = Prompt(uid="p", task="t", messages=[])
WEIGHTS = {"accuracy": 1.0, "format": 0.5}


def _trajectory(
    rewards: dict[str, float],
    *,
    policy_tokens: int = 3,
    other_tokens: int = 2,
    ending: Ending = Ending.ANSWER,
    turns: tuple[Turn, ...] = (),
) -> Trajectory:
    length = policy_tokens + other_tokens
    return Trajectory(
        prompt=PROMPT,
        sample=0,
        token_ids=np.zeros(length, np.int64),
        policy_mask=np.arange(length) >= other_tokens,
        logprobs=np.zeros(length, np.float32),
        images=(),
        turns=turns,
        ending=ending,
        rewards=rewards,
    )


def _group(*trajectories: Trajectory) -> Group:
    return Group(prompt=PROMPT, trajectories=trajectories)


def _scored(*accuracies: float) -> Group:
    return _group(*(_trajectory({"accuracy": a, "format": 1.0}) for a in accuracies))


def test_reward_is_the_weighted_total_and_std_is_taken_within_groups() -> None:
    metrics = group_metrics([_scored(0.0, 1.0), _scored(1.0, 1.0)], WEIGHTS)
    assert metrics["reward"] == pytest.approx(0.75 + 0.5)
    assert metrics["reward_std"] == pytest.approx((math.sqrt(0.5) + 0.0) / 2)
    assert metrics["frac_reward_zero_std"] == 0.5


def test_components_are_reported_by_name_with_or_without_a_weight() -> None:
    group = _group(_trajectory({"accuracy": 0.0, "em": 1.0}), _trajectory({"accuracy": 1.0, "em": 0.0}))
    metrics = group_metrics([group], WEIGHTS)
    assert metrics["rewards/accuracy/mean"] == 0.5
    assert metrics["rewards/accuracy/std"] == pytest.approx(math.sqrt(0.5))
    assert metrics["rewards/em/mean"] == 0.5
    assert metrics["reward"] == 0.5


def test_a_component_that_does_not_apply_leaves_its_mean_alone() -> None:
    metrics = group_metrics(
        [_group(_trajectory({"accuracy": 1.0, "code": 1.0}), _trajectory({"accuracy": 0.0}))], WEIGHTS
    )
    assert metrics["rewards/code/mean"] == 1.0
    assert math.isnan(metrics["rewards/code/std"])
    assert math.isnan(metrics["rewards/format/mean"])


def test_lengths_count_what_the_policy_sampled() -> None:
    group = _group(_trajectory({}, policy_tokens=2, ending=Ending.MAX_TOKENS), _trajectory({}, policy_tokens=6))
    metrics = group_metrics([group], WEIGHTS)
    assert metrics["completions/mean_length"] == 4.0
    assert metrics["completions/min_length"] == 2.0
    assert metrics["completions/max_length"] == 6.0
    assert metrics["completions/clipped_ratio"] == 0.5
    assert metrics["num_tokens"] == 12.0


def test_tools_are_counted_by_their_observations() -> None:
    said = Turn(role="assistant", text="<code>")
    worked = Turn(role="observation", text="ok", tool="code")
    failed = Turn(role="observation", text="Error", tool="code", failed=True)
    tips = Turn(role="observation", text="<tips>")
    group = _group(_trajectory({}, turns=(said, worked, said, failed, said, tips)), _trajectory({}))
    metrics = group_metrics([group], WEIGHTS)
    assert metrics["tools/call_frequency"] == 1.0
    assert metrics["tools/failure_frequency"] == 0.5


def test_what_the_world_broke_is_counted_and_left_out() -> None:
    whole = group_metrics([_scored(0.0, 1.0)], WEIGHTS)
    broken = _trajectory({"accuracy": 0.0}, policy_tokens=50, ending=Ending.INFRA_FAULT)
    metrics = group_metrics([_group(*_scored(0.0, 1.0).trajectories, broken), _group(broken)], WEIGHTS)
    assert metrics.pop("rollout/infra_failed") == 2.0
    assert whole.pop("rollout/infra_failed") == 0.0
    assert metrics == whole


def test_a_trajectory_alone_is_a_group_without_a_signal() -> None:
    metrics = group_metrics([_scored(1.0)], WEIGHTS)
    assert (metrics["reward_std"], metrics["frac_reward_zero_std"]) == (0.0, 1.0)


def test_names_stay_the_same_when_nothing_was_measured() -> None:
    empty = group_metrics([], WEIGHTS)
    assert empty.keys() == group_metrics([_scored(0.0, 1.0)], WEIGHTS).keys()
    assert empty.pop("num_tokens") == empty.pop("rollout/infra_failed") == 0.0
    assert all(math.isnan(value) for value in empty.values())


def test_the_total_ignores_components_without_a_weight() -> None:
    assert _trajectory({"accuracy": 1.0, "format": 1.0, "em": 1.0}).total_reward(WEIGHTS) == 1.5
