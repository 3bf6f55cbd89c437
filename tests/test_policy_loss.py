"""The policy loss, against GRPO's objective written token by token."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch

from arft_fast import kernels
from arft_fast.kernels import policy_loss

LENGTHS = [3, 0, 1, 4]
HIGH = 0.3


@pytest.fixture(autouse=True)
def with_each_implementation(impl, monkeypatch):
    """Each test below runs once with every ``impl``."""
    monkeypatch.setitem(globals(), "policy_loss", partial(kernels.policy_loss, impl=impl))


def problem(lengths=LENGTHS, width=5, vocabulary=11, dtype=torch.float64):
    generator = torch.Generator().manual_seed(sum(lengths) + vocabulary)
    rows = sum(lengths)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    hidden, weight = normal(rows, width).requires_grad_(), normal(vocabulary, width).requires_grad_()
    ids = torch.randint(vocabulary, (rows,), generator=generator)
    now = (hidden @ weight.T).double().log_softmax(1).gather(1, ids[:, None])[:, 0].detach()
    return {
        "operands": (hidden, weight, ids, normal(len(lengths))),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0),
        "old": now + 0.4 * normal(rows).double(),  # ratios on both sides of the clip range
        "ref": now + 0.4 * normal(rows).double(),
    }


def loss_by_hand(problem, *, old, ref, beta, reduction, denominator=None, low=0.2, high=HIGH, temperature=1.0):
    """Equation 3 of arXiv 2402.03300 with its KL (equation 4), one Python loop over tokens."""
    hidden, weight, ids, advantages = problem["operands"]
    bounds = problem["cu_seqlens"].tolist()
    sequences, tokens = [], []
    for b, (start, end) in enumerate(pairwise(bounds)):
        terms = []
        for t in range(start, end):
            logits = (weight @ hidden[t]) / temperature
            logp = logits[ids[t]] - torch.logsumexp(logits, 0)
            ratio = torch.exp(logp - (logp.detach() if old is None else old[t]))
            bounded = torch.clamp(ratio, 1 - low, 1 + high)
            term = torch.min(ratio * advantages[b], bounded * advantages[b])
            if beta:
                term = term - beta * (torch.exp(ref[t] - logp) - (ref[t] - logp) - 1)
            terms.append(-term)
        tokens += terms
        if terms:
            sequences.append(sum(terms) / len(terms))
    if reduction == "sequence_mean":
        return sum(sequences) / (denominator or len(advantages))
    return sum(tokens) / (denominator or len(tokens))


def call(problem, **options):
    return policy_loss(*problem["operands"], cu_seqlens=problem["cu_seqlens"], **options)


def gradients(problem, loss):
    return torch.autograd.grad(loss, problem["operands"][:2], retain_graph=True)


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("denominator", [None, 13])
def test_equals_the_objective_token_by_token(reduction, beta, off_policy, denominator):
    case = problem()
    old, ref = case["old"] if off_policy else None, case["ref"] if beta else None
    options = {"beta": beta, "reduction": reduction, "denominator": denominator, "temperature": 0.9}
    loss, _ = call(case, old_logprobs=old, ref_logprobs=ref, epsilon_high=HIGH, **options)
    expected = loss_by_hand(case, old=old, ref=ref, **options)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(case, loss), gradients(case, expected))


def test_forgetting_the_kl_would_be_seen():
    case = problem()
    loss, _ = call(case, ref_logprobs=case["ref"], beta=0.04)
    assert abs(loss - loss_by_hand(case, old=None, ref=None, beta=0.0, reduction="sequence_mean")) > 1e-4


def test_the_upper_clip_is_its_own():
    case = problem()
    wide, narrow = (call(case, old_logprobs=case["old"], epsilon_high=high)[0] for high in (0.8, 0.2))
    assert abs(wide - narrow) > 1e-3
    assert torch.equal(narrow, call(case, old_logprobs=case["old"])[0])


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
def test_gradcheck(reduction):
    case = problem()
    hidden, weight, *rest = case["operands"]

    def function(hidden, weight):
        options = {"beta": 0.1, "reduction": reduction, "chunk_bytes": 3 * 11 * 8}
        logprobs = {"old_logprobs": case["old"], "ref_logprobs": case["ref"]}
        return policy_loss(hidden, weight, *rest, cu_seqlens=case["cu_seqlens"], **logprobs, **options)[0]

    assert torch.autograd.gradcheck(function, (hidden, weight))


@pytest.mark.parametrize("lengths", [[1], [63, 1], [100, 0, 157]])
@pytest.mark.parametrize("chunk_rows", [1, 64])
def test_chunks_change_nothing(lengths, chunk_rows):
    case = problem(lengths, vocabulary=257)
    whole, whole_stats = call(case, old_logprobs=case["old"], ref_logprobs=case["ref"], beta=0.1)
    chunk_bytes = chunk_rows * 257 * 8
    parts, parts_stats = call(
        case, old_logprobs=case["old"], ref_logprobs=case["ref"], beta=0.1, chunk_bytes=chunk_bytes
    )
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(parts_stats, whole_stats)
    torch.testing.assert_close(gradients(case, parts), gradients(case, whole))


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
def test_parts_with_the_global_denominator_add_up_to_the_whole(reduction):
    case = problem([4, 4, 3])
    hidden, weight, ids, advantages = case["operands"]
    whole, _ = call(case, reduction=reduction)
    total = 3 if reduction == "sequence_mean" else 11
    first, _ = policy_loss(
        hidden[:4], weight, ids[:4], advantages[:1],
        cu_seqlens=torch.tensor([0, 4]), reduction=reduction, denominator=total,
    )  # fmt: skip
    second, _ = policy_loss(
        hidden[4:], weight, ids[4:], advantages[1:],
        cu_seqlens=torch.tensor([0, 4, 7]), reduction=reduction, denominator=total,
    )  # fmt: skip
    torch.testing.assert_close(first + second, whole)


def test_the_two_reductions_differ_on_uneven_lengths():
    case = problem()
    assert abs(call(case, reduction="sequence_mean")[0] - call(case, reduction="token_mean")[0]) > 1e-3


def test_on_policy_the_gradient_is_that_of_reinforce():
    case = problem([2, 3])
    hidden, weight, ids, advantages = case["operands"]
    loss, stats = call(case, reduction="token_mean", denominator=1)
    logprobs = (hidden @ weight.T).log_softmax(1).gather(1, ids[:, None])[:, 0]
    reinforce = -(logprobs * advantages.repeat_interleave(torch.tensor([2, 3]))).sum()
    torch.testing.assert_close(gradients(case, loss), gradients(case, reinforce))
    assert stats["ratio_max"] == 1 and stats["clip_ratio/low_mean"] == stats["clip_ratio/high_mean"] == 0


def test_a_zero_advantage_without_kl_has_a_gradient_of_exactly_zero():
    case = problem([2, 3])
    hidden, weight, ids, advantages = case["operands"]
    case["operands"] = (hidden, weight, ids, advantages * torch.tensor([0.0, 1.0]))
    loss, _ = call(case, old_logprobs=case["old"])
    gradient, _ = gradients(case, loss)
    assert torch.equal(gradient[:2], torch.zeros_like(gradient[:2])) and (gradient[2:] != 0).any()


def test_statistics_are_means_over_tokens():
    lengths = [12, 0, 1, 45]
    case = problem(lengths)
    hidden, weight, ids, _ = case["operands"]
    advantages = torch.tensor([-1.0, 0.5, 0.5, 1.0], dtype=torch.float64)
    case["operands"] = (hidden, weight, ids, advantages)
    sampler = case["ref"] + 0.1
    _, stats = call(case, old_logprobs=case["old"], ref_logprobs=case["ref"], sampler_logprobs=sampler)
    everything = (hidden @ weight.T).log_softmax(1).detach()
    logprobs = everything.gather(1, ids[:, None])[:, 0]
    ratio, gap = (logprobs - case["old"]).exp(), case["ref"] - logprobs
    sign = advantages.repeat_interleave(torch.tensor(lengths))
    expected = {
        "entropy": -(everything.exp() * everything).sum(1).mean(),
        "kl": (gap.exp() - gap - 1).mean(),
        "clip_ratio/low_mean": ((ratio < 0.8) & (sign < 0)).double().mean(),
        "clip_ratio/high_mean": ((ratio > 1.2) & (sign > 0)).double().mean(),
        "ratio_max": ratio.max(),
        "sampler_gap": (logprobs - sampler).abs().mean(),
        "tokens": torch.tensor(58.0, dtype=torch.float64),
        "gradient_rows": stats["gradient_rows"],
    }
    torch.testing.assert_close(stats, expected, check_dtype=False)
    assert expected["clip_ratio/low_mean"] > 0 and expected["clip_ratio/high_mean"] > 0
    assert not any(value.requires_grad for value in stats.values())


def test_the_sampler_logprobs_are_measured_and_never_trained_on():
    case = problem()
    with_gap, stats = call(case, sampler_logprobs=case["old"])
    assert torch.equal(with_gap, call(case)[0]) and stats["sampler_gap"] > 0


@pytest.mark.parametrize("distance", [-1e4, 1e4])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_far_off_policy_tokens_overflow_nothing(distance, sign):
    case = problem([4], dtype=torch.float32)
    hidden, weight, ids, _ = case["operands"]
    case["operands"] = (hidden, weight, ids, torch.tensor([sign]))
    far = (case["old"] + distance).float()
    loss, stats = call(case, old_logprobs=far, ref_logprobs=far, beta=0.1)
    assert loss.isfinite() and all(value.isfinite() for value in stats.values())
    assert all(gradient.isfinite().all() for gradient in gradients(case, loss))


def test_a_forbidden_id_takes_no_part():
    case = problem()
    hidden, weight, ids, advantages = case["operands"]
    bias = torch.zeros(11, dtype=torch.float64)
    unused = next(v for v in range(11) if v not in ids.tolist())
    bias[unused] = -math.inf
    loss, _ = call(case, bias=bias, ref_logprobs=case["ref"], beta=0.1)
    kept = [v for v in range(11) if v != unused]
    position = torch.tensor([kept.index(i) for i in ids.tolist()])
    smaller, _ = policy_loss(
        hidden, weight[kept], position, advantages,
        cu_seqlens=case["cu_seqlens"], ref_logprobs=case["ref"], beta=0.1,
    )  # fmt: skip
    torch.testing.assert_close(loss, smaller)
    torch.testing.assert_close(gradients(case, loss), gradients(case, smaller))


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
def test_no_rows_give_a_zero_loss_connected_to_the_graph(lengths, reduction):
    case = problem(lengths)
    hidden, weight, *_ = case["operands"]
    loss, stats = call(case, reduction=reduction)
    loss.backward()
    assert loss.item() == 0.0 and all(value.item() == 0.0 for value in stats.values())
    assert hidden.grad is not None and torch.equal(weight.grad, torch.zeros_like(weight))


def test_bfloat16_operands_train_in_float32():
    case = problem([20, 30], width=16, vocabulary=63, dtype=torch.bfloat16)
    loss, _ = call(case, old_logprobs=case["old"])
    upcast = tuple(operand.detach().double().requires_grad_() for operand in case["operands"][:2])
    exact = {**case, "operands": (*upcast, case["operands"][2], case["operands"][3].double())}
    expected, _ = call(exact, old_logprobs=case["old"])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)


GOOD = problem([2, 1])
BAD = [
    ({"cu_seqlens": torch.tensor([0, 2])}, ValueError, "cu_seqlens: must start at 0 and end at N=3"),
    ({"cu_seqlens": torch.tensor([0, 4, 3])}, ValueError, "cu_seqlens: must not decrease"),
    ({"cu_seqlens": torch.tensor([0, 1, 2, 3])}, ValueError, r"advantages: expected shape \[B\] with B=3"),
    ({"cu_seqlens": [0, 2, 3]}, TypeError, "cu_seqlens: expected a torch.Tensor"),
    ({"advantages": torch.tensor([0.0, math.nan])}, ValueError, "advantages: row 1 is not finite"),
    ({"advantages": torch.zeros(2, 1)}, ValueError, r"advantages: expected shape \[B\]"),
    ({"old_logprobs": torch.zeros(2)}, ValueError, r"old_logprobs: expected shape \[N\] with N=3"),
    ({"old_logprobs": torch.tensor([0, -math.inf, 0])}, ValueError, "old_logprobs: row 1 is not finite"),
    ({"ref_logprobs": torch.full((3,), math.nan)}, ValueError, "ref_logprobs: row 0 is not finite"),
    ({"sampler_logprobs": torch.zeros(3).long()}, TypeError, "sampler_logprobs: expected a floating dtype"),
    ({"beta": 0.1}, ValueError, "ref_logprobs: needed when beta > 0; score the tokens"),
    ({"beta": -0.1}, ValueError, "beta: must be finite and >= 0"),
    ({"epsilon_low": 0.0}, ValueError, "epsilon_low: must be finite and > 0"),
    ({"epsilon_high": math.inf}, ValueError, "epsilon_high: must be finite and > 0"),
    ({"temperature": -1.0}, ValueError, "temperature: must be finite and > 0"),
    ({"denominator": 0}, ValueError, "denominator: must be finite and > 0"),
    ({"denominator": torch.ones(2)}, ValueError, r"denominator: expected shape \[\]"),
    ({"loss": "ppo"}, ValueError, "loss: must be one of 'grpo', 'bnpo'"),
    ({"loss": "dr_grpo"}, ValueError, "denominator: has no default here"),
    ({"loss": "gmpo", "level": "token"}, ValueError, "level: the geometric mean"),
    ({"level": "word"}, ValueError, "level: must be one of 'token', 'sequence'"),
    ({"reduction": "mean"}, ValueError, "reduction: must be one of 'sequence_mean'"),
    ({"cu_seqlens": None, "advantages": torch.zeros(3)}, ValueError, "cu_seqlens: needed for what is per sequence"),
    ({"kl": "k4"}, ValueError, "kl: must be one of 'k1', 'k2', 'k3'"),
    ({"delta": 0.0}, ValueError, "delta: must be finite and > 0"),
    ({"dual_clip": 1.0}, ValueError, "dual_clip: must be > 1"),
    ({"sapo_temperatures": 1.0}, TypeError, "sapo_temperatures: expected two numbers"),
    ({"entropy_coef": -1.0}, ValueError, "entropy_coef: must be finite and >= 0"),
    ({"top_entropy_quantile": 1.5}, ValueError, "top_entropy_quantile: is a share"),
    ({"sampler_correction": "token_mask"}, ValueError, "sampler_logprobs: needed for sampler_correction='token_mask'"),
    ({"sampler_clip": (2.0, 1.0)}, ValueError, "sampler_clip: must be"),
    ({"sampler_weights": torch.tensor([1.0, -1.0, 1.0])}, ValueError, "sampler_weights: row 1 is negative"),
    ({"mask": torch.ones(3)}, TypeError, "mask: expected a boolean dtype"),
    ({"mask": torch.ones(2, dtype=torch.bool)}, ValueError, r"mask: expected shape \[N\] with N=3"),
    ({"softcap": -1.0}, ValueError, "softcap: must be finite and > 0"),
    ({"logit_scale": 0.0}, ValueError, "logit_scale: must be finite and > 0"),
    ({"chunk_bytes": -1}, ValueError, "chunk_bytes: must be > 0"),
    ({"stash_bytes": -1}, ValueError, "stash_bytes: must be >= 0"),
    ({"impl": "fused"}, ValueError, "impl: must be one of"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_a_bad_argument_is_named_with_its_remedy(change, error, message):
    names = ("hidden", "weight", "token_ids", "advantages")
    arguments = {**dict(zip(names, GOOD["operands"], strict=True)), "cu_seqlens": GOOD["cu_seqlens"], **change}
    with pytest.raises(error, match=message):
        policy_loss(**arguments)


def test_a_sampled_id_that_the_bias_forbids_is_refused():
    bias = torch.zeros(11)
    bias[GOOD["operands"][2][1]] = -math.inf
    with pytest.raises(ValueError, match="token_ids: holds an id that bias forbids"):
        call(GOOD, bias=bias)
