"""Triton's row kernels against autograd in float64: on a GPU if there is one, else in Triton's interpreter.

The interpreter shows that the arithmetic is right; that there is device code, ``test_triton_compile.py`` shows. Each
program takes the interpreter about 10 ms, so cases have few rows.
"""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from arft_fast.kernels import triton_rows
from arft_fast.kernels.rows import KLS, SAMPLER_CORRECTIONS, SURROGATES, RowObjective, Transform, Vectors

from .row_truth import Case, Results, assert_close, log_softmax_at_tokens, make_case, relative_error, truth

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(
        not triton_rows.available(torch.device(DEVICE)), reason="triton is not installed, or not in its interpreter"
    ),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy in the interpreter, about NaN and infinity
]

# Numbers that float32 holds: they reach a device as such.
PLAIN = Transform()
SCALED = Transform(temperature=0.5, logit_scale=0.625)
CAPPED = Transform(temperature=0.5, softcap=4.0, logit_scale=1.5)
TRANSFORMS = (PLAIN, SCALED, CAPPED)
BOUNDS = {
    **{"ratio_low": 0.75, "ratio_high": 1.25, "delta": 1.75, "dual_clip": 1.5},
    **{"sapo_positive": 1.0, "sapo_negative": 1.125, "sampler_low": 0.625, "sampler_high": 1.5},
}
EXACT = (1e-12, 1e-12)
FLOAT32 = (1e-6, 1e-5)


def case_of(rows: int, vocabulary: int, *settings: Any, **options: Any) -> Case:
    return make_case(rows, vocabulary, *settings, device=DEVICE, **options)


def run(case: Case, into: Tensor | None = None) -> Results:
    """All results, written over NaN: whatever is left out shows. ``into``: where the gradient goes."""
    gradient = torch.full_like(case.logits, math.nan) if into is None else into
    outputs = [torch.full_like(case.vectors.scale, math.nan) for _ in range(3)]
    triton_rows.policy(*case[:5], case.vectors, *outputs, gradient)
    return Results(*outputs, gradient)


def some_rows(case: Case, rows: slice) -> Case:
    vectors = Vectors(*(None if v is None else v[rows] for v in case.vectors))
    return case._replace(logits=case.logits[rows], token_ids=case.token_ids[rows], vectors=vectors)


def overlaid(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """A gradient in a narrower dtype over the memory of dense ``logits`` [C, V], with the same row starts."""
    return logits.view(dtype)[:, : logits.shape[1]]


# ---- The matrix of objectives ----

KL_CHOICES = [("k3", 0.0, False), *((kl, 0.25, corrected) for kl in KLS for corrected in (False, True))]


@pytest.mark.parametrize("sampler", SAMPLER_CORRECTIONS)
@pytest.mark.parametrize("kl, beta, kl_correction", KL_CHOICES)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_every_objective_has_the_gradient_that_autograd_finds(
    surrogate: str, kl: str, beta: float, kl_correction: bool, sampler: str
) -> None:
    """With and without old log-probs; transform, bias and entropy bonus take turns."""
    turn = (
        SURROGATES.index(surrogate)
        + 3 * KL_CHOICES.index((kl, beta, kl_correction))
        + SAMPLER_CORRECTIONS.index(sampler)
    )
    for old in (True, False):
        settings = {"surrogate": surrogate, "kl": kl, "beta": beta, "kl_correction": kl_correction, "sampler": sampler}
        bounds = {**BOUNDS, "dual_clip": BOUNDS["dual_clip"] if turn % 2 else math.inf}
        objective = RowObjective(**settings, **bounds, entropy_coef=0.125 if turn % 4 < 2 else 0.0)
        case = case_of(4, 63, TRANSFORMS[turn % 3], objective, biased=turn % 5 < 2, seed=turn)
        if not old:
            case = case._replace(vectors=case.vectors._replace(old=None))
        assert_close(run(case), truth(case), *EXACT)
        turn += 1


@pytest.mark.parametrize("entropy_coef", [0.0, 0.125])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_every_transform_has_the_gradient_that_autograd_finds(
    transform: Transform, biased: bool, entropy_coef: float
) -> None:
    case = case_of(4, 257, transform, RowObjective(surrogate="cispo", entropy_coef=entropy_coef), biased=biased)
    assert_close(run(case), truth(case), *EXACT)


CHANGES: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    ({}, {"surrogate": "cispo"}),
    ({}, {"surrogate": "sapo"}),
    ({"surrogate": "cispo"}, {"ratio_low": 0.7}),
    ({"surrogate": "cispo"}, {"ratio_high": 1.3}),
    ({"dual_clip": math.inf}, {"delta": 1.125}),  # below delta it hides it
    ({}, {"dual_clip": 1.0}),
    ({"surrogate": "sapo"}, {"sapo_positive": 1.01}),
    ({"surrogate": "sapo"}, {"sapo_negative": 1.1}),
    ({}, {"beta": 0.2501}),
    ({}, {"kl": "k1"}),
    ({}, {"kl": "k2"}),
    ({}, {"kl_correction": True}),
    ({}, {"entropy_coef": 0.1251}),
    ({}, {"sampler": "none"}),
    ({}, {"sampler": "truncate"}),
    ({"sampler": "truncate"}, {"sampler_low": 0.63}),
    ({"sampler": "truncate"}, {"sampler_high": 1.51}),
)


