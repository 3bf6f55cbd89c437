"""The prefix tree beside what it replaces: forward and backward of a policy that reads images, G = 8 samples a prompt.

Every side runs once on each shape before anything is timed: for its loss and gradients, which must be those of the
padded batch, and for its peak memory and its floating-point operations, counted beside the formula of ``theory``. On a
CPU a small shape also runs in float64. Then the sides take turns.

On CUDA a random model in the shape of Qwen2.5-VL-3B in bfloat16 takes the place of the tiny one.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor

from arft_fast.observe.theory import ModelShape, train_flops
from arft_fast.policy.model import Policy

from .exact import no_float32
from .flops import counted_flops
from .meter import MIB, Measurement, measure, peak_bytes, seconds
from .table import Entry, Table, cell
from .train_problem import ToolTurn, TrainShape, make_problem, open_policies, write_3b, write_tiny
from .tree_sides import CASCADE, DENSE, PACKED, PADDED, SIDES, TreeStep, steps_of

Policies = tuple[Policy, Policy]
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
AT_MOST = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.3}
"""Of the loss, and of the gradient of the parameter where it is worst: the relative error that rounding may make."""
COLLATIONS = 3


@dataclass(frozen=True, kw_only=True)
class Case:
    """A shape, and what is worth its time."""

    shape: TrainShape
    rounds: int
    dense: bool = True
    """The mask costs S^2 pairs: with many rows it takes minutes to lose."""
    helps: bool = True
    """False: the samples hardly share anything, and the tree must not cost much."""
    sweep: bool = False
    """Runs with ``--sweep`` only."""


def shape(name: str, prompt: int, sampled: int, image: tuple[int, int] | None, *turns: ToolTurn) -> TrainShape:
    """One group of 8 samples."""
    return TrainShape(
        name=name, groups=1, samples=8, prompt_tokens=prompt, sampled_tokens=sampled, image=image, turns=turns
    )


TURN = ToolTurn(sampled=100, observed=300, image=(280, 392))
CASES = (
    Case(shape=shape("p600_r75", 600, 75, (336, 560)), rounds=5),
    Case(shape=shape("p1200_r150", 1200, 150, (560, 700)), rounds=5),
    Case(shape=shape("p1500_r250", 1500, 250, (448, 896)), rounds=2),
    Case(shape=shape("p128_r512", 128, 512, None), rounds=7, dense=False, helps=False),
    Case(shape=shape("p64_r512", 64, 512, None), rounds=7, dense=False, helps=False),
    Case(shape=shape("shared_turns", 1500, 150, (448, 896), replace(TURN, distinct=4), TURN), rounds=1, dense=False),
    Case(shape=shape("turns", 1500, 150, (448, 896), TURN, TURN), rounds=1, dense=False),
    Case(shape=shape("p4000_r300", 4000, 300, (1680, 1680)), rounds=1, dense=False, sweep=True),
)
EXACT = shape(
    *("float64", 160, 32, (112, 140)),
    ToolTurn(sampled=20, observed=40, image=(84, 112), distinct=4),
    ToolTurn(sampled=20, observed=40, image=(84, 112)),
)
"""Small: a CPU is slow in float64. It has all that the others have."""
LARGEST = max((case.shape for case in CASES), key=lambda shape: shape.most_pixels)


@dataclass(frozen=True)
class Proof:
    """What a side's first run shows."""

    flops: int
    peak_bytes: int | None
    loss_error: float
    """Relative to the first side, as the gradient's, which is that of the parameter where it is largest."""
    gradient_error: float


@dataclass(frozen=True)
class TreeRow(Entry):
    """One side on one shape."""

    shape: str
    padded_ratio: float | None
    """The padded batch's time over its own."""
    tokens: int
    """That go through the model."""
    flops: int
    """Counted."""
    formula_flops: int
    batch_ms: float
    """To make the batch of the trajectories, which the time does not include."""
    loss_error: float
    gradient_error: float

    @property
    def formula_error(self) -> float:
        return abs(self.formula_flops / self.flops - 1)

    def cells(self) -> Mapping[str, str]:
        return {
            **super().cells(),
            "x padded": cell(self.padded_ratio, 2),
            "peak MiB": cell(self.peak_mib, 0),
            "tokens": cell(self.tokens, 0),
            "GFLOP": cell(self.flops / 1e9, 2),
            "formula": cell(self.formula_flops / 1e9, 2),
            "off %": cell(100 * self.formula_error, 3),
            "gradient": f"{self.gradient_error:.0e}",
            "batch ms": cell(self.batch_ms, 1),
        }


