"""The benchmark of the rollout: its engine keeps its own time, its bound is one, its sides differ in waiting only."""

from __future__ import annotations

import asyncio
import gc
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import pytest
import torch

from arft_fast.observe.timeline import Span, Timeline
from arft_fast.policy.model import Policy
from arft_fast.rollout.engine import EngineBusy, Generation, Sampling
from arft_fast.rollout.transformers_engine import TransformersEngine
from benchmarks import rollout_sides
from benchmarks.bench_rollout_overlap import CASES, Case, figures_of, play_scripted, table_of
from benchmarks.prompt_sharing import make_prompts, play_alone, play_together
from benchmarks.rollout_bound import lower_bound
from benchmarks.rollout_problem import (
    Latency,
    RolloutProblem,
    RolloutShape,
    open_policy,
    plan_rollout,
    write_policy,
)
from benchmarks.rollout_sides import BARRIER, OURS, SERIAL, ForcedTurns, Rollout, Side, assert_same_tokens, roll_out
from benchmarks.scripted_engine import ScriptedEngine, StepCost
from benchmarks.train_problem import TrainShape

CPU = torch.device("cpu")
COST = StepCost(step_s=2e-3, sequence_s=1e-4, prefill_s=1e-5)
SMALL = RolloutShape(
    groups=2, samples=3, turns=3, prompt_tokens=20, turn_tokens=12, most_turn_tokens=40, observation_tokens=5
)
TOOL = Latency(name="a while", mean_s=0.03)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return open_policy(
        write_policy(tmp_path_factory.mktemp("policy")), CPU, torch.float32, min_pixels=784, max_pixels=56 * 56
    )