@pytest.mark.parametrize("base, change", CHANGES, ids=str)
def test_the_comparison_sees_a_setting_that_is_slightly_off(base: dict[str, Any], change: dict[str, Any]) -> None:
    settings = {**BOUNDS, "beta": 0.25, "sampler": "mask", "entropy_coef": 0.125, **base}
    case = case_of(32, 7, PLAIN, RowObjective(**settings))
    with pytest.raises(AssertionError, match=r"coefficient|gradient"):
        assert_close(run(case._replace(objective=RowObjective(**{**settings, **change}))), truth(case), *FLOAT32)


# ---- Sizes ----


@pytest.mark.parametrize("dtype, bounds", [(torch.float64, EXACT), (torch.float32, FLOAT32)])
@pytest.mark.parametrize("vocabulary", [1, 2, 63, 257, 1000, 1008, 5000, 20_000])
def test_any_vocabulary(vocabulary: int, dtype: torch.dtype, bounds: tuple[float, float]) -> None:
    """Odd ones, aligned ones, and several tiles with a part of one at the end."""
    objective = RowObjective(**BOUNDS, beta=0.25, entropy_coef=0.125)
    case = case_of(3, vocabulary, SCALED, objective, biased=vocabulary > 1).to(dtype)
    got = run(case)
    if vocabulary > 1:
        assert_close(got, truth(case), *bounds)
    else:  # the only id has probability 1
        assert not any(part.any() for part in (got.logprobs, got.entropy, got.gradient))