@pytest.fixture(scope="module")
def policies(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Policies:
    """The policy and its reference, with room for the largest image."""
    folder = tmp_path_factory.mktemp("models")
    models = write_tiny(folder) if device.type == "cpu" else write_3b(folder, device)
    return open_policies(models, LARGEST, device, DTYPES[device.type])


def test_all_sides_agree_in_float64(policies: Policies, device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("attention on a GPU knows no float64")
    policy, reference = (replace(each, model=copy.deepcopy(each.model).double()) for each in policies)
    with no_float32():
        prove(steps_of(policy, reference, make_problem(policy, EXACT), SIDES), device, {})


@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.shape.name)
def test_beside_padded_and_packed(
    case: Case,
    policies: Policies,
    device: torch.device,
    figures: dict[str, float],
    tables: list[Table],
    pytestconfig: pytest.Config,
) -> None:
    if case.sweep and not pytestconfig.getoption("--sweep"):
        pytest.skip("runs with --sweep")
    table, found = contest(case, policies, device)
    tables.append(table)
    for name, value in figures_of(case, table, found).items():
        worst = name in ("prefix_tree.flops_error", "prefix_tree.worst_case_slowdown")
        figures[name] = max(value, figures.get(name, value)) if worst else value


def contest(case: Case, policies: Policies, device: torch.device) -> tuple[Table, dict[str, Measurement]]:
    """The table of one shape and the measurements behind it."""
    policy, reference = policies
    problem = make_problem(policy, case.shape)
    table = Table(f"prefix tree, forward and backward; {case.shape}")
    sides = [side for side in SIDES if case.dense or side.name != DENSE]
    if not case.dense:
        table.left_out[DENSE] = "computes S^2 pairs"
    steps = {step.side.name: step for step in steps_of(policy, reference, problem, sides)}
    proofs = prove(list(steps.values()), device, table.left_out)
    calls = {name: steps[name] for name in proofs}
    forget = next(iter(steps.values())).forget_gradients
    found = measure(calls, case.rounds, device, forget, table.left_out, peaks=False)
    forget()
    model = ModelShape.of(policy.model.config)
    for name, measurement in found.items():
        step, proof = steps[name], proofs[name]
        collate = partial(step.side.collate, policy, problem.trajectories)
        table.rows.append(
            TreeRow(
                side=name,
                ms=measurement.ms,
                samples_ms=measurement.samples_ms,
                peak_mib=None if proof.peak_bytes is None else proof.peak_bytes / MIB,
                shape=case.shape.name,
                padded_ratio=found[PADDED].over(measurement) if PADDED in found else None,
                tokens=step.batch.input_ids.numel(),
                flops=proof.flops,
                formula_flops=train_flops(model, step.side.work(model, step.batch)),
                batch_ms=1e3 * statistics.median(seconds(collate, device) for _ in range(COLLATIONS)),
                loss_error=proof.loss_error,
                gradient_error=proof.gradient_error,
            )
        )
    return table, found


def prove(steps: Sequence[TreeStep], device: torch.device, left_out: dict[str, str]) -> dict[str, Proof]:
    """Run each side once; all must find the loss and the gradients of the first one.

    One that runs out of GPU memory goes to ``left_out``.
    """
    truth: tuple[float, dict[str, Tensor]] | None = None
    proofs = {}
    for step in steps:
        step.forget_gradients()
        try:
            loss, flops, peak = _first_run(step, device)
        except torch.OutOfMemoryError:
            left_out[step.side.name] = "out of GPU memory"
            step.forget_gradients()
            torch.cuda.empty_cache()
            continue
        found = loss, step.take_gradients()
        truth = truth or found
        proof = Proof(flops, peak, abs(loss / truth[0] - 1), _gradient_error(found[1], truth[1]))
        allowed = AT_MOST[step.policy.model.dtype]
        for what, error in (("loss", proof.loss_error), ("gradient", proof.gradient_error)):
            assert error <= allowed, f"{step.side.name}: the {what} is off by {error:.1e}, allowed {allowed:.0e}"
        proofs[step.side.name] = proof
    return proofs


def _first_run(step: TreeStep, device: torch.device) -> tuple[float, int, int | None]:
    """Loss, counted operations and peak memory; gradients stay in the parameters."""
    losses: list[Tensor] = []

    def run() -> None:
        losses.append(step())

    with counted_flops() as count:
        peak = peak_bytes(run, device)
    return float(losses[0]), count.total, peak


def _gradient_error(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Relative, of the parameter where it is largest."""
    assert found.keys() == truth.keys(), "all sides train the same parameters"
    return max(
        float((found[name].double() - exact.double()).norm() / exact.double().norm()) for name, exact in truth.items()
    )


def figures_of(case: Case, table: Table, found: Mapping[str, Measurement]) -> dict[str, float]:
    """The named figures of one shape; one whose side was left out is missing."""
    rows = {row.side: row for row in table.rows if isinstance(row, TreeRow)}
    if CASCADE not in rows:
        return {}
    tree, name = rows[CASCADE], case.shape.name
    figures = {"flops_error": max(row.formula_error for row in rows.values())}
    if PADDED in rows:
        padded = rows[PADDED]
        figures[f"speedup_{name}"] = found[PADDED].over(found[CASCADE])
        if tree.peak_mib is not None and padded.peak_mib:
            figures[f"peak_ratio_{name}"] = tree.peak_mib / padded.peak_mib
    if PACKED in rows:
        figures[f"tokens_ratio_{name}"] = rows[PACKED].tokens / tree.tokens
    if not case.helps and PADDED in rows and PACKED in rows:
        figures["worst_case_slowdown"] = max(found[CASCADE].over(found[side]) for side in (PADDED, PACKED)) - 1
    return {f"prefix_tree.{name}": value for name, value in figures.items()}
