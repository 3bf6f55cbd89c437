"""Shapes and values at the edges, for every implementation on a CPU, against plain PyTorch in float64."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from arft_fast.kernels import linear_logprob, policy_loss

from .packing import distance

pytestmark = pytest.mark.parametrize("impl", ["reference", "native"], indirect=True)

EXACT = 1e-12
SINGLE = 1e-5


class Problem(NamedTuple):
    """Operands and one advantage a token; the loss is a mean over tokens unless a test says otherwise."""

    hidden: Tensor
    weight: Tensor
    ids: Tensor
    advantages: Tensor
    old: Tensor


def problem(rows: int, width: int, vocabulary: int, dtype: torch.dtype = torch.float64) -> Problem:
    generator = torch.Generator().manual_seed(rows + vocabulary)
    hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)
    ids = torch.randint(vocabulary, (rows,), generator=generator)
    advantages = 0.5 + torch.randn(rows, generator=generator, dtype=torch.float64)
    old = by_hand(hidden, weight, ids)[0] + 0.3 * torch.randn(rows, generator=generator, dtype=torch.float64)
    hidden, weight = (operand.to(dtype).requires_grad_() for operand in (hidden, weight))
    return Problem(hidden, weight, ids, advantages.to(dtype), old.to(dtype))


def by_hand(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of float64 operands."""
    everything = (hidden @ weight.T).log_softmax(1)
    return everything.gather(1, ids[:, None])[:, 0], -(everything.exp() * everything).sum(1)


class Outcome(NamedTuple):
    """Everything detached."""

    loss: Tensor
    hidden: Tensor
    weight: Tensor
    statistics: dict[str, Tensor]


def run(case: Problem, impl: str, **options: Any) -> Outcome:
    options = {"old_logprobs": case.old, "reduction": "token_mean"} | options
    loss, statistics = policy_loss(case.hidden, case.weight, case.ids, case.advantages, **options, impl=impl)
    return Outcome(loss.detach(), *torch.autograd.grad(loss, (case.hidden, case.weight)), statistics)


