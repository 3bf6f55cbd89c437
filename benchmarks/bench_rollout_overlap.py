"""How much tool time a rollout hides behind generation, and what sharing a group's prompt saves.

Scripted engine: 64 trajectories of 4 turns on a cost model for one GPU with a model of a few billion parameters: a step
takes 12 ms and 0.06 ms more for each running sequence, a new context token 0.03 ms; a turn has 180 tokens on average,
lognormal; tools take up to 2 s. So that a run takes seconds, every duration is divided by ``SPEED`` and one id stands
for ``TOKENS_PER_ID`` tokens: ratios stay, but what agents and the event loop need themselves counts ``SPEED`` times as
much as it would, on every side. ``--sweep`` adds the same in real time.

Real engine: the tiny policy on ``TransformersEngine``, turns whose lengths spread alike, tools that take as long as a
turn. On CUDA a random model in the shape of Qwen2.5-VL-3B in bfloat16 takes its place.

All sides must find the same tokens before a figure exists.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch

from arft_fast.observe.timeline import Timeline
from arft_fast.policy.model import Policy
from arft_fast.rollout.engine import Generation
from arft_fast.rollout.transformers_engine import TransformersEngine

from .meter import MIB, Measurement, Sample, measure, peak_bytes
from .prompt_sharing import make_prompts, play_alone, play_together
from .rollout_bound import Bound, lower_bound
from .rollout_problem import Latency, RolloutShape, open_policy, plan_rollout, write_policy
from .rollout_sides import BARRIER, OURS, SERIAL, ForcedTurns, Rollout, Side, assert_same_tokens, roll_out
from .scripted_engine import ScriptedEngine, StepCost
from .table import Entry, Table, cell
from .train_problem import MERGED, TrainShape, write_3b

DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
SPEED, TOKENS_PER_ID, WORKERS = 15, 5, 64
COST = StepCost(step_s=12e-3, sequence_s=0.06e-3, prefill_s=0.03e-3)
SCRIPTED = RolloutShape(prompt_tokens=600, turn_tokens=180, most_turn_tokens=1280, observation_tokens=200)
REAL = {
    "cpu": RolloutShape(groups=4, prompt_tokens=40, turn_tokens=26, most_turn_tokens=112, observation_tokens=8),
    "cuda": RolloutShape(prompt_tokens=600, turn_tokens=60, most_turn_tokens=400, observation_tokens=60),
}
PROMPTS = {
    "cpu": TrainShape(groups=1),
    "cuda": TrainShape(name="3b", groups=1, prompt_tokens=1200, image=(616, 616), sampled_tokens=150),
}
SHARED, EACH = "one prompt, 8 samples", "8 prompts, a sample each"
ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class Case:
    """A tool, and what is worth its time."""

    latency: Latency
    draws: int = 1
    """Rollouts with lengths of their own."""
    serial: bool = False
    """The first draw also runs the tools one by one, which takes long."""


CASES = (
    Case(latency=Latency(name="no time", mean_s=0.0)),
    Case(latency=Latency(name="50 ms", mean_s=0.05)),
    Case(latency=Latency(name="0.6 s", mean_s=0.6), draws=3, serial=True),
    Case(latency=Latency(name="2 s, heavy tail", mean_s=2.0, spread=1.0)),
)


@dataclass(frozen=True)
class Draw:
    """One rollout by all sides, and the time below which none can be."""

    rollouts: Mapping[str, Rollout]
    bound: Bound | None = None

    def over_ours(self, side: str) -> float:
        """A side's time over that of this trainer's."""
        return self.rollouts[side].seconds / self.rollouts[OURS.name].seconds

    def over_bound(self, side: str) -> float:
        """A side's time over the least possible."""
        assert self.bound is not None, "the scripted engine has a bound"
        return self.rollouts[side].seconds / self.bound.seconds


@dataclass(frozen=True)
class OverlapRow(Entry):
    """One side: medians over the draws that it took part in."""

    ours_ratio: float
    """Its time over that of this trainer."""
    bound_ratio: float | None
    """Its time over the lower bound."""
    tokens_per_s: float
    """Sampled."""
    engine_busy: float
    """Share of the time in which the engine computes."""
    hidden_tools: float
    """Share of the time with a pending tool call in which it does."""

    def cells(self) -> Mapping[str, str]:
        return {
            **super().cells(),
            "x ours": cell(self.ours_ratio, 2),
            "x bound": cell(self.bound_ratio, 3),
            "tokens/s": cell(self.tokens_per_s, 0),
            "engine busy %": cell(100 * self.engine_busy, 1),
            "tools hidden %": cell(100 * self.hidden_tools, 1),
            "peak MiB": cell(self.peak_mib, 0),
        }


