"""How exact the fused path is: float64 against the reference, float32 and bfloat16 against float64 truth.

Errors are RMS of the difference over RMS of the truth. In float64 the two must agree to rounding over everything that a
row kernel is told. In float32 the bounds are about ten roundings. With bfloat16 operands the truth is that of the
rounded operands, and the measure is what plain PyTorch makes of them in bfloat16.
"""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from arft_fast.kernels import linear_logprob, policy_loss

from .packing import disagreement, distance

LENGTHS = (37, 1, 0, 63, 20, 12)
WIDTH, VOCABULARY = 33, 517
LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo", "gmpo")
TRANSFORMED = {"temperature": 0.9, "softcap": 8.0, "logit_scale": 0.8}
DROPPED = 5
"""An id that the bias forbids."""


class Problem(NamedTuple):
    """Packed rows with everything that the loss can be given."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    token_ids: Tensor
    advantages: Tensor
    vectors: dict[str, Tensor]

    def to(self, dtype: torch.dtype) -> Problem:
        """Operands rounded to ``dtype``; the vectors to float32 at least, as a trainer keeps them."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        operands = (operand.detach().to(dtype).requires_grad_() for operand in self[:3])
        return Problem(
            *operands, self.token_ids, self.advantages.to(wide), {k: v.to(wide) for k, v in self.vectors.items()}
        )


def make_problem(width: int = WIDTH, vocabulary: int = VOCABULARY) -> Problem:
    """In float64, its vectors and advantages already those that float32 can hold."""
    generator = torch.Generator().manual_seed(vocabulary)
    rows = sum(LENGTHS)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).double()

    hidden, weight, bias = normal(rows, width), 0.4 * normal(vocabulary, width), 0.5 * normal(vocabulary)
    bias[DROPPED] = -torch.inf
    ids = torch.randint(DROPPED + 1, vocabulary, (rows,), generator=generator)
    now, _ = linear_logprob(hidden, weight, ids, bias=bias, **TRANSFORMED, impl="reference")
    spread = {"old_logprobs": 0.3, "ref_logprobs": 0.3, "sampler_logprobs": 0.2}
    vectors = {name: (now + scale * normal(rows)).float().double() for name, scale in spread.items()}
    return Problem(
        *(operand.requires_grad_() for operand in (hidden, weight, bias)),
        ids,
        (1.0 + normal(len(LENGTHS))).float().double(),
        vectors,
    )


OFFSETS = torch.tensor([0, *LENGTHS]).cumsum(0)
MASK = torch.arange(sum(LENGTHS)) % 7 != 3
PROBLEM = make_problem()


def loss_of(problem: Problem, impl: str, **options: Any) -> tuple[Tensor, tuple[Tensor, ...], dict[str, Tensor]]:
    """Loss, gradients of hidden states, weight and bias, statistics."""
    loss, statistics = policy_loss(
        problem.hidden, problem.weight, problem.token_ids, problem.advantages,
        **{"cu_seqlens": OFFSETS, "mask": MASK, "bias": problem.bias, **TRANSFORMED} | options, impl=impl,
    )  # fmt: skip
    return loss.detach(), torch.autograd.grad(loss, problem[:3]), statistics


