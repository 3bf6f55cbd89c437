"""The benchmark of whole steps: its sides do the same, and one that does something else is found out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from arft_fast.trajectory import Prompt, Trajectory
from benchmarks.bench_end_to_end import contest, figures_of
from benchmarks.end_to_end_sides import OURS, PLAIN, TRL, Side, builders
from benchmarks.meter import MIB, Measurement, Sample
from benchmarks.plain_rollout import model_inputs, open_processor, plain_rollout
from benchmarks.step_judge import AnotherStep, Judge, open_judge
from benchmarks.step_problem import OneTurn, even_share
from benchmarks.train_problem import Models, ToolTurn, TrainProblem, TrainShape, open_policies, write_tiny
from benchmarks.train_sides import AT_MOST, Found

CPU = torch.device("cpu")
DTYPE = torch.float32
SHAPE = TrainShape(groups=2, samples=4, prompt_tokens=72, image=(84, 56), sampled_tokens=12)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return write_tiny(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def task(models: Models) -> OneTurn:
    return OneTurn(open_policies(models, SHAPE, CPU, DTYPE)[0], SHAPE, steps=4)


@pytest.fixture(scope="module")
def judge(models: Models, task: OneTurn) -> Judge:
    return open_judge(models, task, CPU, DTYPE)


@pytest.fixture
def sides(models: Models, task: OneTurn, tmp_path: Path) -> dict[str, Callable[[], Side]]:
    return builders(models, tmp_path, task, CPU, DTYPE)


@pytest.fixture
def samples(judge: Judge, task: OneTurn) -> TrainProblem:
    """Of the plain rollout."""
    return rollout(judge, task.of_step(0))


def rollout(judge: Judge, prompts: list[Prompt], *, temperature: float = 1.0, top_k: int = 0) -> TrainProblem:
    torch.manual_seed(0)
    return plain_rollout(
        *(judge.model, judge.processor, prompts, judge.task.reward),
        samples=SHAPE.samples,
        tokens=SHAPE.sampled_tokens,
        suppressed=judge.task.suppressed,
        temperature=temperature,
        top_k=top_k,
    )


def with_first(samples: TrainProblem, **changes: Any) -> TrainProblem:
    """The first trajectory changed."""
    (first, *others), *groups = samples.groups
    return replace(samples, groups=((replace(first, **changes), *others), *groups))


def test_prompts_have_the_size_that_they_were_asked_for_and_no_step_repeats_one(models: Models, task: OneTurn) -> None:
    policy, _ = open_policies(models, SHAPE, CPU, DTYPE)
    encoded = [policy.chat.prompt(prompt.messages, prompt.images) for prompt in task.prompts]
    assert all(SHAPE.prompt_tokens - 6 < len(ids) <= SHAPE.prompt_tokens for ids, _ in encoded)
    assert len({tuple(ids) for ids, _ in encoded}) == len({images[0].key for _, images in encoded}) == 4 * SHAPE.groups
    again, other = (OneTurn(policy, SHAPE, steps=1, seed=seed).prompts[0] for seed in (0, 1))
    assert again.messages == task.prompts[0].messages != other.messages
    assert task.of_step(1) == task.prompts[2:4]
    with pytest.raises(IndexError, match="for 4 steps only"):
        task.of_step(4)


def test_a_shape_that_cannot_be_played_is_refused(models: Models) -> None:
    policy, _ = open_policies(models, SHAPE, CPU, DTYPE)
    for shape in (replace(SHAPE, turns=(ToolTurn(),)), replace(SHAPE, image=None)):
        with pytest.raises(ValueError, match="give a shape without turns, with an image"):
            OneTurn(policy, shape, steps=1)
    with pytest.raises(ValueError, match="not enough for a word"):
        OneTurn(policy, replace(SHAPE, prompt_tokens=20), steps=1)


@pytest.mark.parametrize("name", [OURS, PLAIN, TRL])
def test_a_side_is_admitted_and_only_its_steps_change_its_weights(
    name: str, sides: dict[str, Callable[[], Side]], judge: Judge, task: OneTurn
) -> None:
    if name == TRL:
        pytest.importorskip("trl")
    side, prompts, losses = sides[name](), task.of_step(0), []
    errors = judge.examine(side, prompts)
    assert all(error <= most for error, most in zip(errors, AT_MOST[DTYPE], strict=True))
    for steps in (0, 0, 1):
        for _ in range(steps):
            assert 0 < side.step(task.of_step(1)) < 60
        torch.manual_seed(0)
        losses.append(side.rehearse(prompts).found.loss)
    assert losses[0] == losses[1] != losses[2]


def test_a_processor_that_pads_on_the_right_gives_trl_another_gradient(
    models: Models, sides: dict[str, Callable[[], Side]], judge: Judge, task: OneTurn, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl")
    wrong = open_processor(models.policy, most_pixels=SHAPE.most_pixels)
    wrong.tokenizer.padding_side = "right"
    monkeypatch.setattr("benchmarks.end_to_end_sides.open_processor", lambda *_, **__: wrong)
    prompts = [prompt for prompt in task.prompts if length(judge, prompt) != length(judge, task.prompts[0])]
    with pytest.raises(AnotherStep, match="off by"):
        judge.examine(sides[TRL](), [task.prompts[0], prompts[0]])


def length(judge: Judge, prompt: Prompt) -> int:
    return int(model_inputs(judge.processor, prompt)["input_ids"].shape[1])


@pytest.mark.parametrize("settings", [{"top_k": 50}, {"temperature": 0.3}], ids=str)
def test_samples_of_another_distribution_are_found_out(settings: dict[str, float], judge: Judge, task: OneTurn) -> None:
    judge.check_sampling(rollout(judge, task.of_step(0)), recorded=False)
    with pytest.raises(AnotherStep, match=r"sampling: log-probs lie -?\d+ deviations"):
        judge.check_sampling(rollout(judge, task.of_step(0), **settings), recorded=False)  # type: ignore[arg-type]


def test_log_probs_that_the_engine_recorded_wrongly_are_found_out(
    sides: dict[str, Callable[[], Side]], judge: Judge, task: OneTurn
) -> None:
    samples, _ = sides[OURS]().rehearse(task.of_step(0))
    judge.check_sampling(samples, recorded=True)
    first = samples.groups[0][0]
    with pytest.raises(AnotherStep, match="recorded log-probs: off by"):
        judge.check_sampling(with_first(samples, logprobs=first.logprobs + np.float32(0.01)), recorded=True)


def changed_samples(samples: TrainProblem, task: OneTurn) -> dict[str, TrainProblem]:
    first: Trajectory = samples.groups[0][0]
    forbidden, shifted = first.token_ids.copy(), first.token_ids.copy()
    forbidden[-1], shifted[0] = task.suppressed[0], shifted[0] + 1
    short = {"token_ids": first.token_ids[:-1], "policy_mask": first.policy_mask[:-1], "logprobs": first.logprobs[:-1]}
    blind = [replace(image, pixel_values=torch.zeros_like(image.pixel_values)) for image in first.images]
    return {
        "groups of": replace(samples, groups=samples.groups[:1]),
        "other ids": with_first(samples, token_ids=shifted),
        "11 tokens": with_first(samples, **short),
        "may not be sampled": with_first(samples, token_ids=forbidden),
        "policy mask": with_first(samples, policy_mask=np.ones_like(first.policy_mask)),
        "other pixels": with_first(samples, images=blind),
    }


@pytest.mark.parametrize(
    "message", ["groups of", "other ids", "11 tokens", "may not be sampled", "policy mask", "other pixels"]
)
def test_samples_that_are_not_whole_are_found_out(
    message: str, samples: TrainProblem, judge: Judge, task: OneTurn
) -> None:
    judge.check_samples(samples, task.of_step(0))
    with pytest.raises(AnotherStep, match=message):
        judge.check_samples(changed_samples(samples, task)[message], task.of_step(0))


def test_advantages_that_are_wrong_or_all_zero_are_found_out(samples: TrainProblem, judge: Judge) -> None:
    judge.check_advantages(samples)
    with pytest.raises(AnotherStep, match="advantages: off by"):
        judge.check_advantages(replace(samples, advantages=samples.advantages.roll(1)))
    equal = replace(samples, groups=tuple((group[0],) * SHAPE.samples for group in samples.groups))
    with pytest.raises(AnotherStep, match="all rewards of a group are equal"):
        judge.check_advantages(equal)


def test_an_update_with_other_advantages_is_found_out(
    sides: dict[str, Callable[[], Side]], judge: Judge, task: OneTurn
) -> None:
    samples, found = sides[OURS]().rehearse(task.of_step(0))
    judge.check_update(samples, found)
    with pytest.raises(AnotherStep, match="gradient off by"):
        judge.check_update(replace(samples, advantages=samples.advantages.flip(0)), found)
    nan = Found(float("nan"), found.gradients, found.metrics)
    with pytest.raises(AnotherStep, match="loss off by nan"):
        judge.check_update(samples, nan)


def test_the_reward_is_the_share_of_even_ids() -> None:
    assert even_share([2, 3, 4, 6]) == 0.75


def test_a_contest_leaves_out_a_peer_that_fails_and_never_ours(
    sides: dict[str, Callable[[], Side]], judge: Judge, task: OneTurn
) -> None:
    def missing() -> Side:
        raise ModuleNotFoundError("No module named 'trl'")

    table, found = contest("tiny", task, {OURS: sides[OURS], TRL: missing}, lambda: judge, CPU, rounds=2)
    assert [row.side for row in table.rows] == list(found) == [OURS]
    (cells,) = (row.cells() for row in table.rows)
    assert len(found[OURS].samples) == 2 and {"rollout", "update", "x ours", "peak MiB"} <= set(cells)
    assert float(cells["rollout"]) > 0 < float(cells["update"])
    assert table.left_out == {TRL: "ModuleNotFoundError: No module named 'trl'"}
    with pytest.raises(ModuleNotFoundError):
        contest("tiny", task, {OURS: missing}, lambda: judge, CPU, rounds=1)


def test_every_named_figure_of_a_step_is_there() -> None:
    found = {
        name: Measurement((Sample(seconds, mib * MIB), Sample(seconds, None)))
        for name, seconds, mib in ((OURS, 0.5, 2), (PLAIN, 2.0, 8), (TRL, 1.5, 4))
    }
    assert figures_of(found) == {
        "end_to_end.step_ms": 500.0,
        "end_to_end.speedup_vs_plain": 4.0,
        "end_to_end.peak_vs_plain": 0.25,
        "end_to_end.speedup_vs_trl": 3.0,
        "end_to_end.peak_vs_trl": 0.5,
    }
    assert set(figures_of({OURS: found[OURS]})) == {"end_to_end.step_ms"}