@dataclass(frozen=True)
class SharingRow(Entry):
    """A group's samples, with one prompt or several."""

    shared_ratio: float
    """Its time over that of the samples that share a prompt."""
    prefilled_tokens: int
    tokens_per_s: float
    """Sampled."""

    def cells(self) -> Mapping[str, str]:
        return {
            **super().cells(),
            "x shared": cell(self.shared_ratio, 2),
            "prefilled": cell(self.prefilled_tokens, 0),
            "tokens/s": cell(self.tokens_per_s, 0),
            "peak MiB": cell(self.peak_mib, 0),
        }


@pytest.fixture(scope="module")
def scripted_policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """Its tokenizer and template are used, its model is not."""
    return open_policy(write_policy(tmp_path_factory.mktemp("scripted")), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def policy(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """What the real engine samples from, with room for the prompt's image."""
    folder = tmp_path_factory.mktemp("real")
    source = write_policy(folder) if device.type == "cpu" else write_3b(folder, device).policy
    pixels = PROMPTS[device.type].most_pixels
    return open_policy(source, device, DTYPES[device.type], min_pixels=MERGED**2, max_pixels=pixels)


@pytest.fixture(autouse=True)
def frozen_garbage() -> Iterator[None]:
    """The collection before each run then looks at what the runs left, not at every module."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.latency.name)
def test_scripted_engine(case: Case, scripted_policy: Policy, figures: dict[str, float], tables: list[Table]) -> None:
    draws = play_scripted(case, scripted_policy, SCRIPTED, speed=SPEED, tokens_per_id=TOKENS_PER_ID)
    what = f"rollout on a scripted engine, {SPEED} times as fast"
    tables.append(table_of(f"{what}, tools take {case.latency.name}; {SCRIPTED}", draws))
    for name, value in figures_of(case, draws).items():
        worst = {"overlap.bound_ratio": max, "overlap.hidden_tool_fraction": min}.get(name)
        figures[name] = worst(value, figures.get(name, value)) if worst else value


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.latency.name)
def test_scripted_engine_in_real_time(
    case: Case, scripted_policy: Policy, tables: list[Table], pytestconfig: pytest.Config
) -> None:
    if not pytestconfig.getoption("--sweep"):
        pytest.skip("runs with --sweep")
    draws = play_scripted(replace(case, draws=1), scripted_policy, SCRIPTED, speed=1, tokens_per_id=1)
    tables.append(table_of(f"rollout on a scripted engine, tools take {case.latency.name}; {SCRIPTED}", draws))


@pytest.mark.timeout(900)
def test_real_engine(policy: Policy, device: torch.device, figures: dict[str, float], tables: list[Table]) -> None:
    shape = REAL[device.type]
    problem = plan_rollout(policy, shape)

    def engine(timeline: Timeline) -> ForcedTurns:
        real = TransformersEngine(policy, slots=shape.trajectories, max_tokens=shape.most_tokens)
        return ForcedTurns(real, problem.script, timeline)

    def play(side: Side, latency: Latency) -> Rollout:
        return roll_out(side, problem, engine, latency, workers=WORKERS, device=device)

    alone = play(OURS, Latency(name="no time", mean_s=0.0))
    turn_s = statistics.mean(span.seconds for span in alone.spans if span.kind == "generate")
    speedups = {}
    for kind, spread in (("even", 0.0), ("heavy_tail", 1.0)):
        name = f"as long as a turn, {kind.replace('_', ' ')}"
        latency = Latency(name=name, mean_s=turn_s, spread=spread)
        rollouts = [play(side, latency) for side in (OURS, BARRIER)]
        assert_same_tokens([alone, *rollouts])
        draw = Draw({rollout.side.name: rollout for rollout in rollouts})
        tables.append(table_of(f"rollout on TransformersEngine, tools take {turn_s:.2f} s, {name}; {shape}", [draw]))
        speedups[kind] = figures[f"overlap.real_engine_speedup_{kind}"] = draw.over_ours(BARRIER.name)
    figures["overlap.real_engine_speedup"] = statistics.geometric_mean(speedups.values())


@pytest.mark.timeout(900)
def test_samples_share_their_prompt(
    policy: Policy, device: torch.device, figures: dict[str, float], tables: list[Table]
) -> None:
    shared, each = make_prompts(policy, PROMPTS[device.type])
    calls = {SHARED: partial(play_together, shared), EACH: partial(play_together, each)}
    found, peaks = {}, {}
    for name, call in calls.items():
        found[name], peaks[name] = _first_run(call, device)
    assert [g.token_ids for g in found[SHARED]] == [g.token_ids for g in play_alone(shared)], "company changes samples"
    prefilled = {name: sum(generation.prefilled_tokens for generation in found[name]) for name in calls}
    assert prefilled[EACH] == len(each.prompts) * each.tokens, "prompts that differ in their first token share nothing"
    measured = measure(calls, ROUNDS, device, lambda: None, {}, peaks=False)
    table = Table(f"samples of a prompt on TransformersEngine; {PROMPTS[device.type]}")
    for name, measurement in measured.items():
        sampled = sum(len(generation.token_ids) for generation in found[name])
        table.rows.append(
            SharingRow(
                side=name,
                ms=measurement.ms,
                samples_ms=measurement.samples_ms,
                peak_mib=peaks[name],
                shared_ratio=measurement.over(measured[SHARED]),
                prefilled_tokens=prefilled[name],
                tokens_per_s=1e3 * sampled / measurement.ms,
            )
        )
    tables.append(table)
    figures["rollout.prefilled_per_prompt_token"] = prefilled[SHARED] / shared.tokens
    figures["rollout.prefix_sharing_speedup"] = measured[EACH].over(measured[SHARED])


def _first_run(call: Callable[[], list[Generation]], device: torch.device) -> tuple[list[Generation], float | None]:
    """What was generated, and the peak memory in MiB."""
    found: list[Generation] = []
    peak = peak_bytes(lambda: found.extend(call()), device)
    return found, None if peak is None else peak / MIB


def play_scripted(case: Case, policy: Policy, shape: RolloutShape, *, speed: float, tokens_per_id: int) -> list[Draw]:
    """All draws of a case, every duration divided by ``speed``, every number of tokens by ``tokens_per_id``."""
    latency, cost = case.latency.scaled(1 / speed), COST.scaled(tokens_per_id / speed)
    slots, device = shape.trajectories, torch.device("cpu")
    draws = []
    for seed in range(case.draws):
        problem = plan_rollout(policy, shape.scaled(1 / tokens_per_id), seed=(seed, 0))
        lines = {key: (*turn.body, *turn.action) for key, turn in problem.script.items()}
        engine = partial(ScriptedEngine, lines, cost, slots=slots)
        sides = [OURS, BARRIER, *([SERIAL] if case.serial and seed == 0 else [])]
        rollouts = [roll_out(side, problem, engine, latency, workers=WORKERS, device=device) for side in sides]
        assert_same_tokens(rollouts)
        bound = lower_bound(problem, cost, slots=slots, latency=latency, workers=WORKERS)
        draws.append(Draw({rollout.side.name: rollout for rollout in rollouts}, bound))
    return draws


def figures_of(case: Case, draws: Sequence[Draw]) -> dict[str, float]:
    """The named figures of a case on the scripted engine: medians over its draws; of hidden tool time the least."""
    figures = {"bound_ratio": statistics.median(draw.over_bound(OURS.name) for draw in draws)}
    if case.serial:
        figures["speedup_vs_barrier_600ms"] = statistics.median(draw.over_ours(BARRIER.name) for draw in draws)
        figures["speedup_vs_serial_600ms"] = draws[0].over_ours(SERIAL.name)
    engine_bound = [draw for draw in draws if draw.bound and draw.bound.engine_s > draw.bound.chain_s]
    if case.latency.mean_s and engine_bound:
        figures["hidden_tool_fraction"] = min(draw.rollouts[OURS.name].hidden_tools for draw in engine_bound)
    return {f"overlap.{name}": value for name, value in figures.items()}


def table_of(title: str, draws: Sequence[Draw]) -> Table:
    """A row for each side."""
    table = Table(title)
    for name in draws[0].rollouts:
        table.rows.append(_row(name, [draw for draw in draws if name in draw.rollouts]))
    return table


def _row(name: str, draws: Sequence[Draw]) -> OverlapRow:
    rollouts = [draw.rollouts[name] for draw in draws]
    measured = Measurement(tuple(Sample(rollout.seconds, rollout.peak_bytes) for rollout in rollouts))
    bound_ratios = [draw.over_bound(name) for draw in draws if draw.bound is not None]
    return OverlapRow(
        side=name,
        ms=measured.ms,
        samples_ms=measured.samples_ms,
        peak_mib=measured.peak_mib,
        ours_ratio=statistics.median(draw.over_ours(name) for draw in draws),
        bound_ratio=statistics.median(bound_ratios) if bound_ratios else None,
        tokens_per_s=statistics.median(rollout.sampled_tokens / rollout.seconds for rollout in rollouts),
        engine_busy=statistics.median(rollout.engine_busy for rollout in rollouts),
        hidden_tools=statistics.median(rollout.hidden_tools for rollout in rollouts),
    )
