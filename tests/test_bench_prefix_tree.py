"""The benchmark of the prefix tree: its sides do the same, differ in what they repeat, and a wrong one is found out."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from arft_fast.kernels.attention_tree import AttentionTree, Node
from arft_fast.observe.theory import ModelShape, causal_pairs, train_flops
from arft_fast.policy.model import Policy
from benchmarks import bench_prefix_tree, plot_prefix_tree, table
from benchmarks.bench_prefix_tree import CASES, Case, TreeRow, contest, figures_of, prove
from benchmarks.exact import no_float32
from benchmarks.meter import Measurement, Sample
from benchmarks.train_problem import ToolTurn, TrainProblem, TrainShape, make_problem, open_policies, write_tiny
from benchmarks.tree_sides import CASCADE, DENSE, PACKED, PADDED, SIDES, TreeStep, steps_of

CPU = torch.device("cpu")
TINY = TrainShape(
    name="tiny", groups=1, samples=4, prompt_tokens=40, image=(56, 56), sampled_tokens=10,
    turns=(ToolTurn(sampled=6, observed=24, image=(56, 84), distinct=2),),
)  # fmt: skip
EXACT = 1e-9


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> tuple[Policy, Policy]:
    return open_policies(write_tiny(tmp_path_factory.mktemp("models")), TINY, CPU, torch.float32)


@pytest.fixture
def problem(policies: tuple[Policy, Policy]) -> TrainProblem:
    return make_problem(policies[0], TINY)


@pytest.fixture
def steps(policies: tuple[Policy, Policy], problem: TrainProblem) -> Iterator[dict[str, TreeStep]]:
    """Of all sides, in float64."""
    policy, reference = (replace(each, model=copy.deepcopy(each.model).double()) for each in policies)
    with no_float32():
        yield {step.side.name: step for step in steps_of(policy, reference, problem, SIDES)}


def test_all_sides_find_the_loss_and_the_gradients_of_the_padded_batch(steps: dict[str, TreeStep]) -> None:
    proofs = prove(list(steps.values()), CPU, {})
    assert list(proofs) == [PADDED, PACKED, DENSE, CASCADE]
    assert max(max(proof.loss_error, proof.gradient_error) for proof in proofs.values()) < EXACT


def test_rounding_in_the_model_would_hide_less_than_a_millionth(
    policies: tuple[Policy, Policy], problem: TrainProblem
) -> None:
    policy, reference = (replace(each, model=copy.deepcopy(each.model).double()) for each in policies)
    with pytest.raises(AssertionError, match="the gradient is off"):
        prove(steps_of(policy, reference, problem, SIDES), CPU, {})


@pytest.mark.parametrize("wrong", ["mask", "positions", "advantages"])
def test_a_side_that_does_something_else_is_found_out(wrong: str, steps: dict[str, TreeStep]) -> None:
    step = steps[CASCADE]
    rows = step.batch.input_ids.shape[1]
    others = {
        "mask": replace(step, batch=replace(step.batch, tree=AttentionTree([Node(0, rows, rows)]))),
        "positions": replace(step, batch=replace(step.batch, position_ids=step.batch.position_ids.flip(-1))),
        "advantages": replace(step, advantages=step.advantages.flip(0)),
    }
    with pytest.raises(AssertionError, match=r"tree, cascade: the (loss|gradient) is off by \d"):
        prove([steps[PADDED], others[wrong]], CPU, {})


def test_only_the_trees_compute_what_is_shared_once(steps: dict[str, TreeStep], problem: TrainProblem) -> None:
    tokens = {name: step.batch.input_ids.numel() for name, step in steps.items()}
    images = {name: len({image.key for image in step.batch.images}) for name, step in steps.items()}
    longest = max(len(t.token_ids) for t in problem.trajectories)
    assert tokens[PADDED] == longest * TINY.samples > tokens[PACKED] == problem.tokens > tokens[CASCADE]
    assert images == {PADDED: 8, PACKED: 8, DENSE: 3, CASCADE: 3}  # a prompt's, and one for each of two turns


def test_a_packed_sequence_looks_at_itself_only(steps: dict[str, TreeStep], problem: TrainProblem) -> None:
    batch = steps[PACKED].batch
    assert batch.tree is not None and batch.terms is None
    assert batch.tree.pairs == sum(causal_pairs(len(t.token_ids)) for t in problem.trajectories)
    assert len(batch.tree.nodes) == TINY.samples and not batch.tree.levels
    assert torch.equal(batch.targets, steps[PADDED].batch.targets)


def test_the_formula_is_what_is_counted_on_every_side(steps: dict[str, TreeStep]) -> None:
    proofs = prove(list(steps.values()), CPU, {})
    for name, step in steps.items():
        shape = ModelShape.of(step.policy.model.config)
        assert train_flops(shape, step.side.work(shape, step.batch)) == pytest.approx(proofs[name].flops, rel=1e-3)
    assert proofs[CASCADE].flops < proofs[DENSE].flops < proofs[PADDED].flops


def test_a_record_of_a_contest_can_be_drawn(policies: tuple[Policy, Policy], tmp_path: Path) -> None:
    found, measured = contest(Case(shape=TINY, rounds=2), policies, CPU)
    assert [row.side for row in found.rows] == list(measured) == [PADDED, PACKED, DENSE, CASCADE]
    assert all(len(row.samples_ms) == 2 for row in found.rows)
    assert all(parameter.grad is None for parameter in policies[0].model.parameters())
    headings = next(itertools.islice(found.lines(), 1, None)).split("  ")
    assert {"x padded", "GFLOP", "formula"} <= {heading.strip() for heading in headings}
    path = table.write_record(tmp_path, CPU, ["benchmarks"], [found], [], {})
    plot_prefix_tree.draw(json.loads(path.read_text()), tmp_path / "tree.png")
    assert (tmp_path / "tree.png").read_bytes().startswith(b"\x89PNG")


def _row(side: str, peak_mib: float, tokens: int, formula_flops: int) -> TreeRow:
    return TreeRow(
        side=side, ms=1.0, samples_ms=(1.0,), peak_mib=peak_mib, shape="p", padded_ratio=1.0, tokens=tokens, flops=100,
        formula_flops=formula_flops, batch_ms=1.0, loss_error=0.0, gradient_error=0.0,
    )  # fmt: skip


SHAPE = replace(TINY, name="p")
TABLE = table.Table("title", [_row(PADDED, 8.0, 80, 100), _row(PACKED, 6.0, 60, 101), _row(CASCADE, 2.0, 20, 97)])
SECONDS = {PADDED: 3.0, PACKED: 2.0, CASCADE: 2.5}


def test_figures_compare_the_cascade_with_what_it_replaces() -> None:
    found = {name: Measurement((Sample(seconds, None),)) for name, seconds in SECONDS.items()}
    assert figures_of(Case(shape=SHAPE, rounds=1), TABLE, found) == pytest.approx(
        {
            "prefix_tree.flops_error": 0.03,
            "prefix_tree.speedup_p": 1.2,
            "prefix_tree.peak_ratio_p": 0.25,
            "prefix_tree.tokens_ratio_p": 3.0,
        }
    )


def test_where_it_does_not_help_the_tree_is_compared_with_the_faster_of_both() -> None:
    found = {name: Measurement((Sample(seconds, None),)) for name, seconds in SECONDS.items()}
    figures = figures_of(Case(shape=SHAPE, rounds=1, helps=False), TABLE, found)
    assert figures["prefix_tree.worst_case_slowdown"] == pytest.approx(0.25)


def test_figures_of_sides_that_were_left_out_are_missing() -> None:
    left = {PACKED: Measurement((Sample(2.0, None),)), CASCADE: Measurement((Sample(1.0, None),))}
    figures = figures_of(Case(shape=SHAPE, rounds=1), table.Table("title", TABLE.rows[1:]), left)
    assert set(figures) == {"prefix_tree.flops_error", "prefix_tree.tokens_ratio_p"}


def test_the_shapes_have_the_tokens_that_they_are_named_for() -> None:
    for case in CASES:
        shape = case.shape
        if shape.name.startswith("p"):
            assert shape.name == f"p{shape.prompt_tokens}_r{shape.sampled_tokens}"
        assert case.helps == (shape.prompt_tokens > shape.sampled_tokens)
    assert bench_prefix_tree.LARGEST.prompt_tokens == 4000