def matrix(problem: Problem) -> list[dict[str, Any]]:
    """Every loss on- and off-policy, with and without KL and entropy terms; the other settings take turns."""
    old, ref, sampler = (problem.vectors[name] for name in ("old_logprobs", "ref_logprobs", "sampler_logprobs"))
    corrections = ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
    kls = (
        {},
        {"beta": 0.05, "ref_logprobs": ref, "kl": "k1"},
        {"beta": 0.05, "ref_logprobs": ref, "kl": "k2", "kl_correction": True},
        {"beta": 0.05, "ref_logprobs": ref, "kl_correction": True},
    )
    cases = []
    for loss, off_policy, kl, entropy in product(LOSSES, (False, True), kls, (0.0, 0.02)):
        turn = len(cases) + len(cases) // 5
        cases.append(
            {
                "loss": loss,
                "denominator": 300.0 if loss == "dr_grpo" else None,
                "old_logprobs": old if off_policy else None,
                "entropy_coef": entropy,
                "sampler_logprobs": sampler,
                "sampler_correction": corrections[turn % 5],
                "sampler_clip": (0.7, 1.4),
                "top_entropy_quantile": (1.0, 1.0, 0.5)[turn % 3],
                "delta": (None, 1.3)[turn % 2],
                "dual_clip": (None, 1.5)[turn // 2 % 2],
                "level": "sequence" if loss == "grpo" and turn % 4 == 0 else None,
                **kl,
            }
        )
    return cases


def describe(options: dict[str, Any]) -> str:
    return ", ".join(f"{k}={v}" for k, v in options.items() if v is not None and not isinstance(v, Tensor))


both = pytest.mark.parametrize("impl", ["reference", "native"], indirect=True)
native = pytest.mark.parametrize("impl", ["native"], indirect=True)


@native
@pytest.mark.parametrize("budget", [{}, {"chunk_bytes": 9 * VOCABULARY * 8, "stash_bytes": 31 * VOCABULARY * 8}])
def test_float64_equals_the_reference_to_rounding(budget, impl):
    failures = []
    for options in matrix(PROBLEM):
        exact = loss_of(PROBLEM, "reference", **options)
        actual = loss_of(PROBLEM, impl, **options, **budget, measure_all=True)
        error = disagreement(actual, exact)
        for name in exact[2].keys() - {"gradient_rows"}:  # which the reference does not see
            torch.testing.assert_close(actual[2][name], exact[2][name], rtol=1e-12, atol=1e-12)
        if not error <= 1e-12:
            failures.append(f"{error:.1e} {describe(options)}")
    assert not failures, "\n".join(failures)


@native
def test_float64_logprobs_and_entropies_equal_the_reference_to_rounding(impl):
    options = {"bias": PROBLEM.bias, **TRANSFORMED}
    outcomes = []
    for one in (impl, "reference"):
        outputs = linear_logprob(*PROBLEM[:2], PROBLEM.token_ids, **options, impl=one)
        weights = [torch.linspace(-1, 2, len(PROBLEM.token_ids), dtype=torch.float64), MASK.double()]
        outcomes.append((*outputs, *torch.autograd.grad(outputs, PROBLEM[:3], weights)))
    assert max(map(distance, *outcomes)) <= 1e-12


@both
def test_float32_is_exact_to_a_few_roundings(impl):
    """Losses as one vector over the cases: a single one may be nearly zero by the luck of its signs."""
    single = PROBLEM.to(torch.float32)
    exact_problem = single.to(torch.float64)
    losses, failures = [], []
    cases = zip(matrix(single), matrix(exact_problem), strict=True)
    for options, exact_options in cases:
        if options["top_entropy_quantile"] < 1 or options["sampler_correction"].endswith("mask"):
            continue  # thresholds: a token within rounding of one may fall on the other side of it
        actual, exact = loss_of(single, impl, **options), loss_of(exact_problem, "reference", **exact_options)
        losses.append(torch.stack([actual[0].double(), exact[0]]))
        error = max(map(distance, actual[1], exact[1]))
        if not error <= 1e-5:
            failures.append(f"{error:.1e} {describe(options)}")
    assert not failures, "\n".join(failures)
    assert len(losses) > 40
    assert distance(*torch.stack(losses, dim=1)) <= 1e-6


@both
def test_float32_logprobs_and_entropies_are_exact_to_a_few_roundings(impl):
    single = PROBLEM.to(torch.float32)
    exact_problem = single.to(torch.float64)
    outcomes = []
    for problem, one in ((single, impl), (exact_problem, "reference")):
        outputs = linear_logprob(*problem[:2], problem.token_ids, bias=problem.bias, **TRANSFORMED, impl=one)
        weights = [torch.linspace(-1, 2, len(problem.token_ids), dtype=outputs[0].dtype), MASK.to(outputs[0].dtype)]
        outcomes.append((outputs, torch.autograd.grad(outputs, problem[:3], weights)))
    (values, gradients), (exact_values, exact_gradients) = outcomes
    assert max(map(distance, values, exact_values)) <= 1e-6
    assert max(map(distance, gradients, exact_gradients)) <= 1e-5


def eager(hidden: Tensor, weight: Tensor, ids: Tensor, advantage: Tensor, old: Tensor) -> tuple[Tensor, ...]:
    """The clipped loss as a trainer without a fused head writes it: logits and log-softmax in the operands' dtype.

    Returns:
        logprobs [N], loss, gradients of ``hidden`` and ``weight``.
    """
    logprobs = (hidden @ weight.T).log_softmax(1).gather(1, ids[:, None])[:, 0]
    ratio = (logprobs - old).exp()
    loss = -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
    return logprobs.detach(), loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


@both
def test_bfloat16_operands_lose_no_more_than_plain_bfloat16_does(impl):
    half = PROBLEM.to(torch.bfloat16)
    exact_problem = half.to(torch.float64)
    advantage = half.advantages.repeat_interleave(torch.tensor(LENGTHS))
    now = eager(*exact_problem[:2], half.token_ids, advantage, half.vectors["old_logprobs"])[0]
    old = now.float() + 0.05 * torch.sin(torch.arange(len(now)))  # inside the clip range, whatever rounding does
    truth = eager(*exact_problem[:2], half.token_ids, advantage, old)
    plain = eager(*half[:2], half.token_ids, advantage, old)

    options = {"reduction": "token_mean", "old_logprobs": old, "impl": impl}
    loss, _ = policy_loss(*half[:2], half.token_ids, advantage, **options)
    logprobs, _ = linear_logprob(*half[:2], half.token_ids, impl=impl)
    fused = logprobs.detach(), loss.detach(), *torch.autograd.grad(loss, half[:2])
    for name, ours, theirs, exact in zip(("logprobs", "loss", "hidden", "weight"), fused, plain, truth, strict=True):
        assert distance(ours, exact) <= 2 * distance(theirs, exact), name
    # What is not rounded to bfloat16 at the end is far better than that.
    assert distance(fused[0], truth[0]) <= 1e-6 < 1e-3 < distance(plain[0], truth[0])


@both
def test_the_bounds_would_see_bfloat16_operands(impl):
    single = PROBLEM.to(torch.float32)
    rounded = PROBLEM.to(torch.bfloat16).to(torch.float32)
    exact, blurred = (loss_of(problem, impl)[1] for problem in (single, rounded))
    assert min(map(distance, blurred, exact)) > 1e-4
    exact, blurred = (linear_logprob(*problem[:2], problem.token_ids, impl=impl) for problem in (single, rounded))
    assert min(map(distance, blurred, exact)) > 1e-4
