"""Every side of the benchmarks: ours, plain PyTorch, the peers and the bare matrix products.

Losses are functions from a problem to a 0-dim tensor: DAPO's clipped loss with old log-probs, without KL. Log-probs are
functions to ([N], entropy [N]). Peers are called as their own trainers call them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from arft_fast.kernels import linear_logprob, policy_loss

from .problem import EPSILON, Problem

Loss = Callable[[Problem], Tensor]
Logprobs = Callable[[Problem], tuple[Tensor, Tensor]]

TRL_VOCABULARY_CHUNK = 32_768  # trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE


def our_loss(problem: Problem, impl: str = "auto") -> Tensor:
    """One pass; entropy, clip ratios and the other statistics included."""
    loss, _ = policy_loss(
        *(problem.hidden, problem.weight, problem.token_ids, problem.advantages),
        cu_seqlens=problem.cu_seqlens,
        old_logprobs=problem.old_logprobs,
        mask=problem.mask,
        loss="dapo",
        epsilon_low=EPSILON,
        impl=impl,
    )
    return loss


def our_logprobs(problem: Problem, stash: float | None = None) -> tuple[Tensor, Tensor]:
    """``stash``: share of the logits to keep for the backward pass; None: the default budget."""
    products = 8 * len(problem.hidden) * len(problem.weight)  # 8: enough for float64
    stash_bytes = None if stash is None else round(stash * products)
    return linear_logprob(problem.hidden, problem.weight, problem.token_ids, stash_bytes=stash_bytes)


def clipped_mean(logprobs: Tensor, advantages: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    """The loss of trainers that hold log-probs [N]: TRL's formula for ``loss_type="dapo"``."""
    ratio = torch.exp(logprobs - old)
    advantage = advantages.repeat_interleave(len(logprobs) // len(advantages))
    per_token = -torch.min(ratio * advantage, ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantage)
    return (per_token * mask).sum() / mask.sum()


def loss_on(logprobs: Logprobs) -> Loss:
    """``clipped_mean`` after a function that gives log-probs; its entropy is a metric."""

    def loss(problem: Problem) -> Tensor:
        return clipped_mean(logprobs(problem)[0], problem.advantages, problem.old_logprobs, problem.mask)

    return loss


def _plain_logprobs(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    logits = hidden @ weight.t()
    logprobs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=1)
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).sum(dim=1)
    return logprobs.gather(1, token_ids[:, None])[:, 0], entropy


def plain_logprobs(problem: Problem) -> tuple[Tensor, Tensor]:
    """All logits, log-softmax in float32 (float64 for float64), entropy without a gradient."""
    return _plain_logprobs(problem.hidden, problem.weight, problem.token_ids)


@cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    def loss(
        hidden: Tensor, weight: Tensor, token_ids: Tensor, advantages: Tensor, old: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropy = _plain_logprobs(hidden, weight, token_ids)
        return clipped_mean(logprobs, advantages, old, mask), entropy

    return torch.compile(loss, dynamic=False)


def compiled_loss(problem: Problem) -> Tensor:
    """Plain PyTorch through ``torch.compile``, for this very shape."""
    return _compiled()(
        *(problem.hidden, problem.weight, problem.token_ids, problem.advantages, problem.old_logprobs, problem.mask)
    )[0]


def liger_loss(problem: Problem, compiled: bool) -> Tensor:
    """``LigerFusedLinearGRPOLoss``; it computes no entropy."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    module = LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=compiled, use_ref_model=False, epsilon_low=EPSILON, epsilon_high=EPSILON, loss_type="dapo"
    )
    loss, _ = module(
        *(problem.padded(problem.hidden), problem.weight, problem.padded(problem.token_ids)),
        *(problem.padded(problem.mask).float(), problem.advantages),
        old_per_token_logps=problem.padded(problem.old_logprobs),
    )
    return loss


@contextmanager
def tf32() -> Iterator[None]:
    """float32 products in TF32, which is not PyTorch's default."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def liger_loss_tf32(problem: Problem, compiled: bool) -> Tensor:
    """As ``liger_loss``, whose gradient products are float32 and run in the forward pass."""
    with tf32():
        return liger_loss(problem, compiled)


def liger_loss_on_logits(problem: Problem) -> Tensor:
    """``triton_grpo_loss`` on full logits, which it overwrites with their gradient; it computes no entropy."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    hidden = torch.nn.functional.pad(problem.padded(problem.hidden), (0, 0, 0, 1))  # it drops the last row of each
    loss, _ = triton_grpo_loss(
        *(hidden @ problem.weight.t(), problem.padded(problem.old_logprobs), None, problem.padded(problem.token_ids)),
        *(problem.advantages, problem.padded(problem.mask).float()),
        temperature=1.0,
        beta=0.0,
        eps_low=EPSILON,
        eps_high=EPSILON,
        loss_type="dapo",
        reduce=True,
    )
    return loss


def trl_logprobs(problem: Problem) -> tuple[Tensor, Tensor]:
    """The head of TRL's GRPO trainer with the outputs that it asks for; on CUDA it scores the unmasked rows only."""
    from trl.kernels import ChunkedLogProbFunction

    mask = problem.mask
    hidden, ids = problem.hidden, problem.token_ids
    if hidden.is_cuda:
        hidden, ids = hidden[mask], ids[mask]
    no_softcap, logit_scale, outputs = None, 1.0, ("entropy",)
    settings = (1.0, TRL_VOCABULARY_CHUNK, no_softcap, logit_scale, outputs)
    logprobs, entropy, *_ = ChunkedLogProbFunction.apply(hidden, problem.weight, None, ids, *settings)
    if not problem.hidden.is_cuda:
        return logprobs.masked_fill(~mask, 0.0), entropy.masked_fill(~mask, 0.0)
    zeros = logprobs.new_zeros(mask.shape)
    return zeros.masked_scatter(mask, logprobs), zeros.masked_scatter(mask, entropy)


def liger_logprobs(problem: Problem) -> tuple[Tensor, Tensor]:
    """Liger's fused scaled cross-entropy: a kernel on Hopper (with nvidia-cutlass-dsl), else chunks of 512 rows."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    target = torch.where(problem.mask, problem.token_ids, -100)
    nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(
        *(problem.hidden, problem.weight, target), return_entropy=True
    )
    return -nll, entropy


def verl_logprobs(problem: Problem) -> tuple[Tensor, Tensor]:
    """verl's Triton head."""
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    logprobs, entropy = linear_cross_entropy(problem.hidden, problem.weight, problem.token_ids, 1.0, "none", None)
    return logprobs, entropy


def bare_products(problem: Problem, products: int = 3) -> Callable[[], None]:
    """The matrix products of the shape into preallocated outputs: the first one (scoring), or all 3."""
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    logits = hidden.new_empty(len(hidden), len(weight))
    hidden_grad, weight_grad = torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> None:
        torch.mm(hidden, weight.t(), out=logits)
        if products == 3:
            torch.mm(logits, weight, out=hidden_grad)
            torch.mm(logits.t(), hidden, out=weight_grad)

    return run