def test_these_vocabularies_take_one_tile_and_several() -> None:
    def tiles(vocabulary: int, dtype: torch.dtype) -> int:
        tile = triton_rows._tile(torch.empty(1, vocabulary, dtype=dtype), None, None)
        return -(-vocabulary // (32 * tile.warps * tile.rounds * tile.vector))

    assert [tiles(v, torch.float64) for v in (63, 1000, 5000, 20_000)] == [1, 1, 3, 10]
    assert [tiles(v, torch.float32) for v in (63, 1000, 5000, 20_000)] == [1, 1, 1, 2]
    assert triton_rows._tile(torch.empty(1, 20_000), None, None).vector == 4
    assert triton_rows._tile(torch.empty(1, 20_001), None, None).vector == 1


def test_no_rows_are_no_work() -> None:
    assert run(some_rows(case_of(2, 5), slice(0))).gradient.shape == (0, 5)


def test_the_rows_are_the_first_axis_of_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others end at 65,535."""
    grids: list[tuple[int, ...]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            grids.append(grid)
            return lambda *arguments, **settings: None

    monkeypatch.setattr(triton_rows, "_kernel", Recorder)
    run(case_of(65_537, 2))
    assert grids == [(65_537,)]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter would take ten minutes")
def test_more_rows_than_the_other_axes_of_a_grid_take() -> None:
    case = case_of(65_537, 8).to(torch.float32)
    assert_close(run(case), truth(case), *FLOAT32)


def test_row_starts_past_two_to_the_31_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows far apart in memory of which nothing else is touched; their distance alone fits 32 bits."""
    case = case_of(3, 100, objective=RowObjective(surrogate="cispo")).to(torch.float32, torch.bfloat16)
    pitch = 2**30 + 16
    memory = torch.empty(2 * pitch + 100, dtype=torch.bfloat16, device=DEVICE)
    # After a launch the interpreter copies every storage back onto itself, which would touch all of it.
    monkeypatch.setattr(torch.UntypedStorage, "copy_", lambda self, source, non_blocking=None: self)
    far = memory.as_strided((3, 100), (pitch, 1))
    far.copy_(case.logits)
    got, want = run(case._replace(logits=far), into=far), run(case)
    assert torch.equal(got.gradient, want.gradient) and torch.equal(got.logprobs, want.logprobs)


# ---- Precision ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [257, 20_000])
def test_half_precision_logits_lose_no_more_than_in_pytorch(vocabulary: int, dtype: torch.dtype) -> None:
    case = case_of(3, vocabulary, objective=RowObjective(surrogate="cispo"), spread=2.0).to(torch.float32, dtype)
    case = case._replace(vectors=case.vectors._replace(old=None))
    got, want = run(case), truth(case)
    logits = case.logits.clone().requires_grad_()
    logprobs = logits.log_softmax(dim=1).gather(1, case.token_ids[:, None])[:, 0]
    (logprobs.float() * want.coefficient.float()).sum().backward()
    assert logits.grad is not None
    assert relative_error(got.logprobs, want.logprobs) <= min(1e-6, 2 * relative_error(logprobs, want.logprobs))
    assert relative_error(got.entropy, want.entropy) <= 1e-6
    assert relative_error(got.gradient, want.gradient) <= 2 * relative_error(logits.grad, want.gradient)


@pytest.mark.parametrize("transform", [PLAIN, SCALED])
@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_large_logits_lose_no_digits(shift: float, transform: Transform) -> None:
    case = case_of(4, 1008, transform, RowObjective(surrogate="cispo", entropy_coef=0.125))
    case = case._replace(logits=(case.logits + shift).float().double()).to(torch.float32)
    assert_close(run(case), truth(case), *FLOAT32)


def test_logits_between_minus_and_plus_ten_thousand() -> None:
    """Each row has one certain id: its token, or another one."""
    case = case_of(4, 257, objective=RowObjective(surrogate="cispo", entropy_coef=0.125), spread=4e3).to(torch.float32)
    case = case._replace(vectors=case.vectors._replace(old=None))  # a ratio would be of log-probs of +-10,000
    case.token_ids[:2] = case.logits[:2].argmax(dim=1)
    got, want = run(case), truth(case)
    assert relative_error(got.logprobs, want.logprobs) <= 1e-6
    assert (got.entropy.double() - want.entropy).abs().max() <= 1e-6
    assert (got.gradient.double() - want.gradient).abs().max() <= 1e-6


@pytest.mark.parametrize("margin", [5.0, 15.0, 30.0, 60.0])
def test_one_minus_p_keeps_its_digits_near_p_equal_to_one(margin: float) -> None:
    """Where even float64 loses them from ``log_softmax``; the truth is a sum over the other ids."""
    case = case_of(3, 257, objective=RowObjective(surrogate="cispo"), spread=1.0).to(torch.float32)
    own = case.token_ids[:, None]
    case.logits.scatter_(1, own, case.logits.max(dim=1, keepdim=True).values + margin)
    got = run(case)
    d = (case.logits.double() - case.logits.double().gather(1, own)).scatter_(1, own, -math.inf)
    rest = d.exp().sum(dim=1)
    moment = (d.exp() * d.nan_to_num(neginf=0.0)).sum(dim=1)
    assert relative_error(got.logprobs, -rest.log1p()) <= 1e-6
    assert relative_error(got.entropy, rest.log1p() - moment / (1 + rest)) <= 1e-6
    want = got.coefficient.double() * rest / (1 + rest)
    assert relative_error(got.gradient.gather(1, own)[:, 0], want) <= 1e-5
    if margin > 10:  # the difference has nothing left of them
        difference = -case.logits.log_softmax(dim=1).gather(1, own)[:, 0].expm1()
        assert relative_error(got.coefficient * difference, want) > 0.01


# ---- Edges of the objective ----


def edge_case(surrogate: str, old_gap: float, **settings: Any) -> Case:
    """float32 rows whose log-ratio is ``old_gap``, advantages of both signs."""
    case = case_of(4, 63, objective=RowObjective(**{"surrogate": surrogate, **BOUNDS, **settings}))
    logp, _ = log_softmax_at_tokens(case.logits, case)
    advantage = case.logits.new_tensor([1.5, -1.5, 0.5, -0.5])
    return case._replace(vectors=case.vectors._replace(old=logp - old_gap, advantage=advantage)).to(torch.float32)


@pytest.mark.parametrize("old_gap", [89.0, -89.0, math.inf])
@pytest.mark.parametrize("surrogate", ["clip", "sapo"])
def test_a_log_ratio_past_its_clamp_has_no_gradient(surrogate: str, old_gap: float) -> None:
    got = run(edge_case(surrogate, old_gap, delta=math.inf, dual_clip=math.inf))
    assert not got.coefficient.any()
    assert bool(got.gradient.eq(0).all()), "rows without a gradient are zeros"
    assert run(edge_case(surrogate, 0.125)).coefficient.any()


@pytest.mark.parametrize("old_gap, bound", [(89.0, 1.25), (-89.0, 0.75), (math.inf, 1.25)])
def test_cispo_keeps_the_gradient_of_a_ratio_at_its_bound(old_gap: float, bound: float) -> None:
    case = edge_case("cispo", old_gap)
    assert relative_error(run(case).coefficient, -case.vectors.scale * case.vectors.advantage * bound) <= 1e-6


@pytest.mark.parametrize("gap", [89.0, -89.0])
@pytest.mark.parametrize("kl_correction", [False, True])
def test_a_reference_far_away_gives_a_finite_coefficient(kl_correction: bool, gap: float) -> None:
    case = edge_case("clip", 0.125, beta=0.25, kl_correction=kl_correction)
    case = case._replace(vectors=case.vectors._replace(ref=case.vectors.old + gap))
    got = run(case)
    assert bool(got.coefficient.isfinite().all())
    assert_close(got, truth(case), *FLOAT32)


@pytest.mark.parametrize("gap", [89.0, -89.0])
@pytest.mark.parametrize("kl", KLS)
def test_a_corrected_kl_takes_the_ratio_at_its_clamp(kl: str, gap: float) -> None:
    case = edge_case("clip", gap, beta=0.25, kl=kl, kl_correction=True)
    case = case._replace(vectors=case.vectors._replace(ref=case.vectors.old + gap + 0.5))
    got = run(case)
    assert bool(got.coefficient.isfinite().all())
    assert_close(got, truth(case), *FLOAT32)


def test_the_slope_of_k3_keeps_its_digits_near_zero() -> None:
    """Of certain tokens: of others the log-probs themselves have too few."""
    case = edge_case("clip", 0.0, beta=0.25)
    case.logits.scatter_(1, case.token_ids[:, None], case.logits.max(dim=1, keepdim=True).values + 12)
    logprobs = run(case).logprobs
    vectors = case.vectors._replace(advantage=torch.zeros_like(logprobs), ref=logprobs + 2e-5)
    assert vectors.ref is not None
    gap, weight = vectors.ref - logprobs, -0.25 * vectors.scale
    want = weight.double() * gap.double().expm1()
    assert relative_error(run(case._replace(vectors=vectors)).coefficient, want) <= 1e-6
    assert relative_error(weight * (gap.exp() - 1), want) > 1e-4, "what expm1 is for"


@pytest.mark.parametrize("unused", ["ref", "sampler"])
def test_a_vector_that_the_objective_does_not_use_is_not_looked_at(unused: str) -> None:
    case = case_of(3, 63, objective=RowObjective(kl="k2"))
    nothing = torch.full_like(case.vectors.scale, math.nan)
    got, want = run(case._replace(vectors=case.vectors._replace(**{unused: nothing}))), run(case)
    assert torch.equal(got.coefficient, want.coefficient)


def test_a_masked_row_may_hold_anything() -> None:
    objective = RowObjective(**BOUNDS, surrogate="cispo", kl="k1", beta=0.25, sampler="truncate", entropy_coef=0.125)
    case = case_of(3, 63, objective=objective)
    vectors = [v.clone() for v in case.vectors if v is not None]
    for vector in vectors:
        vector[1] = math.nan
    vectors[1][1] = 0.0
    got, want = run(case._replace(vectors=Vectors(*vectors))), run(case)
    assert got.coefficient[1] == 0 and bool(got.gradient[1].eq(0).all())
    assert torch.equal(got.gradient[[0, 2]], want.gradient[[0, 2]])


def test_ids_that_are_forbidden_count_nothing() -> None:
    case = case_of(3, 63, CAPPED, RowObjective(surrogate="cispo", entropy_coef=0.125), biased=True)
    assert case.bias is not None
    forbidden = case.bias == -math.inf
    got = run(case)
    assert not got.gradient[:, forbidden].any() and bool((got.gradient[:, ~forbidden] != 0).all())
    kept = case._replace(
        logits=case.logits[:, ~forbidden].contiguous(),
        bias=case.bias[~forbidden],
        token_ids=(~forbidden).cumsum(0)[case.token_ids] - 1,
    )
    assert_close(got._replace(gradient=got.gradient[:, ~forbidden]), truth(kept), *EXACT)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_forbidden_token_has_log_prob_minus_infinity_and_no_nan(transform: Transform) -> None:
    case = case_of(2, 63, transform, RowObjective(surrogate="cispo", entropy_coef=0.125), biased=True)
    assert case.bias is not None
    case.bias[case.token_ids[0]] = -math.inf
    case = case._replace(vectors=case.vectors._replace(old=None))
    got = run(case)
    assert got.logprobs[0] == -math.inf and bool(got.entropy.isfinite().all())
    assert bool(got.gradient.isfinite().all()) and got.gradient[0, case.token_ids[0]] == 0


def test_the_only_id_that_is_allowed_is_certain() -> None:
    case = case_of(2, 63, objective=RowObjective(surrogate="cispo", entropy_coef=0.125))
    case.token_ids[1] = case.token_ids[0]
    bias = torch.full_like(case.logits[0], -math.inf)
    bias[case.token_ids[0]] = 0.5
    got = run(case._replace(bias=bias))
    assert not any(part.any() for part in (got.logprobs, got.entropy, got.gradient))


@pytest.mark.parametrize("token", [-1, 63, 2**40])
def test_an_id_outside_the_vocabulary_gives_nan(token: int) -> None:
    case = case_of(2, 63, objective=RowObjective(surrogate="cispo"))
    case = case._replace(vectors=case.vectors._replace(old=None))
    want = run(case)
    case.token_ids[0] = token
    got = run(case)
    assert bool(got.logprobs[0].isnan()) and bool(got.gradient[0].isnan().all())
    assert torch.equal(got.gradient[1], want.gradient[1])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_logit_that_is_not_finite_shows(value: float) -> None:
    case = case_of(1, 63, objective=RowObjective(surrogate="cispo"))
    case.logits[0, (case.token_ids[0] + 1) % 63] = value
    assert bool(run(case).logprobs.isnan().all())


# ---- Memory ----


@pytest.mark.parametrize("dtype, narrow", [(torch.float32, torch.bfloat16), (torch.float64, torch.float32)])
@pytest.mark.parametrize("vocabulary", [257, 20_000])
def test_a_narrower_gradient_may_lie_over_the_logits(vocabulary: int, dtype: torch.dtype, narrow: torch.dtype) -> None:
    case = case_of(3, vocabulary, SCALED, RowObjective(surrogate="cispo", entropy_coef=0.125)).to(dtype)
    want = run(case, into=torch.full_like(case.logits, math.nan, dtype=narrow))
    logits = case.logits.clone()
    got = run(case._replace(logits=logits), into=overlaid(logits, narrow))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert relative_error(got.gradient, truth(case).gradient) <= torch.finfo(narrow).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [257, 20_000])
