"""One whole update (reference, policy, loss, backward pass, optimizer) of this trainer, beside those of others.

The sides: ``grpo_update`` as a run calls it, and without its prefix tree; ``plain_reference``, which is written as
Visual-ARFT's trainer is; TRL's own trainer. A side is timed only when its loss, all its gradients and its metrics are
those of the plain reference.

On CUDA a random model in the shape of Qwen2.5-VL-3B in bfloat16 takes the place of the tiny one, and one side at a time
is in memory. The peers' AdamW then steps on the bfloat16 weights; ours on float32 copies, which costs it time and room.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from .meter import Measurement, measure
from .table import Entry, Table, cell
from .train_problem import TrainProblem, TrainShape, make_problem, open_policies, write_3b, write_tiny
from .train_sides import OURS, PLAIN, TRL, Found, Side, admit, builders

SHAPES = {
    "cpu": TrainShape(name="tiny"),
    "cuda": TrainShape(name="3b", prompt_tokens=1200, image=(616, 616), sampled_tokens=150),
}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
ROUNDS = 5


@dataclass(frozen=True)
class StepRow(Entry):
    """One side; tokens are those of all samples with their prompts, computed or not."""

    speedup: float
    """Of this trainer over it."""
    tokens_per_s: float
    samples_per_s: float
    gradient_error: float
    """Against the plain reference, of the parameter where it is largest."""

    def cells(self) -> Mapping[str, str]:
        return {
            **super().cells(),
            "x ours": cell(self.speedup, 2),
            "tokens/s": cell(self.tokens_per_s, 0),
            "samples/s": cell(self.samples_per_s, 2),
            "peak MiB": cell(self.peak_mib, 0),
            "gradient": f"{self.gradient_error:.0e}",
        }


@pytest.mark.timeout(1800)
def test_a_whole_update_beside_the_plain_one_and_trl(
    device: torch.device, figures: dict[str, float], tables: list[Table], tmp_path: Path
) -> None:
    shape, dtype = SHAPES[device.type], DTYPES[device.type]
    models = write_tiny(tmp_path) if device.type == "cpu" else write_3b(tmp_path, device)
    problem = make_problem(open_policies(models, shape, device, dtype)[0], shape)
    sides = builders(models, tmp_path / "trl", shape, problem, device, dtype)
    table, found = contest(f"one GRPO update; {shape}", problem, sides, device, dtype, rounds=ROUNDS)
    tables.append(table)
    figures.update(figures_of(found, problem))


def contest(
    title: str,
    problem: TrainProblem,
    sides: Mapping[str, Callable[[], Side]],
    device: torch.device,
    dtype: torch.dtype,
    *,
    rounds: int,
) -> tuple[Table, dict[str, Measurement]]:
    """Gate the sides, then time them: on a CPU turn by turn, on a GPU one after the other, for want of room.

    A peer that does not pass is left out, with the reason in the table; ours must pass.
    """
    table = Table(title)
    errors: dict[str, float] = {}
    found: dict[str, Measurement] = {}
    truth: Found | None = None
    for names in [list(sides)] if device.type == "cpu" else [[name] for name in sides]:
        made: dict[str, Side] = {}
        for name in names:
            try:
                made[name], update, distance = admit(sides[name], truth, dtype)
            except Exception as error:  # whatever a peer raises becomes a line of the table
                if name.startswith((OURS, PLAIN)):
                    raise
                table.left_out[name] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:120]}"
            else:
                truth, errors[name] = truth or update, distance.gradient
        calls = {name: side.update for name, side in made.items()}
        found |= measure(calls, rounds, device, lambda: None, table.left_out)
        del made, calls
        if device.type == "cuda":
            gc.collect()  # a trainer refers to itself
            torch.cuda.empty_cache()
    for name, measurement in found.items():
        table.rows.append(_row(name, measurement, found[OURS], problem, errors[name]))
    return table, found


def _row(name: str, found: Measurement, ours: Measurement, problem: TrainProblem, error: float) -> StepRow:
    seconds = found.ms / 1e3
    return StepRow(
        side=name,
        ms=found.ms,
        samples_ms=found.samples_ms,
        peak_mib=found.peak_mib,
        speedup=found.over(ours),
        tokens_per_s=problem.tokens / seconds,
        samples_per_s=len(problem.trajectories) / seconds,
        gradient_error=error,
    )


def figures_of(found: Mapping[str, Measurement], problem: TrainProblem) -> dict[str, float]:
    """The named figures; one whose side was left out is missing."""
    ours = found[OURS]
    figures = {"ms": ours.ms, "tokens_per_s": 1e3 * problem.tokens / ours.ms}
    for key, name in {"plain": PLAIN, "trl": TRL}.items():
        if name not in found:
            continue
        figures[f"speedup_vs_{key}"] = found[name].over(ours)
        theirs = found[name].peak_mib
        if ours.peak_mib is not None and theirs:
            figures[f"peak_vs_{key}"] = ours.peak_mib / theirs
    return {f"train_step.{name}": value for name, value in figures.items()}
