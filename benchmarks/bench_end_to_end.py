"""Whole GRPO steps (rollout, rewards, advantages, update) of this trainer, beside those of others. Single turn.

The sides: this trainer as a run uses it (embedded engine, agent, ``grpo_update``); ``plain_rollout`` with
``plain_reference``, which are written as Visual-ARFT's trainer is; TRL's own trainer with its transformers generation.
All sample the same number of tokens. A side is timed only when its samples are drawn from the policy, its advantages
are right, and its loss, all its gradients and its metrics are those of the plain reference on its samples.

On CUDA a random model in the shape of Qwen2.5-VL-3B in bfloat16 takes the place of the tiny one, and one side at a time
is in memory.
"""

from __future__ import annotations

import gc
import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from arft_fast.trajectory import Prompt

from .end_to_end_sides import OURS, PLAIN, TRL, Side, builders
from .meter import Measurement, measure
from .step_judge import Judge, open_judge
from .step_problem import OneTurn
from .table import Entry, Table, cell
from .train_problem import TrainShape, open_policies, write_3b, write_tiny

SHAPES = {
    "cpu": TrainShape(name="tiny"),
    "cuda": TrainShape(name="3b", prompt_tokens=1200, image=(616, 616), sampled_tokens=150),
}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
ROUNDS = 3
STEPS_BEFORE = 2
"""A side's rehearsal, and the step that tells its peak memory."""


@dataclass(frozen=True)
class StepRow(Entry):
    """One side; the two parts of its step are medians of their own."""

    rollout_ms: float
    update_ms: float
    """What is not rollout: rewards and the reference's scores are counted here or there as each trainer has them."""
    speedup: float
    """Of this trainer over it."""
    sampled_per_s: float
    """Tokens that it sampled over the time of the whole step."""
    gradient_error: float
    """Against the plain reference on its own samples, of the parameter where it is largest."""

    def cells(self) -> Mapping[str, str]:
        return {
            **super().cells(),
            "rollout": cell(self.rollout_ms, 0),
            "update": cell(self.update_ms, 0),
            "x ours": cell(self.speedup, 2),
            "sampled/s": cell(self.sampled_per_s, 0),
            "peak MiB": cell(self.peak_mib, 0),
            "gradient": f"{self.gradient_error:.0e}",
        }


@dataclass
class Player:
    """Lets an admitted side do one step after the other, on new prompts each time."""

    side: Side
    steps: Iterator[Sequence[Prompt]]
    gradient_error: float
    rollouts_s: list[float] = field(default_factory=list)

    def __call__(self) -> None:
        self.rollouts_s.append(self.side.step(next(self.steps)))


@pytest.mark.timeout(1800)
def test_whole_steps_beside_the_plain_ones_and_trl(
    device: torch.device, figures: dict[str, float], tables: list[Table], tmp_path: Path
) -> None:
    shape, dtype = SHAPES[device.type], DTYPES[device.type]
    models = write_tiny(tmp_path) if device.type == "cpu" else write_3b(tmp_path, device)
    task = OneTurn(open_policies(models, shape, device, dtype)[0], shape, steps=STEPS_BEFORE + ROUNDS)
    sides = builders(models, tmp_path / "trl", task, device, dtype)
    table, found = contest(
        f"one GRPO step with its rollout; {shape}", task, sides, lambda: open_judge(models, task, device, dtype), device
    )
    tables.append(table)
    figures.update(figures_of(found))


def contest(
    title: str,
    task: OneTurn,
    sides: Mapping[str, Callable[[], Side]],
    judge: Callable[[], Judge],
    device: torch.device,
    *,
    rounds: int = ROUNDS,
) -> tuple[Table, dict[str, Measurement]]:
    """Gate the sides, then time them: on a CPU turn by turn, on a GPU one after the other, for want of room.

    A peer that does not pass is left out, with the reason in the table; ours must pass.
    """
    table = Table(title)
    found: dict[str, Measurement] = {}
    for names in [list(sides)] if device.type == "cpu" else [[name] for name in sides]:
        players: dict[str, Player] = {}
        for name in names:
            try:
                players[name] = admit(sides[name], judge, task)
            except Exception as error:  # whatever a peer raises becomes a line of the table
                if name in (OURS, PLAIN):
                    raise
                table.left_out[name] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:120]}"
        peaks = measure(players, 1, device, lambda: None, table.left_out)
        times = measure(players, rounds - 1, device, lambda: None, table.left_out, peaks=False)
        for name, timed in times.items():
            found[name] = Measurement(peaks[name].samples + timed.samples)
            table.rows.append(_row(name, found[name], found[OURS], players[name], task.shape))
        del players
        if device.type == "cuda":
            gc.collect()  # a trainer refers to itself
            torch.cuda.empty_cache()
    return table, found


def admit(build: Callable[[], Side], judge: Callable[[], Judge], task: OneTurn) -> Player:
    """A side that has shown in a rehearsal of the first step that it does what all do.

    Raises:
        AnotherStep: it does something else.
    """
    side = build()
    errors = judge().examine(side, task.of_step(0))
    return Player(side, map(task.of_step, itertools.count(1)), errors.gradient)


def _row(name: str, found: Measurement, ours: Measurement, player: Player, shape: TrainShape) -> StepRow:
    rollouts_ms = [1e3 * seconds for seconds in player.rollouts_s[1:]]  # the first one was for the peak
    updates_ms = [whole - part for whole, part in zip(found.samples_ms, rollouts_ms, strict=True)]
    return StepRow(
        side=name,
        ms=found.ms,
        samples_ms=found.samples_ms,
        peak_mib=found.peak_mib,
        rollout_ms=statistics.median(rollouts_ms),
        update_ms=statistics.median(updates_ms),
        speedup=found.over(ours),
        sampled_per_s=1e3 * shape.groups * shape.samples * shape.sampled_tokens / found.ms,
        gradient_error=player.gradient_error,
    )


def figures_of(found: Mapping[str, Measurement]) -> dict[str, float]:
    """The named figures; one whose side was left out is missing."""
    ours = found[OURS]
    figures = {"step_ms": ours.ms}
    for key, name in {"plain": PLAIN, "trl": TRL}.items():
        if name not in found:
            continue
        figures[f"speedup_vs_{key}"] = found[name].over(ours)
        theirs = found[name].peak_mib
        if ours.peak_mib is not None and theirs:
            figures[f"peak_vs_{key}"] = ours.peak_mib / theirs
    return {f"end_to_end.{name}": value for name, value in figures.items()}