def test_the_gradient_may_take_the_place_of_the_logits(vocabulary: int, dtype: torch.dtype) -> None:
    case = case_of(3, vocabulary, objective=RowObjective(surrogate="cispo")).to(torch.float32, dtype)
    want, logits = run(case), case.logits.clone()
    got = run(case._replace(logits=logits), into=logits)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_gradient_over_the_logits_has_their_row_starts_and_is_no_wider() -> None:
    case = case_of(2, 64).to(torch.float32)
    with pytest.raises(AssertionError, match="row starts"):
        run(case, into=case.logits.view(torch.bfloat16).view(-1)[:128].view(2, 64))
    case = case_of(2, 64).to(torch.float32, torch.bfloat16)
    memory = torch.zeros(2, 64, dtype=torch.float32, device=DEVICE)
    with pytest.raises(AssertionError, match="no wider"):
        run(case._replace(logits=memory.view(torch.bfloat16)[:, :64]), into=memory)


@pytest.mark.parametrize("vocabulary", [48, 65])
def test_rows_of_a_wider_matrix_leave_the_rest_of_it_alone(vocabulary: int) -> None:
    case = case_of(3, vocabulary, objective=RowObjective(surrogate="cispo")).to(torch.float32)
    logits, gradient = (torch.full((3, 96), 7.0, device=DEVICE) for _ in range(2))
    inner = slice(16, 16 + vocabulary)
    logits[:, inner] = case.logits
    before = logits.clone()
    got, want = run(case._replace(logits=logits[:, inner]), into=gradient[:, inner]), run(case)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert torch.equal(logits, before), "logits are only read"
    assert bool((gradient[:, :16] == 7).all()) and bool((gradient[:, 16 + vocabulary :] == 7).all())