def truth(case: Problem, low: float = 0.2, high: float = 0.2) -> Outcome:
    """The clipped loss with a small entropy bonus, in float64 by autograd."""
    hidden, weight = (operand.detach().double().requires_grad_() for operand in (case.hidden, case.weight))
    logprobs, entropy = by_hand(hidden, weight, case.ids)
    ratio, advantage = (logprobs - case.old.double()).exp(), case.advantages.double()
    gain = torch.min(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
    loss = -(gain + 0.01 * entropy).mean()
    return Outcome(loss.detach(), *torch.autograd.grad(loss, (hidden, weight)), {})


def worst(actual: Outcome, expected: Outcome) -> float:
    return max(distance(got, want) for got, want in zip(actual[:3], expected[:3], strict=True))


@pytest.mark.parametrize("rows", [1, 63, 257, 1000])
@pytest.mark.parametrize("vocabulary", [2, 3, 5, 7, 17, 63, 65, 129])
def test_odd_shapes_equal_the_truth(rows, vocabulary, impl):
    case = problem(rows, 5, vocabulary)
    assert worst(run(case, impl, entropy_coef=0.01), truth(case)) <= EXACT


@pytest.mark.parametrize("rows", [1, 63, 257])
@pytest.mark.parametrize("vocabulary", [3, 7, 17, 33, 65])
def test_odd_shapes_equal_the_truth_in_float32(rows, vocabulary, impl):
    case = problem(rows, 5, vocabulary, torch.float32)
    actual, expected = run(case, impl, entropy_coef=0.01), truth(case)
    assert abs(actual.loss - expected.loss) <= 1e-6  # the loss may be nearly zero
    assert max(distance(actual.hidden, expected.hidden), distance(actual.weight, expected.weight)) <= SINGLE


def test_a_vocabulary_of_one_id_leaves_nothing_to_choose(impl):
    case = problem(4, 3, 1)
    actual = run(case, impl, old_logprobs=None, entropy_coef=0.01)
    assert actual.statistics["entropy"] == 0 and not actual.hidden.any() and not actual.weight.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_vocabulary_of_a_real_model(dtype, impl):
    case = problem(3, 2, 151_936, dtype)
    assert worst(run(case, impl, entropy_coef=0.01), truth(case)) <= (EXACT if dtype == torch.float64 else SINGLE)


def test_more_rows_than_a_grid_dimension_of_a_gpu_holds(impl):
    case = problem(65_600, 3, 7)
    assert worst(run(case, impl, entropy_coef=0.01), truth(case)) <= EXACT


@pytest.mark.parametrize("loss", ["grpo", "gspo", "gmpo", "cispo", "sapo"])
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("quantile", [0.5, 1.0])
def test_with_every_token_masked_loss_and_gradients_are_zero(quantile, loss, old, impl):
    case = problem(9, 3, 7)
    options = {
        "loss": loss,
        "reduction": None,
        "cu_seqlens": torch.tensor([0, 4, 9]),
        "mask": torch.zeros(9, dtype=torch.bool),
        **{"ref_logprobs": case.old, "beta": 0.1, "entropy_coef": 0.1, "top_entropy_quantile": quantile},
    }
    actual = run(case, impl, **options, **({} if old else {"old_logprobs": None}))
    assert actual.loss == 0 and not actual.hidden.any() and not actual.weight.any()
    assert all(value == 0 for value in actual.statistics.values())


@pytest.mark.parametrize("loss", ["grpo", "gspo", "gmpo", "cispo", "sapo"])
@pytest.mark.parametrize("sequences", [0, 1, 3])
@pytest.mark.parametrize("quantile", [0.5, 1.0])
def test_without_rows_loss_and_gradients_are_zero(quantile, loss, sequences, impl):
    case = problem(0, 3, 7)
    case = case._replace(advantages=torch.ones(sequences, dtype=torch.float64))
    offsets = torch.zeros(sequences + 1, dtype=torch.int64)
    actual = run(case, impl, loss=loss, cu_seqlens=offsets, entropy_coef=0.1, top_entropy_quantile=quantile)
    assert actual.loss == 0 and actual.hidden.shape == (0, 3) and not actual.weight.any()
    assert all(value == 0 for value in actual.statistics.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_ten_thousand_overflow_nothing(dtype, impl):
    """Peaked rows: the token is certain, impossible, or one of two that share the mass."""
    hidden = torch.tensor([[1e4, 0], [-1e4, 0], [0, 1e4], [0, -1e4]], dtype=dtype).requires_grad_()
    weight = torch.tensor([[1, 1], [-1, 1], [0.5, -1], [0, -1]], dtype=dtype).requires_grad_()
    ids = torch.tensor([0, 0, 1, 2])
    logprobs, entropy = linear_logprob(hidden, weight, ids, impl=impl)
    exact = torch.tensor([0.0, -2e4, -math.log(2), -math.log(2)], dtype=dtype)
    torch.testing.assert_close(logprobs.detach(), exact)
    torch.testing.assert_close(entropy.detach(), torch.tensor([0, 0, math.log(2), math.log(2)], dtype=dtype))
    case = Problem(hidden, weight, ids, torch.ones(4, dtype=dtype), exact)
    actual = run(case, impl, entropy_coef=0.01)
    expected = truth(case)
    assert abs(actual.loss - expected.loss) <= 1e-6
    assert max(distance(actual.hidden, expected.hidden), distance(actual.weight, expected.weight)) <= SINGLE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", ["grpo", "cispo", "sapo", "gspo", "gmpo"])
def test_a_log_ratio_of_89_overflows_nothing(loss, dtype, impl):
    """``exp(89)`` is infinite in float32; the ratio is held at ``exp(20)``, where the clip stands still."""
    case = problem(4, 3, 7, dtype)
    far = case.old + torch.tensor([89, -89, 89, -89], dtype=dtype)
    case = case._replace(advantages=torch.tensor([1, 1, -1, -1], dtype=dtype))
    offsets = torch.arange(5)
    actual = run(case, impl, loss=loss, old_logprobs=far, ref_logprobs=far, beta=0.1, cu_seqlens=offsets)
    assert actual.loss.isfinite() and actual.hidden.isfinite().all() and actual.weight.isfinite().all()
    assert all(value.isfinite() for value in actual.statistics.values())
    surrogate = run(case, impl, loss=loss, old_logprobs=far, cu_seqlens=offsets)
    if loss == "grpo":
        ratios = (0.0, 1.2, -0.8, -math.exp(20))  # by row, times the sign of the advantage
        assert float(surrogate.loss) == pytest.approx(-sum(ratios) / 4, rel=1e-6)
    # All lie on a plateau, but cispo's weight is a constant anyway.
    assert bool(surrogate.hidden.any()) == (loss == "cispo")


def test_the_ratio_is_exact_just_inside_its_bounds(impl):
    """A negative control of the clamp: at 19.9 nats nothing is held yet."""
    case = problem(1, 3, 7)
    now = by_hand(case.hidden, case.weight, case.ids)[0].detach()
    case = case._replace(old=now - 19.9, advantages=-torch.ones(1, dtype=torch.float64))
    assert float(run(case, impl).loss) == pytest.approx(math.exp(19.9), rel=1e-9)
    assert float(run(case, impl, old_logprobs=case.old - 5).loss) == pytest.approx(math.exp(20), rel=1e-9)


@pytest.mark.parametrize("name", ["old_logprobs", "ref_logprobs", "sampler_logprobs"])
@pytest.mark.parametrize("value", [-math.inf, math.inf, math.nan])
def test_logprobs_that_are_not_finite_are_refused_by_name(name, value, impl):
    case = problem(4, 3, 7)
    broken = case.old.clone()
    broken[1] = value
    with pytest.raises(ValueError, match=f"^{name}: row 1 is not finite"):
        run(case, impl, **{name: broken})


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("loss", ["grpo", "gspo", "gmpo", "cispo", "sapo"])
@pytest.mark.parametrize("correction", ["none", "token_truncate", "sequence_mask"])
@pytest.mark.parametrize("quantile", [0.5, 1.0])
def test_what_stands_in_masked_positions_reaches_nothing(quantile, correction, loss, garbage, impl):
    case = problem(12, 3, 7)
    mask = torch.arange(12) % 3 != 1
    options = {
        "loss": loss,
        "reduction": None,
        "cu_seqlens": torch.tensor([0, 5, 5, 12]),
        "mask": mask,
        **{"beta": 0.1, "kl_correction": True, "entropy_coef": 0.01, "top_entropy_quantile": quantile},
        **{"sampler_correction": correction, "sampler_clip": (0.5, 2.0)},
    }
    outcomes = []
    for filler in (0.0, garbage):
        old, ref, sampler = (torch.where(mask, case.old + shift, filler) for shift in (0.0, 0.1, -0.05))
        vectors = {"old_logprobs": old, "ref_logprobs": ref, "sampler_logprobs": sampler}
        outcomes.append(run(case, impl, **options, **vectors, sampler_weights=torch.where(mask, 0.9, abs(filler))))
    clean, dirty = outcomes
    assert clean.loss.isfinite() and torch.equal(clean.loss, dirty.loss)
    assert torch.equal(clean.hidden, dirty.hidden) and torch.equal(clean.weight, dirty.weight)
    assert clean.hidden[mask].any() and not clean.hidden[~mask].any()
    assert clean.statistics == dirty.statistics


def test_a_tied_weight_collects_its_gradient_from_both_ends(impl):
    """The embedding is the head: autograd adds the gradient through the hidden states to that of the products."""
    case = problem(40, 6, 17)
    contexts = torch.randint(17, (40,), generator=torch.Generator().manual_seed(0))
    sides = []
    for fused in (True, False):
        embedding = torch.nn.Parameter(case.weight.detach().clone())
        hidden = torch.tanh(embedding[contexts])
        if fused:
            loss, _ = policy_loss(hidden, embedding, case.ids, case.advantages, reduction="token_mean", impl=impl)
        else:
            loss = -(case.advantages * by_hand(hidden, embedding, case.ids)[0]).mean()
        loss.backward()
        sides.append(embedding.grad)
    assert distance(*sides) <= EXACT
    head_alone = -(case.advantages * by_hand(hidden.detach(), embedding, case.ids)[0]).mean()
    assert distance(torch.autograd.grad(head_alone, embedding)[0], sides[1]) > 1e-2  # one end alone would be seen


CHUNKS = [1, 8, 64, 300]


@pytest.mark.parametrize("loss", ["grpo", "gspo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_second_run_gives_the_same_bits(loss, dtype, impl):
    case = problem(257, 33, 63, torch.float32)
    case = case._replace(
        hidden=case.hidden.detach().to(dtype).requires_grad_(), weight=case.weight.detach().to(dtype).requires_grad_()
    )
    options = {"loss": loss, "cu_seqlens": torch.tensor([0, 100, 257]), "ref_logprobs": case.old, "beta": 0.1}
    first, second = (run(case, impl, **options, chunk_bytes=64 * 63 * 4) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True))
    assert first.statistics == second.statistics


@pytest.mark.parametrize("loss", ["grpo", "gspo", "gmpo"])
@pytest.mark.parametrize("chunk_rows", CHUNKS)
def test_chunks_change_nothing_beyond_rounding(chunk_rows, loss, impl):
    case = problem(257, 5, 63)
    options = {"loss": loss, "cu_seqlens": torch.tensor([0, 100, 257])}
    budgets = {"chunk_bytes": chunk_rows * 63 * 8, "stash_bytes": 70 * 63 * 8}
    whole, parts = run(case, impl, **options), run(case, impl, **options, **budgets)
    assert worst(parts, whole) <= EXACT


@pytest.mark.parametrize("chunk_rows", CHUNKS)
def test_rows_without_a_gradient_have_exactly_none_and_change_no_others(chunk_rows, impl):
    """Masked, known beforehand (advantage 0) and clipped rows, in one call; the rest as if those were not there."""
    case = problem(257, 5, 63)
    number = torch.arange(257)
    masked, idle = number % 5 == 0, number % 7 == 3
    case = case._replace(advantages=torch.where(idle, 0.0, case.advantages))
    ratio = (by_hand(case.hidden, case.weight, case.ids)[0].detach() - case.old).exp()
    clipped = torch.where(case.advantages > 0, ratio > 1.2, ratio < 0.8) & ~idle
    live = ~(masked | idle | clipped)
    assert all(int(kind.sum()) > 20 for kind in (masked, idle, clipped, live))

    budget = {"chunk_bytes": chunk_rows * 63 * 8, "denominator": 257}
    actual = run(case, impl, mask=~masked, **budget)
    alone = Problem(case.hidden.detach()[live].requires_grad_(), *(v[live] if len(v) == 257 else v for v in case[1:]))
    expected = run(alone, impl, **budget)
    assert torch.equal(actual.hidden[~live], torch.zeros_like(actual.hidden[~live]))
    assert (actual.hidden[live] != 0).any(1).all()
    assert distance(actual.hidden[live], expected.hidden) <= EXACT
    assert distance(actual.weight, expected.weight) <= EXACT


@pytest.mark.parametrize("loss", ["grpo", "gspo"])
def test_a_loss_under_autocast_has_the_same_bits(loss, impl):
    """With the backward pass outside, as PyTorch asks. Rows 3 and 17 have no gradient: the others lie apart."""
    case = problem(40, 16, 63, torch.float32)
    case.advantages[[3, 17]] = 0
    outcomes = []
    for cast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
            assert (case.hidden @ case.weight.T).dtype == (torch.bfloat16 if cast else torch.float32)
            total, _ = policy_loss(
                *case[:4],
                old_logprobs=case.old,
                loss=loss,
                cu_seqlens=torch.arange(41),
                chunk_bytes=9 * 63 * 4,
                impl=impl,
            )
        outcomes.append((total.detach(), *torch.autograd.grad(total, (case.hidden, case.weight))))
    assert all(map(torch.equal, *outcomes))
