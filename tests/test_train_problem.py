"""The problem on which whole updates are compared: its size, what its samples share, its seed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.train_problem import Models, ToolTurn, TrainShape, make_problem, open_policies, write_tiny

CPU = torch.device("cpu")
SINGLE = TrainShape(groups=2, samples=4, prompt_tokens=48, image=(84, 56), sampled_tokens=16)
TURNS = replace(
    SINGLE,
    turns=(
        ToolTurn(sampled=6, observed=24, image=(56, 84), distinct=2),
        ToolTurn(sampled=5, observed=20, image=(56, 56)),
    ),
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return write_tiny(tmp_path_factory.mktemp("models"))


def test_a_problem_has_the_size_that_it_was_asked_for(models: Models) -> None:
    problem = make_problem(open_policies(models, TURNS, CPU, torch.float32)[0], TURNS)
    assert [len(group) for group in problem.groups] == [4, 4] and problem.advantages.shape == (8,)
    for group in problem.groups:
        assert all(t.prompt is group[0].prompt for t in group)
        assert {int(np.argmax(t.policy_mask)) for t in group} == {TURNS.prompt_tokens}
        last = [t.completion_length - sum(turn.sampled for turn in TURNS.turns) for t in group]
        assert np.mean(last) == TURNS.sampled_tokens and len(set(last)) > 1
        assert all(len(t.images) == 3 and len({image.key for image in t.images}) == 3 for t in group)
    assert problem.tokens == sum(len(t.token_ids) for t in problem.trajectories)


def test_samples_share_the_turns_that_they_are_said_to_share(models: Models) -> None:
    problem = make_problem(open_policies(models, TURNS, CPU, torch.float32)[0], TURNS)
    first, other = problem.groups
    ends = np.cumsum([TURNS.prompt_tokens, *(turn.sampled + turn.observed for turn in TURNS.turns)])
    distinct = [len({tuple(t.token_ids[:end]) for t in first}) for end in ends]
    assert distinct == [1, 2, 4]
    assert [len({t.images[k].key for t in first}) for k in range(3)] == [1, 2, 4]
    assert first[0].images[0].key != other[0].images[0].key
    shared = slice(TURNS.prompt_tokens, TURNS.prompt_tokens + TURNS.turns[0].sampled)
    assert not np.array_equal(first[0].logprobs[shared], first[1].logprobs[shared])  # a sampler's differ


def test_a_problem_depends_on_its_seed_only(models: Models) -> None:
    policy, _ = open_policies(models, SINGLE, CPU, torch.float32)
    one, same, another = (make_problem(policy, SINGLE, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.advantages, same.advantages) and not torch.equal(one.advantages, another.advantages)
    for a, b in zip(one.trajectories, same.trajectories, strict=True):
        assert np.array_equal(a.token_ids, b.token_ids) and np.array_equal(a.logprobs, b.logprobs)
        assert [image.key for image in a.images] == [image.key for image in b.images]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (replace(SINGLE, prompt_tokens=12), "12 leave no text beside an image; give at least"),
        (replace(SINGLE, image=(60, 56)), "give multiples of 28"),
    ],
)
def test_a_shape_that_cannot_be_made_is_refused(models: Models, shape: TrainShape, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_problem(open_policies(models, shape, CPU, torch.float32)[0], shape)