# ---- The three modes ----


def test_the_modes_agree_bit_for_bit() -> None:
    objective = RowObjective(**BOUNDS, beta=0.25, entropy_coef=0.125)
    for transform, biased in itertools.product(TRANSFORMS, (False, True)):
        case = case_of(3, 257, transform, objective, biased=biased).to(torch.float32)
        got = run(case)
        logprobs, entropy = (torch.full_like(got.logprobs, math.nan) for _ in range(2))
        triton_rows.score(*case[:4], logprobs, entropy)
        assert torch.equal(logprobs, got.logprobs) and torch.equal(entropy, got.entropy)
        gradient, bonus = torch.full_like(case.logits, math.nan), -objective.entropy_coef * case.vectors.scale
        triton_rows.gradients(*case[:4], got.coefficient, bonus, gradient)
        assert torch.equal(gradient, got.gradient)


@pytest.mark.parametrize("with_entropy", [False, True])
def test_given_coefficients_weigh_log_prob_and_entropy(with_entropy: bool) -> None:
    case = case_of(3, 257, CAPPED, biased=True)
    g, e = case.vectors.advantage, case.vectors.scale
    gradient = torch.full_like(case.logits, math.nan)
    triton_rows.gradients(*case[:4], g, e if with_entropy else None, gradient)
    logits = case.logits.clone().requires_grad_()
    logp, entropy = log_softmax_at_tokens(logits, case)
    (g * logp + (e * entropy if with_entropy else 0)).sum().backward()
    assert logits.grad is not None and relative_error(gradient, logits.grad) <= 1e-12


