"""Row kernels of the native CPU library where numbers are extreme: what stays exact, what stays finite, what shows."""

from __future__ import annotations

import math

import pytest
import torch

from arft_fast.kernels import native, native_rows
from arft_fast.kernels.rows import SURROGATES, RowObjective, Transform, Vectors

from . import native_row_runs
from .native_row_runs import PLAIN, TRANSFORMS, every_isa, nan_vectors, run
from .row_truth import assert_close, log_softmax_at_tokens, make_case, relative_error, truth

pytestmark = pytest.mark.skipif(not native.available(), reason="the native library is not built")

isa = native_row_runs.isa  # a fixture
BONUS = RowObjective(surrogate="cispo", entropy_coef=0.1)


@every_isa
def test_confident_tokens_keep_the_digits_of_one_minus_p(isa: str) -> None:
    """The gradient at the token is 1 - p_t: 1e-30 here, where 1 - exp(logp) in float32 is 0 from 1e-8 on."""
    logits, token_ids = make_case(35, 300, spread=0.5).logits, torch.arange(35)
    logits[token_ids, token_ids] = logits.max() + torch.linspace(2, 70, 35, dtype=torch.float64)
    narrow = logits.float()
    logits = narrow.double()
    want = (logits.scatter(1, token_ids[:, None], -math.inf).logsumexp(1) - logits.logsumexp(1)).exp()
    gradient, logprobs, entropy = torch.full_like(narrow, math.nan), torch.zeros(35), torch.zeros(35)
    native_rows.gradients(narrow, token_ids, None, PLAIN, torch.ones(35), None, gradient)
    native_rows.score(narrow, token_ids, None, PLAIN, logprobs, entropy)
    assert ((gradient[token_ids, token_ids].double() - want).abs() <= 1e-5 * want).all()
    assert ((logprobs.double() - torch.log1p(-want)).abs() <= 1e-5 * want).all()


@every_isa
def test_exponentials_are_good_to_two_units_in_the_last_place(isa: str) -> None:
    """Two ids that differ by d: the gradient at the other one is -1 / (1 + exp(-d))."""
    d = torch.linspace(-87, 0, 100_001)
    logits, token_ids = torch.stack([torch.zeros_like(d), d], 1), torch.zeros(len(d), dtype=torch.int64)
    gradient = torch.full_like(logits, math.nan)
    native_rows.gradients(logits, token_ids, None, PLAIN, torch.ones(len(d)), None, gradient)
    want = -torch.sigmoid(d.double())
    assert ((gradient[:, 1].double() - want) / want).abs().max() <= 1.6 * 2**-23
    assert ((gradient[:, 0].double() + want) / want).abs().max() <= 1.6 * 2**-23


@every_isa
def test_sums_over_a_large_vocabulary_keep_their_digits(isa: str) -> None:
    wide = make_case(2, 152_064, spread=1.0)
    case = wide.to(torch.float32)
    logprobs, entropy = nan_vectors(case, 2)
    native_rows.score(*case[:4], logprobs, entropy)
    want = log_softmax_at_tokens(wide.logits, wide)
    assert relative_error(logprobs, want[0]) <= 2e-7 and relative_error(entropy, want[1]) <= 2e-7


@every_isa
@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_an_offset_of_all_logits_costs_no_digits(isa: str, offset: float) -> None:
    case = make_case(16, 500, Transform(temperature=0.7), BONUS, spread=2.0)
    case = case._replace(logits=(case.logits + offset).float().double())
    assert_close(run(case.to(torch.float32)), truth(case), 1e-6, 1e-5)