@pytest.fixture(autouse=True, scope="module")
def frozen_garbage() -> Iterator[None]:
    """The collection before each run then looks at what the runs left, not at every module."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def _lines(problem: RolloutProblem) -> dict[int, tuple[int, ...]]:
    return {seed: (*turn.body, *turn.action) for seed, turn in problem.script.items()}


def _roll(
    side: Side, problem: RolloutProblem, latency: Latency = TOOL, cost: StepCost = COST, workers: int = 8
) -> Rollout:
    engine = partial(ScriptedEngine, _lines(problem), cost, slots=problem.shape.trajectories)
    return roll_out(side, problem, engine, latency, workers=workers, device=CPU)


def _steps(rollout: Rollout) -> list[Span]:
    return [span for span in rollout.spans if span.kind == "engine"]


def _say(
    lines: Mapping[int, Sequence[int]], prompts: Mapping[int, Sequence[int]], *, slots: int = 8, cost: StepCost = COST
) -> tuple[dict[int, Generation], list[Span]]:
    """All lines at once; ``prompts`` by seed."""
    timeline = Timeline()

    async def run() -> dict[int, Generation]:
        engine = ScriptedEngine(lines, cost, timeline, slots=slots)
        calls = {seed: engine.generate(ids, [], Sampling(max_tokens=99, seed=seed)) for seed, ids in prompts.items()}
        return dict(zip(calls, await asyncio.gather(*calls.values()), strict=True))

    return asyncio.run(run()), timeline.take()


def test_the_engine_takes_what_its_cost_model_says(policy: Policy) -> None:
    rollout = _roll(OURS, plan_rollout(policy, SMALL))
    steps = _steps(rollout)
    sampled = sum(step.detail["running"] for step in steps)
    prefilled = sum(step.detail["prefilled"] for step in steps)
    assert sampled == rollout.sampled_tokens
    assert prefilled == sum(trajectory.prefilled_tokens for trajectory in rollout.trajectories)
    said = len(steps) * COST.step_s + sampled * COST.sequence_s + prefilled * COST.prefill_s
    assert sum(step.seconds for step in steps) == pytest.approx(said)
    assert rollout.seconds > said


def test_a_busy_loop_does_not_slow_the_engine() -> None:
    timeline = Timeline()

    async def run() -> None:
        engine = ScriptedEngine({0: range(20)}, COST, timeline, slots=1)
        said = asyncio.create_task(engine.generate([1], [], Sampling(max_tokens=99)))
        await asyncio.sleep(0.01)
        time.sleep(0.05)  # 20 steps take 42 ms
        await said

    asyncio.run(run())
    steps = timeline.take()
    assert steps[-1].end - steps[0].start == pytest.approx(20 * COST.seconds(1, 0) + COST.prefill_s)


def test_a_request_waits_for_the_next_step() -> None:
    timeline = Timeline()
    slow = replace(COST, step_s=0.04)

    async def run() -> Generation:
        engine = ScriptedEngine({0: range(3), 1: range(1)}, slow, timeline, slots=2)
        first = asyncio.create_task(engine.generate([1], [], Sampling(max_tokens=99, seed=0)))
        await asyncio.sleep(0.01)
        second = await engine.generate([2], [], Sampling(max_tokens=99, seed=1))
        await first
        return second

    second = asyncio.run(run())
    steps = timeline.take()
    assert steps[0].detail["running"] == 1
    assert 0 < second.queued_s <= second.seconds - slow.step_s
    assert sum(step.detail["running"] for step in steps) == 4


@pytest.mark.parametrize(("slots", "together"), [(4, 4), (8, 6)])
def test_no_more_run_together_than_there_are_slots(slots: int, together: int) -> None:
    lines = {seed: range(20) for seed in range(6)}
    found, steps = _say(lines, {seed: [seed] for seed in lines}, slots=slots)
    assert max(step.detail["running"] for step in steps) == together
    assert all(generation.token_ids == list(range(20)) for generation in found.values())


def test_a_shared_prompt_is_prefilled_once_for_its_group() -> None:
    prompt = list(range(100, 150))
    lines: dict[int, Sequence[int]] = {seed: range(3) for seed in range(8)}
    found, _ = _say(lines, dict.fromkeys(lines, prompt))
    assert sum(generation.prefilled_tokens for generation in found.values()) == len(prompt)
    others, _ = _say(lines, {seed: [seed, *prompt[1:]] for seed in lines})
    assert sum(generation.prefilled_tokens for generation in others.values()) == 8 * len(prompt)


def test_a_request_that_is_cancelled_leaves_its_slot() -> None:
    async def run() -> Generation:
        engine = ScriptedEngine({0: range(10_000), 1: range(2)}, COST, Timeline(), slots=1)
        endless = asyncio.create_task(engine.generate([1], [], Sampling(max_tokens=10_000, seed=0)))
        await asyncio.sleep(0.01)
        with pytest.raises(EngineBusy):
            await engine.sleep()
        endless.cancel()
        return await asyncio.wait_for(engine.generate([2], [], Sampling(max_tokens=9, seed=1)), 5)

    assert asyncio.run(run()).token_ids == [0, 1]


def test_a_turn_without_a_line_is_refused() -> None:
    with pytest.raises(ValueError, match="seed 3"):
        _say({0: range(3)}, {3: [1]})


@pytest.mark.parametrize("seed", range(4))
def test_no_side_is_faster_than_the_bound(policy: Policy, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = replace(SMALL, groups=int(rng.integers(1, 4)), turns=int(rng.integers(1, 4)), spread=rng.uniform(0.1, 1))
    cost = StepCost(step_s=rng.uniform(5e-4, 2e-3), sequence_s=rng.uniform(0, 1e-3), prefill_s=rng.uniform(0, 1e-4))
    latency = Latency(name="any", mean_s=rng.uniform(0, 0.03), spread=rng.uniform(0, 1))
    workers = int(rng.integers(1, 9))
    problem = plan_rollout(policy, shape, seed=(seed,))
    bound = lower_bound(problem, cost, slots=shape.trajectories, latency=latency, workers=workers)
    for side in (OURS, BARRIER):
        assert _roll(side, problem, latency, cost, workers).seconds >= bound.seconds


def test_the_bound_is_what_a_lone_trajectory_takes(policy: Policy) -> None:
    """So it cannot be raised: it would not be a bound any more."""
    problem = plan_rollout(policy, replace(SMALL, groups=1, samples=1, turns=1))
    steps = _steps(_roll(OURS, problem))
    bound = lower_bound(problem, COST, slots=1, latency=TOOL, workers=1)
    assert bound.seconds == bound.engine_s == pytest.approx(bound.chain_s)
    assert steps[-1].end - steps[0].start == pytest.approx(bound.seconds)


def test_the_engines_bound_is_what_a_full_batch_takes(policy: Policy) -> None:
    """But for the steps until all have arrived."""
    problem = plan_rollout(policy, replace(SMALL, turns=1))
    cost = replace(COST, step_s=0.02)
    steps = _steps(_roll(OURS, problem, cost=cost))
    bound = lower_bound(problem, cost, slots=6, latency=TOOL, workers=1)
    assert 0 <= steps[-1].end - steps[0].start - bound.engine_s < 3 * cost.step_s


def test_few_workers_bound_the_tools(policy: Policy) -> None:
    problem = plan_rollout(policy, SMALL)
    one, two = (lower_bound(problem, COST, slots=6, latency=TOOL, workers=workers) for workers in (1, 2))
    assert one.tools_s == pytest.approx(12 * TOOL.mean_s) == pytest.approx(2 * two.tools_s)
    assert one.seconds == one.tools_s


def test_every_side_finds_the_same_tokens_and_they_are_the_script(policy: Policy) -> None:
    problem = plan_rollout(policy, SMALL)
    rollouts = [_roll(side, problem) for side in (OURS, BARRIER, SERIAL)]
    assert_same_tokens(rollouts)
    for trajectory in rollouts[0].trajectories:
        turns = problem.episodes[trajectory.prompt.uid, trajectory.sample]
        script = [token for turn in turns for token in (*turn.body, *turn.action)]
        assert trajectory.token_ids[trajectory.policy_mask].tolist() == script
        assert [turn.tool for turn in trajectory.observations()] == ["search"] * (SMALL.turns - 1)


def test_a_side_that_changes_a_token_is_found_out(policy: Policy) -> None:
    problem = plan_rollout(policy, SMALL)
    ours, other = _roll(OURS, problem), _roll(BARRIER, problem)
    other.trajectories[4].token_ids[-1] += 1
    with pytest.raises(AssertionError, match=r"barrier each turn: overlap/1#1 differs"):
        assert_same_tokens([ours, other])


def test_behind_a_barrier_the_engine_never_runs_beside_a_tool(policy: Policy) -> None:
    problem = plan_rollout(policy, SMALL)
    assert _roll(BARRIER, problem).hidden_tools == pytest.approx(0, abs=1e-6)
    assert _roll(OURS, problem).hidden_tools > 0.05


def test_tools_one_by_one_take_their_sum(policy: Policy) -> None:
    problem = plan_rollout(policy, SMALL)
    latencies_s = 12 * TOOL.mean_s
    assert _roll(SERIAL, problem).seconds > latencies_s
    waited = sum(span.seconds for span in _roll(BARRIER, problem).spans if span.kind == "tool")
    queued = sum(span.seconds for span in _roll(SERIAL, problem).spans if span.kind == "tool")
    assert queued > 2 * waited  # of 6 calls at a time the last one waits for five others


def test_a_side_that_hangs_is_ended_by_its_deadline(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_sides, "_LONGEST_S", 0.2)
    with pytest.raises(AssertionError, match="arft_fast: overlap/"):
        _roll(OURS, plan_rollout(policy, SMALL), Latency(name="long", mean_s=30.0))


def test_a_call_takes_as_long_whoever_makes_it() -> None:
    tail = Latency(name="tail", mean_s=2.0, spread=1.0)
    assert tail.seconds("1 2 3") == tail.seconds("1 2 3") != tail.seconds("1 2 4")
    drawn = [tail.seconds(str(call)) for call in range(20_000)]
    assert np.mean(drawn) == pytest.approx(2.0, rel=0.05)
    assert np.quantile(drawn, 0.99) == pytest.approx(2.0 * math.exp(2.326 - 0.5), rel=0.1)
    assert tail.scaled(0.1).seconds("1 2 3") == pytest.approx(0.1 * tail.seconds("1 2 3"))


def test_turns_are_as_long_as_asked(policy: Policy) -> None:
    shape = replace(SMALL, groups=40, samples=8, turn_tokens=60, most_turn_tokens=1000)
    lengths = [len(turn) for turn in plan_rollout(policy, shape).script.values()]
    assert len(lengths) == shape.trajectories * shape.turns
    assert np.mean(lengths) == pytest.approx(60, rel=0.1)
    assert np.std(np.log(lengths)) == pytest.approx(shape.spread, rel=0.1)


def test_a_real_engine_samples_as_many_tokens_as_the_script_has(policy: Policy) -> None:
    shape = replace(SMALL, groups=1, turn_tokens=9, most_turn_tokens=14)
    problem = plan_rollout(policy, shape)

    def engine(timeline: Timeline) -> ForcedTurns:
        real = TransformersEngine(policy, slots=shape.trajectories, max_tokens=shape.most_tokens)
        return ForcedTurns(real, problem.script, timeline)

    rollouts = [roll_out(side, problem, engine, TOOL, workers=8, device=CPU) for side in (OURS, BARRIER)]
    assert_same_tokens(rollouts)
    for trajectory in rollouts[0].trajectories:
        turns = problem.episodes[trajectory.prompt.uid, trajectory.sample]
        assert trajectory.completion_length == sum(map(len, turns))
        assert 0 < rollouts[0].engine_busy <= 1


def test_samples_with_one_prompt_compute_it_once_and_are_not_changed_by_it(policy: Policy) -> None:
    shape = TrainShape(groups=1, samples=3, prompt_tokens=40, image=(56, 56), sampled_tokens=8)
    shared, each = make_prompts(policy, shape)
    assert shared.tokens == each.tokens == 40 and len(set(each.prompts)) == 3 > len(set(shared.prompts))
    together = play_together(shared)
    assert sum(generation.prefilled_tokens for generation in together) == 40
    assert sum(generation.prefilled_tokens for generation in play_together(each)) == 120
    alone = play_alone(shared)
    assert [g.token_ids for g in together] == [g.token_ids for g in alone]
    assert sum(generation.prefilled_tokens for generation in alone) == 120


def test_a_case_yields_its_figures_and_a_table(policy: Policy) -> None:
    case = Case(latency=Latency(name="a while", mean_s=0.05), draws=2, serial=True)
    draws = play_scripted(case, policy, replace(SMALL, turn_tokens=24), speed=10, tokens_per_id=2)
    figures = figures_of(case, draws)
    assert {"overlap.bound_ratio", "overlap.speedup_vs_barrier_600ms", "overlap.speedup_vs_serial_600ms"} <= set(
        figures
    )
    assert figures["overlap.bound_ratio"] >= 1
    table = table_of("a table", draws)
    assert [len(row.samples_ms) for row in table.rows] == [2, 2, 1]
    assert json.loads(json.dumps(asdict(table)))["rows"][0]["side"] == OURS.name
    assert any("tools one by one" in line for line in table.lines())


def test_speedups_are_of_the_case_of_600_ms() -> None:
    assert [case.latency.mean_s for case in CASES if case.serial] == [0.6]
