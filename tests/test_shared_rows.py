"""Rows of the head that several tokens read: as if each were repeated, at the price of one."""

from __future__ import annotations

import sys
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from arft_fast.kernels import head, policy_loss
from arft_fast.kernels.dispatch import Impl
from arft_fast.kernels.objective import FAMILY, Loss
from arft_fast.kernels.shared_rows import add_up, read

from .repeated_rows import DISTINCT, LENGTHS, SHARED, VOCABULARY, WIDTH, Problem, assert_same, error

CASES = list(
    product(
        (False, True),  # off-policy
        ((0.0, False), (0.1, False), (0.1, True)),  # beta, KL correction
        (0.0, 0.05),  # entropy bonus
        (1.0, 0.5),  # top-entropy quantile
        ("none", "token_truncate", "token_mask", "sequence_mask"),
        (False, True),  # mask
        (False, True),  # the caller's weights
        (None, "sequence"),
    )
)


def settings(problem: Problem, loss: Loss, case: tuple[Any, ...]) -> dict[str, Any]:
    off_policy, (beta, corrected), entropy_coef, quantile, sampler, masked, weighted, level = case
    return {
        "loss": loss,
        "level": None if loss == "gmpo" else level,
        "old_logprobs": problem.old if off_policy else None,
        "ref_logprobs": problem.ref if beta else None,
        "beta": beta,
        "kl_correction": corrected,
        "entropy_coef": entropy_coef,
        "top_entropy_quantile": quantile,
        "sampler_logprobs": problem.sampler,
        "sampler_correction": sampler,
        "sampler_clip": (0.5, 1.5),
        "sampler_weights": problem.weights if weighted else None,
        "mask": problem.mask if masked else None,
        "denominator": 11.0 if loss == "dr_grpo" else None,
        "temperature": 0.9,
        "softcap": 5.0,
    }


@pytest.mark.parametrize("index", [SHARED, DISTINCT], ids=["shared", "distinct"])
@pytest.mark.parametrize("loss", FAMILY)
def test_every_objective_is_that_of_the_rows_repeated(loss: Loss, index: list[int], every_impl: Impl) -> None:
    problem = Problem(index)
    budgets = {"impl": every_impl, "chunk_bytes": 3 * VOCABULARY * 8, "stash_bytes": 5 * VOCABULARY * 8}
    for number, case in enumerate(CASES[:: {"native": 5, "triton": 383, "reference": 37}[every_impl]]):
        options = settings(problem, loss, case) | budgets | {"measure_all": number % 2 == 0}
        expected = problem.results(problem.repeated, **options)
        assert_same(problem.results(problem.call, **options), expected, case)


def test_rows_in_any_order_and_with_32_bits_are_read_alike(impl: Impl) -> None:
    problem = Problem()
    expected = problem.results(problem.repeated, impl=impl)
    assert_same(problem.results(problem.call, impl=impl, row_index=problem.index.int()), expected)
    order = torch.randperm(len(problem.hidden), generator=torch.Generator().manual_seed(3))
    moved = policy_loss(
        problem.hidden[order], problem.weight, problem.ids[order], problem.advantages, bias=problem.bias, impl=impl,
        cu_seqlens=problem.cu_seqlens, row_index=order.argsort()[problem.index],
    )  # fmt: skip
    assert_same(problem.results(lambda: moved), expected)


def test_averaging_the_advantages_of_shared_tokens_is_right_on_policy_and_wrong_off_policy(impl: Impl) -> None:
    problem = Problem()
    per_token = problem.advantages.repeat_interleave(torch.tensor(LENGTHS))
    totals, counts = (add_up(values, problem.index, 11) for values in (per_token, torch.ones_like(per_token)))
    averaged = read(totals / counts.clamp(min=1), problem.index)
    assert ((averaged * per_token)[problem.index == 0] < 0).any()  # a sample pulls the other way than the average

    def gradient(advantages: Tensor, old: Tensor | None) -> Tensor:
        options = {"advantages": advantages, "old_logprobs": old, "loss": "dapo", "impl": impl}
        return problem.results(problem.call, **options)[1][0]

    assert error(gradient(averaged, None), gradient(per_token, None)) <= 1e-12
    assert error(gradient(averaged, problem.old), gradient(per_token, problem.old)) > 1e-3