@every_isa
def test_logits_that_are_far_apart_leave_one_id(isa: str) -> None:
    case = make_case(16, 500, Transform(temperature=0.7), BONUS, spread=1e4)
    # Without old log-probs: a log-prob of -5e4 in float32 is good to 0.004, and so is a ratio.
    case = case._replace(logits=case.logits.float().double(), vectors=case.vectors._replace(old=None))
    got, want = run(case.to(torch.float32)), truth(case)
    assert relative_error(got.logprobs, want.logprobs) <= 1e-6
    assert relative_error(got.gradient, want.gradient) <= 1e-5
    assert want.entropy.max() < 1e-10 and (got.entropy - want.entropy).abs().max() < 1e-12


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("correction", [False, True])
@pytest.mark.parametrize("name", ["old", "ref", "sampler"])
def test_extreme_ratios_stay_finite_and_right(surrogate: str, correction: bool, name: str) -> None:
    """Also k3 with the correction: 1 - e^d and e^d - d - 1 add up to -d, which two float32 values of 1e8 lose."""
    settings = {"kl_correction": correction, "sampler": "truncate", "sampler_high": 2.0}
    case = make_case(8, 63, objective=RowObjective(surrogate=surrogate, beta=0.3, **settings))
    shifts = torch.tensor([89.0, -89.0, 21.0, -21.0, 19.0, -19.0, 1000.0, -1000.0], dtype=torch.float64)
    moved = (log_softmax_at_tokens(case.logits, case)[0] - shifts).float().double()
    case = case._replace(vectors=case.vectors._replace(**{name: moved}))
    want = truth(case).coefficient
    assert ((run(case).coefficient - want).abs() <= 1e-8 * want.abs()).all()
    got = run(case.to(torch.float32))
    assert all(value.isfinite().all() for value in got)
    assert ((got.coefficient - want).abs() <= 3e-5 * want.abs()).all()


@pytest.mark.parametrize("surrogate", ["clip", "sapo"])
def test_an_old_logprob_of_minus_infinity_moves_nothing(surrogate: str) -> None:
    case = make_case(4, 63, objective=RowObjective(surrogate=surrogate)).to(torch.float32)
    advantage, old = torch.tensor([1.0, -1.0, 1.0, -1.0]), torch.full((4,), -math.inf)
    got = run(case._replace(vectors=Vectors(advantage, torch.ones(4), old)))
    assert not got.coefficient.any() and got.logprobs.isfinite().all()


@every_isa
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_a_forbidden_token_has_logprob_minus_infinity_and_no_gradient_of_its_own(
    isa: str, transform: Transform
) -> None:
    case = make_case(5, 65, transform, BONUS, biased=True)
    assert case.bias is not None
    case.bias[case.token_ids[:2]] = -math.inf
    forbidden = case.bias == -math.inf
    got, want = run(case.to(torch.float32)), truth(case)
    assert (got.logprobs == -math.inf).tolist() == forbidden[case.token_ids].tolist()
    assert not got.gradient[:, forbidden].any()
    assert relative_error(got.gradient, want.gradient) <= 1e-5
    assert relative_error(got.entropy, want.entropy) <= 1e-6


def test_a_forbidden_token_without_old_logprobs_has_ratio_one() -> None:
    case = make_case(2, 65, biased=True).to(torch.float32)
    assert case.bias is not None
    case.bias[case.token_ids] = -math.inf
    case = case._replace(vectors=case.vectors._replace(old=None))
    assert torch.equal(run(case).coefficient, -case.vectors.scale * case.vectors.advantage)


@every_isa
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_the_only_id_that_is_allowed_is_certain(isa: str, transform: Transform) -> None:
    case = make_case(2, 65, transform, BONUS).to(torch.float32)
    bias = torch.full((65,), -math.inf).index_fill(0, torch.tensor(3), 0.5)
    got = run(case._replace(token_ids=torch.tensor([3, 3]), bias=bias))
    assert not got.logprobs.any() and not got.entropy.any() and not got.gradient.any()


@every_isa
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_a_nan_in_a_row_reaches_its_results_and_no_other_row(isa: str, transform: Transform) -> None:
    case = make_case(3, 100, transform, BONUS).to(torch.float32)
    case.logits[1, 40] = math.nan
    got = run(case._replace(vectors=case.vectors._replace(old=None)))
    for value in (got.logprobs, got.entropy, got.gradient.sum(1)):
        assert value.isnan().tolist() == [False, True, False]
