"""The plain reference update, this trainer's and TRL's: one loss, one gradient, one step; and their problem."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from arft_fast.policy.model import Policy
from arft_fast.policy.parallel import Ranks
from arft_fast.policy.update import GrpoLoss, Optimizer, grpo_update
from benchmarks.bench_train_step import contest, figures_of
from benchmarks.exact import no_float32
from benchmarks.meter import MIB, Measurement, Sample
from benchmarks.plain_reference import plain_backward, plain_update
from benchmarks.train_problem import (
    Models,
    ToolTurn,
    TrainProblem,
    TrainShape,
    make_problem,
    open_policies,
    open_stock,
    without_bias,
    write_tiny,
)
from benchmarks.train_sides import (
    AT_MOST,
    NO_TREE,
    OURS,
    PLAIN,
    TRL,
    AnotherUpdate,
    Errors,
    Found,
    Ours,
    admit,
    builders,
    errors_of,
    take_gradients,
)

CPU = torch.device("cpu")
EXACT = AT_MOST[torch.float64]
SINGLE = TrainShape(groups=2, samples=4, prompt_tokens=48, image=(84, 56), sampled_tokens=16)
TURNS = replace(
    SINGLE,
    turns=(
        ToolTurn(sampled=6, observed=24, image=(56, 84), distinct=2),
        ToolTurn(sampled=5, observed=20, image=(56, 56)),
    ),
)
SHAPES = {"single turn": SINGLE, "shared turns with images": TURNS}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return write_tiny(tmp_path_factory.mktemp("models"))


@pytest.fixture
def exact() -> Iterator[None]:
    """transformers rounds to float32 in places, which hides differences below 1e-8."""
    with no_float32():
        yield


@dataclass(frozen=True)
class Case:
    """One problem in float64, with all that solves it."""

    policy: Policy
    reference: Policy
    model: PreTrainedModel
    frozen: PreTrainedModel
    problem: TrainProblem

    def plain(self, *, beta: float = 0.04, temperature: float = 1.0, problem: TrainProblem | None = None) -> Found:
        problem = problem or self.problem
        loss, metrics = plain_backward(
            *(self.model, self.frozen, problem.groups, problem.advantages),
            logit_bias=self.policy.logit_bias,
            beta=beta,
            temperature=temperature,
        )
        return Found(loss, take_gradients(self.model), metrics)

    def ours(self, *, temperature: float = 1.0, prefix_tree: bool = True) -> Found:
        settings = GrpoLoss(beta=0.04, temperature=temperature, prefix_tree=prefix_tree)
        return Ours(self.policy, self.reference, self.problem, settings).gradients()


@pytest.fixture
def case_of(models: Models, exact: None) -> Callable[[TrainShape], Case]:
    def make(shape: TrainShape) -> Case:
        policy, reference = open_policies(models, shape, CPU, torch.float64)
        problem = make_problem(policy, shape)
        problem.advantages[[1, -1]] = 0.0
        model, frozen = (open_stock(folder, CPU, torch.float64) for folder in models)
        return Case(policy, reference, model, frozen.requires_grad_(False), problem)

    return make


def within(errors: Errors, most: Errors) -> bool:
    return all(error <= limit for error, limit in zip(errors, most, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_our_update_has_the_loss_gradients_and_metrics_of_the_plain_one(
    case_of: Callable[[TrainShape], Case], shape: TrainShape, temperature: float
) -> None:
    case = case_of(shape)
    truth = case.plain(temperature=temperature)
    assert len({len(t.token_ids) for t in case.problem.trajectories}) > 1 and torch.isinf(case.policy.logit_bias).any()
    assert len(truth.gradients) == len(list(case.policy.model.parameters()))
    errors = errors_of(case.ours(temperature=temperature), truth)
    assert within(errors, EXACT), errors
    assert truth.metrics["kl"] > 1e-3


def test_without_its_tree_our_update_is_the_same(case_of: Callable[[TrainShape], Case]) -> None:
    case = case_of(TURNS)
    assert within(errors_of(case.ours(prefix_tree=False), case.plain()), EXACT)


def test_the_wrong_sign_of_the_kl_is_another_update(case_of: Callable[[TrainShape], Case]) -> None:
    case = case_of(SINGLE)
    errors = errors_of(case.ours(), case.plain(beta=-0.04))
    assert errors.loss > 1e6 * EXACT.loss and errors.gradient > 1e6 * EXACT.gradient


@pytest.mark.parametrize("which", [0, -1], ids=["prompt", "last observation"])
def test_without_an_image_it_is_another_update(case_of: Callable[[TrainShape], Case], which: int) -> None:
    case = case_of(TURNS)
    first, other = case.problem.groups
    images = list(first[0].images)
    images[which] = replace(images[which], pixel_values=torch.zeros_like(images[which].pixel_values))
    blind = TrainProblem(((replace(first[0], images=images), *first[1:]), other), case.problem.advantages)
    errors = errors_of(case.ours(), case.plain(problem=blind))
    assert errors.gradient > 1e5 * EXACT.gradient and errors.metrics > 1e2 * EXACT.metrics


def test_a_step_moves_the_weights_as_the_plain_one_does(case_of: Callable[[TrainShape], Case]) -> None:
    case, rate = case_of(SINGLE), 1e-3
    before = {name: p.detach().clone() for name, p in case.model.named_parameters()}
    plain_update(
        *(case.model, case.frozen, torch.optim.AdamW(case.model.parameters(), lr=rate, weight_decay=0.0)),
        *(case.problem.groups, case.problem.advantages),
        logit_bias=case.policy.logit_bias,
        beta=0.04,
    )
    ranks = Ranks(rank=0, world=1, device=CPU)
    optimizer = Optimizer(case.policy.trainable_parameters(), learning_rate=rate, total_steps=10, ranks=ranks)
    grpo_update(
        *(case.policy, case.reference, optimizer, case.problem.trajectories, case.problem.advantages),
        *(GrpoLoss(beta=0.04), ranks),
    )
    ours, plain = (
        {name: p.detach() for name, p in model.named_parameters()} for model in (case.policy.model, case.model)
    )
    assert min(float((plain[name] - old).abs().max()) for name, old in before.items()) > rate / 2
    # AdamW's first step divides a gradient by its size + 1e-8: what is 1e-12 there is 1e-4 of a step here.
    assert max(float((ours[name] - plain[name]).abs().max()) for name in before) < 1e-3 * rate


def test_the_plain_update_sends_every_copy_of_an_image_through_the_vision_tower_and_ours_one(
    case_of: Callable[[TrainShape], Case],
) -> None:
    case = case_of(SINGLE)
    patches: dict[str, int] = {}
    for name, model in (("plain", case.model), ("ours", case.policy.model)):
        patches[name] = 0

        def count(_: object, inputs: tuple[Tensor, ...], name: str = name) -> None:
            patches[name] += len(inputs[0])

        model.model.visual.patch_embed.register_forward_pre_hook(count)
    case.plain()
    case.ours()
    of_one_image = (84 // 14) * (56 // 14)
    assert patches == {"plain": 2 * 4 * of_one_image, "ours": 2 * of_one_image}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_trls_trainer_makes_the_same_update_where_no_id_is_forbidden(
    models: Models, shape: TrainShape, tmp_path: Path
) -> None:
    pytest.importorskip("trl")
    dtype = torch.float32
    problem = make_problem(open_policies(models, shape, CPU, dtype)[0], shape)
    sides = builders(models, tmp_path, shape, problem, CPU, dtype)
    _, truth, _ = admit(sides[PLAIN], None, dtype)
    trl, found, errors = admit(sides[TRL], truth, dtype)
    assert set(found.metrics) == {"entropy", "kl"} and within(errors, AT_MOST[dtype])
    before = trl.gradients()  # a step at this rate changes little, and that it changes something shows that it was made
    trl.update()
    after = trl.gradients()
    assert 0 < abs(after.metrics["kl"] - before.metrics["kl"]) < 1e-3


def test_a_logit_bias_that_trl_does_not_know_shows_in_its_update(models: Models, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    dtype = torch.float32
    policy, reference = open_policies(models, SINGLE, CPU, dtype)
    problem = make_problem(policy, SINGLE)
    trl = builders(models, tmp_path, SINGLE, problem, CPU, dtype)[TRL]().gradients()
    with_bias = Ours(policy, reference, problem, GrpoLoss(beta=0.04)).gradients()
    free = Ours(without_bias(policy), without_bias(reference), problem, GrpoLoss(beta=0.04)).gradients()
    limit = AT_MOST[dtype]
    assert within(errors_of(trl, free), limit) and not within(errors_of(trl, with_bias), limit)


class Given:
    """A side that finds what it is told to."""

    def __init__(self, found: Found) -> None:
        self.found = found

    def gradients(self) -> Found:
        return self.found

    def update(self) -> object:
        return None


def test_a_side_with_another_update_is_not_admitted() -> None:
    truth = Found(1.0, {"w": torch.ones(3)}, {"kl": 0.1})
    admit(partial(Given, truth), truth, torch.float32)
    others = {
        "loss": truth._replace(loss=1.1),
        "gradient": truth._replace(gradients={"w": torch.tensor([1.0, 1.0, 1.01])}),
        "metrics": truth._replace(metrics={"kl": float("nan")}),
    }
    for what, other in others.items():
        with pytest.raises(AnotherUpdate, match=f"{what} off by"):
            admit(partial(Given, other), truth, torch.float32)
    with pytest.raises(ValueError, match="only one side has those of v"):
        admit(partial(Given, truth._replace(gradients={**truth.gradients, "v": torch.ones(1)})), truth, torch.float32)


def test_a_contest_leaves_out_a_peer_that_fails_and_never_ours(models: Models, tmp_path: Path) -> None:
    dtype = torch.float32
    problem = make_problem(open_policies(models, SINGLE, CPU, dtype)[0], SINGLE)
    sides = builders(models, tmp_path, SINGLE, problem, CPU, dtype)

    def missing() -> Given:
        raise ModuleNotFoundError("No module named 'trl'")

    table, found = contest("tiny", problem, {**sides, TRL: missing}, CPU, dtype, rounds=1)
    assert [step.side for step in table.rows] == list(found) == [PLAIN, OURS, NO_TREE]
    assert table.left_out == {TRL: "ModuleNotFoundError: No module named 'trl'"}
    assert "left out" in "\n".join(table.lines())
    with pytest.raises(ModuleNotFoundError):
        contest("tiny", problem, {PLAIN: sides[PLAIN], OURS: missing}, CPU, dtype, rounds=1)


def test_every_named_figure_of_an_update_is_there(models: Models) -> None:
    problem = make_problem(open_policies(models, SINGLE, CPU, torch.float32)[0], SINGLE)
    found = {
        name: Measurement((Sample(seconds, 8 * MIB),)) for name, seconds in ((OURS, 0.5), (PLAIN, 2.0), (TRL, 1.5))
    }
    assert figures_of(found, problem) == {
        "train_step.ms": 500.0,
        "train_step.tokens_per_s": 2 * problem.tokens,
        "train_step.speedup_vs_plain": 4.0,
        "train_step.peak_vs_plain": 1.0,
        "train_step.speedup_vs_trl": 3.0,
        "train_step.peak_vs_trl": 1.0,
    }
    assert set(figures_of({OURS: found[OURS]}, problem)) == {"train_step.ms", "train_step.tokens_per_s"}