@pytest.fixture
def rows_multiplied(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts rows that go through products: ``forward``, and ``backward`` for both gradients; and scoring passes."""
    counts = {"forward": 0, "backward": 0, "logprob": 0}
    module = sys.modules["arft_fast.kernels.policy_loss"]
    products, add, logprob = head.Head.products, head.Gradients.add, module.fused_logprob

    def count_products(self: head.Head, rows: Tensor, out: Tensor) -> Tensor:
        counts["forward"] += len(rows)
        return products(self, rows, out)

    def count_add(self: head.Gradients, index: head.Index, rows: Tensor, gradient: Tensor) -> None:
        counts["backward"] += len(rows)
        add(self, index, rows, gradient)

    def count_logprob(*arguments: Any) -> tuple[Tensor, Tensor]:
        counts["logprob"] += 1
        result: tuple[Tensor, Tensor] = logprob(*arguments)
        return result

    monkeypatch.setattr(head.Head, "products", count_products)
    monkeypatch.setattr(head.Gradients, "add", count_add)
    monkeypatch.setattr(module, "fused_logprob", count_logprob)
    return counts


@pytest.mark.parametrize("loss", FAMILY)
def test_on_policy_a_shared_row_costs_one_row_in_one_pass(loss: Loss, rows_multiplied: dict[str, int]) -> None:
    problem = Problem()
    options = {"loss": loss, "ref_logprobs": problem.ref, "beta": 0.1, "sampler_weights": problem.weights}
    loss_value, statistics = problem.call(impl="native", denominator=5.0, **options)
    loss_value.backward()
    assert rows_multiplied == {"forward": 10, "backward": 10, "logprob": 0}
    assert statistics["gradient_rows"] == 10 and statistics["tokens"] == 14


def test_off_policy_a_shared_row_is_scored_once_and_its_gradients_add_up(rows_multiplied: dict[str, int]) -> None:
    problem = Problem()
    loss, statistics = problem.call(old_logprobs=problem.old, epsilon_low=9.0, epsilon_high=99.0, impl="native")
    loss.backward()
    assert rows_multiplied == {"forward": 10, "backward": 10, "logprob": 1}
    assert statistics["gradient_rows"] == 10 and statistics["tokens"] == 14


@pytest.mark.parametrize("options", [{}, {"sampler_correction": "token_truncate"}, {"loss": "sapo"}])
def test_off_policy_rows_that_nobody_shares_stay_in_one_pass(
    options: dict[str, Any], rows_multiplied: dict[str, int]
) -> None:
    problem = Problem(DISTINCT)
    problem.call(old_logprobs=problem.old, sampler_logprobs=problem.sampler, impl="native", **options)[0].backward()
    assert rows_multiplied["logprob"] == 0 and rows_multiplied["forward"] == 14


def test_off_policy_a_row_with_one_live_token_is_nobody_elses(rows_multiplied: dict[str, int]) -> None:
    problem = Problem()
    advantages = torch.tensor([1.0, 0.0, 0.0, 0.0, -1.0], dtype=torch.float64)
    options = {"advantages": advantages, "old_logprobs": problem.old, "impl": "native"}
    actual = problem.results(problem.call, **options)
    assert rows_multiplied["logprob"] == 0 and rows_multiplied["forward"] == 6
    assert_same(actual, problem.results(problem.repeated, **options))


ZERO_SUM = torch.tensor([1.0, 0.0, -2.0, 1.0, 0.0], dtype=torch.float64)
"""Row 0 is read by the sequences 0, 2 and 3: dapo weighs each token alike."""


def test_a_shared_row_whose_advantages_cancel_is_never_computed(rows_multiplied: dict[str, int]) -> None:
    problem = Problem()
    options = {"loss": "dapo", "advantages": ZERO_SUM, "impl": "native"}
    actual = problem.results(problem.call, **options)
    assert rows_multiplied == {"forward": 8, "backward": 8, "logprob": 0}  # row 9 has no advantage, row 10 no token
    expected = problem.results(problem.repeated, **options)
    assert_same((*actual[:2], {}), (*expected[:2], {}))
    assert expected[2]["tokens"] - actual[2]["tokens"] == 3
    assert torch.equal(actual[1][0][0], torch.zeros_like(actual[1][0][0]))


def test_a_row_whose_advantages_cancel_is_measured_on_request(rows_multiplied: dict[str, int]) -> None:
    problem = Problem()
    options = {"loss": "dapo", "advantages": ZERO_SUM, "impl": "native", "measure_all": True}
    actual = problem.results(problem.call, **options)
    assert rows_multiplied == {"forward": 10, "backward": 8, "logprob": 0}
    assert_same(actual, problem.results(problem.repeated, **options))


@pytest.mark.parametrize("term", ["beta", "entropy_coef"])
def test_a_term_of_the_row_itself_keeps_a_row_whose_advantages_cancel(term: str, impl: Impl) -> None:
    problem = Problem()
    options = {"loss": "dapo", "advantages": ZERO_SUM, "ref_logprobs": problem.ref, term: 0.1, "impl": impl}
    actual = problem.results(problem.call, **options)
    assert_same(actual, problem.results(problem.repeated, **options))
    assert actual[1][0][0].abs().max() > 1e-3


@pytest.mark.parametrize("off_policy", [False, True])
def test_what_stands_in_rows_that_no_unmasked_token_reads_is_not_looked_at(off_policy: bool, every_impl: Impl) -> None:
    problem = Problem()
    problem.mask = (problem.index != 0) & (problem.index != 5)
    options: dict[str, Any] = {"mask": problem.mask, "beta": 0.1, "impl": every_impl, "measure_all": True}
    options["old_logprobs"] = problem.old if off_policy else None
    expected = problem.results(problem.call, ref_logprobs=problem.ref, **options)
    with torch.no_grad():
        for row in (0, 5, 10):
            problem.hidden[row] = problem.ref[row] = torch.nan
    actual = problem.results(problem.call, ref_logprobs=problem.ref, **options)
    assert_same(actual, expected)
    assert torch.equal(actual[1][0][[0, 5, 10]], torch.zeros(3, WIDTH, dtype=torch.float64))


@pytest.mark.parametrize("loss", ["grpo", "gspo", "gmpo", "sapo"])
def test_on_policy_a_cap_below_one_stops_the_positive_advantages_of_clipped_losses(loss: Loss, impl: Impl) -> None:
    problem = Problem()
    advantages = problem.advantages.repeat_interleave(torch.tensor(LENGTHS)) * torch.tensor([1.0, -1.0]).repeat(7)
    options = {"loss": loss, "advantages": advantages, "delta": 0.9, "impl": impl, "measure_all": True}
    expected = problem.results(problem.repeated, **options | {"impl": "reference"})
    assert_same(problem.results(problem.call, **options), expected)


@pytest.mark.parametrize("correction", ["sequence_truncate", "sequence_mask"])
def test_a_token_without_an_advantage_counts_in_the_weight_of_its_sequence(correction: str, impl: Impl) -> None:
    problem = Problem()
    weights = (problem.index != 8).double()  # row 8 has one token, inside a sequence
    options: dict[str, Any] = {"sampler_weights": weights, "sampler_logprobs": problem.sampler, "impl": impl}
    options |= {"sampler_correction": correction, "sampler_clip": (1e-9, 1e9)}
    expected = problem.results(problem.repeated, **options | {"impl": "reference"})
    for call in (problem.call, problem.repeated):
        actual = problem.results(call, **options)
        assert_same((*actual[:2], {}), (*expected[:2], {}))


@torch.no_grad()
def test_without_gradients_a_shared_row_is_one_product(rows_multiplied: dict[str, int]) -> None:
    Problem().call(impl="native")
    assert rows_multiplied == {"forward": 10, "backward": 0, "logprob": 0}


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("rows", [0, 3])
def test_no_tokens_give_a_zero_loss_connected_to_the_graph(rows: int, off_policy: bool, impl: Impl) -> None:
    hidden, weight = torch.ones(rows, WIDTH, requires_grad=True), torch.ones(VOCABULARY, WIDTH, requires_grad=True)
    none = torch.zeros(0)
    loss, statistics = policy_loss(
        hidden, weight, torch.zeros(rows).long(), torch.zeros(2), row_index=none.long(), impl=impl, loss="gspo",
        cu_seqlens=torch.zeros(3).long(), old_logprobs=none if off_policy else None,
    )  # fmt: skip
    loss.backward()
    assert loss.item() == 0 and all(value.item() == 0 for value in statistics.values())
    assert not any(operand.grad is None or operand.grad.any() for operand in (hidden, weight))


def test_sums_over_the_terms_of_a_row_have_the_same_bits_in_every_run(two_threads: None) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(3, (200_000,), generator=generator).to(device)
    values = torch.randn(200_000, generator=generator).to(device)
    rows = torch.zeros(3, device=device, requires_grad=True)
    sums = [add_up(values, index, 3) for _ in range(5)]
    sums += [torch.autograd.grad(read(rows, index), rows, values)[0] for _ in range(5)]
    assert all(torch.equal(total, sums[0]) for total in sums)