def test_a_row_with_an_entropy_weight_alone_has_a_gradient() -> None:
    case = case_of(2, 63)
    gradient = torch.full_like(case.logits, math.nan)
    weight = case.logits.new_tensor([0.5, 0.0])
    triton_rows.gradients(*case[:4], torch.zeros_like(weight), weight, gradient)
    assert bool(gradient[0].isfinite().all()) and bool(gradient[1].eq(0).all())


def test_the_same_rows_give_the_same_bits_alone_together_and_again() -> None:
    case = case_of(3, 1008, SCALED, RowObjective(**BOUNDS, beta=0.25, entropy_coef=0.125), biased=True).to(
        torch.float32
    )
    first, again = run(case), run(case)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for row in range(3):
        alone = run(some_rows(case, slice(row, row + 1)))
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, first, strict=True))


def test_token_ids_may_be_32_bit() -> None:
    case = case_of(3, 63)
    assert torch.equal(run(case).logprobs, run(case._replace(token_ids=case.token_ids.int())).logprobs)


# ---- Without Triton ----


def test_without_triton_the_module_imports_and_says_what_is_missing() -> None:
    script = """
import sys
sys.modules["triton"] = None  # what an import of a missing package amounts to
import torch
from arft_fast.kernels import rows, triton_rows
assert not triton_rows.available(torch.device("cpu")) and not triton_rows.available(torch.device("cuda"))
one = torch.zeros(1)
triton_rows.score(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), None, rows.Transform(), one, one)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode != 0 and "RuntimeError: the triton package is not installed" in done.stderr, done.stderr


def test_kernels_run_on_no_other_device() -> None:
    assert not triton_rows.available(torch.device("meta"))
