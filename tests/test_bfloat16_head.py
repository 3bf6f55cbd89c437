"""bfloat16 operands as a GPU takes them: bfloat16 products with float32 sums, and the gradient over the logits' memory.

A CPU has no such products, so here a stand-in widens the operands first, which is what a tensor core computes; chunks,
row kernel (Triton's interpreter, or the GPU), narrowing in place, compaction and sums are the real ones.
"""

import pytest
import torch

from arft_fast.kernels import head, linear_logprob, policy_loss

LENGTHS = [3, 5, 4]
WIDTH, VOCABULARY = 16, 70
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ONE_ROUNDING = 2**-8 if DEVICE.type == "cuda" else 2**-7  # Triton's interpreter cuts digits off instead of rounding


@pytest.fixture(autouse=True)
def tensor_cores(every_impl, monkeypatch):
    if every_impl != "triton":
        pytest.skip("the row kernel with a gradient narrower than the logits")
    if DEVICE.type == "cuda":
        return
    monkeypatch.setattr(head, "_has_tensor_cores", lambda hidden, weight: hidden.dtype == torch.bfloat16)
    monkeypatch.setattr(head, "_product", lambda left, right, out: out.copy_(left.float() @ right.float()))
    monkeypatch.setattr(head, "_accumulate", lambda total, left, right: total.add_(left.float() @ right.float()))


def problem():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(sum(LENGTHS), WIDTH, generator=generator).bfloat16().to(DEVICE).requires_grad_()
    weight = (torch.randn(VOCABULARY, WIDTH, generator=generator) / 4).bfloat16().to(DEVICE).requires_grad_()
    ids = torch.randint(VOCABULARY, (len(hidden),), generator=generator).to(DEVICE)
    now = linear_logprob(hidden, weight, ids, impl="reference")[0].detach()
    old = now + 0.3 * torch.randn(len(hidden), generator=generator).to(DEVICE)
    return hidden, weight, ids, torch.randn(len(LENGTHS), generator=generator).to(DEVICE), old


def solve(hidden, weight, ids, advantages, old, **options):
    cu_seqlens = torch.tensor([0, *LENGTHS], device=DEVICE).cumsum(0)
    loss, stats = policy_loss(hidden, weight, ids, advantages, cu_seqlens=cu_seqlens, old_logprobs=old, **options)
    return loss, torch.autograd.grad(loss, (hidden, weight)), stats


def error(got, want):
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("loss", ["grpo", "gspo"])  # one pass, and two with a stash
@pytest.mark.parametrize("chunk_rows", [5, 100])
def test_the_gradient_is_as_exact_as_one_rounding_allows(loss, chunk_rows):
    operands = problem()
    budget = chunk_rows * VOCABULARY * 4
    settings = {"loss": loss, "epsilon_low": 0.1}
    got, gradients, stats = solve(*operands, impl="triton", chunk_bytes=budget, stash_bytes=budget, **settings)
    exact = [operand.detach().double().requires_grad_() for operand in operands[:2]]
    want, expected, _ = solve(*exact, *operands[2:], impl="reference", **settings)
    assert got.dtype == torch.float32 and abs(got.item() - want.item()) < 1e-6
    for gradient, truth in zip(gradients, expected, strict=True):
        assert gradient.dtype == torch.bfloat16 and error(gradient, truth) < ONE_ROUNDING
    assert loss == "gspo" or 0 < stats["gradient_rows"] < sum(LENGTHS)  # some rows were clipped: holes were filled


def test_log_probs_keep_float32_logits():
    hidden, weight, ids, *_ = problem()
    logprobs, _ = linear_logprob(hidden, weight, ids, impl="triton")
    truth, _ = linear_logprob(hidden.double(), weight.double(), ids, impl="reference")
    eager = (hidden @ weight.t()).log_softmax(1).gather(1, ids[:, None])[:, 0]
    assert error(logprobs.detach(), truth.detach()) < 1e-6 < error(eager.detach(), truth.detach())
