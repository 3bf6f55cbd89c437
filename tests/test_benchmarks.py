"""The harness of the benchmarks: its sides solve one problem, its meter measures, its files hold what they promise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import peers, plot, table
from benchmarks.accuracy import Outcome, errors_of, gate
from benchmarks.bench_policy_loss import figures_of, variants
from benchmarks.contest import FLOOR, contest
from benchmarks.meter import MIB, Measurement, Sample, measure, peak_bytes
from benchmarks.problem import Problem, make_problem
from benchmarks.sides import (
    OURS,
    PLAIN,
    Side,
    linear_logprob_sides,
    policy_loss_sides,
    scoring,
    training,
)

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
NEEDS_CUDA = ("Liger on logits", "verl")
POLICY_SIDES = {
    side.name: side
    for side in policy_loss_sides(CPU)
    if not side.name.startswith(NEEDS_CUDA) and not side.compiled and "TF32" not in side.name
}
SCORING_SIDES = {
    side.name: side for side in linear_logprob_sides(CPU, gradient=False) if not side.name.startswith(NEEDS_CUDA)
}


def tiny(masked: float = 0.0) -> Problem:
    """N=12, D=8, V=31, B=3, with clipped tokens."""
    return make_problem(12, 8, 31, 3, device=CPU, dtype=torch.float32, drift=0.4, masked=masked, seed=1)


def plain(problem: Problem) -> Outcome:
    return training(peers.loss_on(peers.plain_logprobs))(problem)


@pytest.mark.parametrize("name", POLICY_SIDES)
def test_a_side_finds_the_loss_and_the_gradients_of_float64(name: str) -> None:
    problem = tiny(masked=0.3)
    errors = errors_of(POLICY_SIDES[name].step, problem, plain(problem.to(torch.float64)))
    assert errors.loss < 1e-6
    assert set(errors.tensors) == {"hidden", "weight"} and max(errors.tensors.values()) < 1e-5


@pytest.mark.parametrize("side", linear_logprob_sides(CPU, gradient=True)[:4], ids=lambda side: side.name)
def test_log_probs_under_an_outer_loss_give_the_same_gradients(side: Side) -> None:
    problem = tiny(masked=0.3)
    errors = errors_of(side.step, problem, plain(problem.to(torch.float64)))
    assert max(errors.tensors.values()) < 1e-5


@pytest.mark.parametrize("name", SCORING_SIDES)
def test_a_side_scores_as_float64_does(name: str) -> None:
    problem = tiny()
    errors = errors_of(SCORING_SIDES[name].step, problem, scoring(peers.plain_logprobs)(problem.to(torch.float64)))
    assert set(errors.tensors) == {"logprobs", "entropy"} and max(errors.tensors.values()) < 1e-5


def test_the_tiny_problem_clips_and_masks() -> None:
    problem = tiny(masked=0.3)
    logprobs, _ = peers.plain_logprobs(problem)
    ratio = (logprobs - problem.old_logprobs).exp()
    assert ((ratio - 1).abs() > 0.2).any() and not problem.mask.all()


def test_a_peer_with_another_loss_is_left_out() -> None:
    left_out: dict[str, str] = {}
    sides = {"twice": training(lambda problem: 2 * peers.loss_on(peers.plain_logprobs)(problem)), "same": plain}
    assert set(gate(sides, set(), plain, tiny(), left_out)) == {"same"}
    assert "twice" in left_out


def test_a_peer_that_fails_is_left_out_with_its_error() -> None:
    def missing(problem: Problem) -> Outcome:
        raise ModuleNotFoundError("No module named 'peer'")

    left_out: dict[str, str] = {}
    gate({"peer": missing}, set(), plain, tiny(), left_out)
    assert left_out == {"peer": "ModuleNotFoundError: No module named 'peer'"}


def test_ours_may_not_be_wrong() -> None:
    def rounded(problem: Problem) -> Outcome:
        loss, gradients = plain(problem)
        return Outcome(loss, {name: gradient.bfloat16() for name, gradient in gradients.items()})

    with pytest.raises(AssertionError, match="times the error of PyTorch"):
        gate({OURS: rounded}, {OURS}, plain, tiny(), {})


def test_the_meter_sees_an_allocation_that_was_freed() -> None:
    def allocate() -> None:
        torch.ones(64 * MIB, dtype=torch.int8)

    peak = peak_bytes(allocate, CPU)
    if peak is None:
        pytest.skip("this system does not tell a process's peak memory")
    assert 60 * MIB < peak < 72 * MIB


def test_the_meter_does_not_see_what_was_there_before() -> None:
    held = torch.ones(64 * MIB, dtype=torch.int8)
    peak_bytes(lambda: torch.ones(64 * MIB, dtype=torch.int8), CPU)  # a higher mark, which the next one has to reset
    peak = peak_bytes(lambda: held[:10].sum(), CPU)
    if peak is None:
        pytest.skip("this system does not tell a process's peak memory")
    assert peak < 8 * MIB


def test_sides_take_turns_and_gradients_are_freed_before_each_run() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    found = measure(calls, 2, CPU, lambda: order.append("free"), {})
    assert order == (["free", "a"] * 2 + ["free", "b"] * 2) * 2  # a turn is two runs
    assert all(len(measurement.samples) == 2 for measurement in found.values())


def test_a_turn_without_peaks_is_one_run() -> None:
    order: list[str] = []
    found = measure({"a": lambda: order.append("a")}, 2, CPU, lambda: order.append("free"), {}, peaks=False)
    assert order == ["free", "free", "a"] * 2
    assert found["a"].peak_mib is None


def test_ratios_compare_sides_within_a_round() -> None:
    slow_later = Measurement(tuple(Sample(seconds, None) for seconds in (1.0, 1.0, 9.0, 9.0)))
    twice = Measurement(tuple(Sample(2 * each.seconds, None) for each in slow_later.samples))
    assert twice.over(slow_later) == 2.0 and slow_later.peak_mib is None


def test_a_contest_names_those_who_cannot_take_part() -> None:
    problem = tiny()
    sides = [Side(OURS, POLICY_SIDES[OURS].step), Side(PLAIN, plain), Side("far", plain, cuda_only=True)]
    found, _ = contest("tiny", problem, sides, peers.bare_products(problem), device=CPU, rounds=2)
    assert [row.side for row in found.rows] == [FLOOR, OURS, PLAIN]
    assert found.left_out == {"far": "runs on CUDA only"}
    assert problem.hidden.grad is None
    assert "left out" in "\n".join(found.lines())


def test_a_share_of_the_sequences_stays_live() -> None:
    problem = make_problem(32, 8, 31, 8, device=CPU, dtype=torch.float32)
    assert problem.live == 1.0
    assert problem.with_live(0.25).live == 0.25
    assert problem.with_live(0.25).hidden is problem.hidden


def test_every_named_figure_of_policy_loss_is_there() -> None:
    problem = tiny()
    names = [FLOOR, *(side.name for side in policy_loss_sides(CPU)), *variants(problem)]
    figures = figures_of({name: Measurement((Sample(1.0, MIB),)) for name in names})
    peers_named = ("liger", "liger_compiled", "liger_uncompiled", "trl", "naive", "compiled")
    others = {"floor_ratio", "ms", "peak_mib", "peak_vs_naive", "live25_vs_full"}
    wanted = {f"policy_loss.{name}" for name in (others | {f"speedup_vs_{peer}" for peer in peers_named})}
    assert set(figures) == wanted


def test_the_figures_file_is_flat_json(tmp_path: Path) -> None:
    benchmark = tmp_path / "bench_nothing.py"
    benchmark.write_text("def test_nothing(figures):\n    figures['nothing.ratio'] = 1.5\n")
    out = tmp_path / "figures.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.conftest", "--rootdir", str(tmp_path)]
    subprocess.run(
        [*command, "-c", str(ROOT / "pyproject.toml"), str(benchmark), "--figures", str(out)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    assert json.loads(out.read_text()) == {"nothing.ratio": 1.5}


def test_the_columns_of_a_table_are_as_wide_as_what_stands_in_them() -> None:
    rows: list[table.Entry] = [
        table.Row("a", 12345.678, (12000.0,), None, 1.0, None),
        table.Row("longer", 1.0, (1.0,), 7.0, 10.0, 1.0),
    ]
    title, head, first, second, reason = table.Table("title", rows, {"b": "why"}).lines()
    assert (title, reason) == ("title", "  b: left out (why)")
    assert len(head) == len(first) == len(second)
    assert first.split() == ["a", "12,345.68", "12,000.00", "1.00", "-", "-"]


def test_a_record_can_be_drawn(tmp_path: Path) -> None:
    rows: list[table.Entry] = [table.Row(OURS, 1.0, (0.9, 1.1), None, 1.05, 1.0)]
    points = [table.Point(axis, 8, 4, 16, 0.5, OURS, 1.0, 2.0) for axis in "NVf"]
    path = table.write_record(tmp_path, CPU, ["benchmarks"], [table.Table("title", rows)], points, {"a.b": 1.0})
    record = json.loads(path.read_text())
    assert record["command"] == "pytest benchmarks" and record["figures"] == {"a.b": 1.0}
    assert record["versions"]["torch"] == torch.__version__
    plot.draw(record, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
