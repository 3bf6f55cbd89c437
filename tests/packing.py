"""One small off-policy batch in two layouts: padded [B, T] as the published trainers take it, packed rows as ours does.

Dimension letters: B sequences, T their longest length, N rows, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from arft_fast.kernels import policy_loss

LENGTHS = (7, 4, 0, 6, 5, 3, 3)
ADVANTAGES = (1.8, -0.8, 0.5, -0.3, 0.9, 0.0, -0.6)
SHIFTS = (0.1, 0.5, 0.0, -0.5, 0.45, 0.2, 0.0)
"""Mean log-ratio of each sequence: past the clip range, on either side, for some of either sign of the advantage."""
HOLES = ((0, 2), (0, 3), (3, 0), (4, 2))
"""(sequence, position) of tokens that a tool wrote: inside their completions, not part of the loss."""


@dataclass(frozen=True)
class Batch:
    """Operands and per-token inputs, padded."""

    hidden: Tensor
    """[B, T, D]; gradients are compared with respect to it, so padding must come out as 0."""
    weight: Tensor
    """[V, D]"""
    ids: Tensor
    """[B, T]"""
    completion: Tensor
    """[B, T] bool: ragged lengths, one of them 0."""
    sampled: Tensor
    """[B, T] bool: False where a tool wrote the token."""
    advantages: Tensor
    """[B]"""
    old: Tensor
    """[B, T], likewise ``ref`` and ``sampler``: within two nats of the log-probs that the operands give."""
    ref: Tensor
    sampler: Tensor

    @property
    def mask(self) -> Tensor:
        """[B, T] bool: the tokens of the loss."""
        return self.completion & self.sampled

    @property
    def tokens(self) -> int:
        """How many tokens the loss is over."""
        return int(self.mask.sum())

    def to(self, dtype: torch.dtype) -> Batch:
        """The same batch with every floating tensor rounded to ``dtype``."""
        cast = {name: value.detach().to(dtype) for name, value in vars(self).items() if value.is_floating_point()}
        for name in ("hidden", "weight"):
            cast[name].requires_grad_()
        return replace(self, **cast)

    def logprobs(self) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies [B, T] of all positions by plain PyTorch, differentiable in the operands."""
        everything = (self.hidden @ self.weight.T).log_softmax(-1)
        return everything.gather(-1, self.ids[..., None])[..., 0], -(everything.exp() * everything).sum(-1)


def make_batch(seed: int = 0, width: int = 8, vocabulary: int = 23) -> Batch:
    """A float64 batch on both sides of every clip range."""
    generator = torch.Generator().manual_seed(seed)
    sequences, longest = len(LENGTHS), max(LENGTHS)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    sampled = torch.ones(sequences, longest, dtype=torch.bool)
    sampled[tuple(zip(*HOLES, strict=True))] = False
    blank = torch.zeros(sequences, longest, dtype=torch.float64)
    batch = Batch(
        hidden=normal(sequences, longest, width).requires_grad_(),
        weight=(0.7 * normal(vocabulary, width)).requires_grad_(),
        ids=torch.randint(vocabulary, (sequences, longest), generator=generator),
        completion=torch.arange(longest) < torch.tensor(LENGTHS)[:, None],
        sampled=sampled,
        advantages=torch.tensor(ADVANTAGES, dtype=torch.float64),
        **dict.fromkeys(("old", "ref", "sampler"), blank),
    )
    now = batch.logprobs()[0].detach()
    old = now - torch.tensor(SHIFTS, dtype=torch.float64)[:, None] + 0.4 * normal(sequences, longest)
    return replace(
        batch, old=old, ref=now + 0.4 * normal(sequences, longest), sampler=old + 0.2 * normal(sequences, longest)
    )


def pack(batch: Batch, *, drop_holes: bool = False) -> dict[str, Any]:
    """The rows of the completions as arguments of ``policy_loss``; tokens of tools masked, or not among the rows."""
    where = batch.mask if drop_holes else batch.completion
    lengths = where.sum(1)
    return {
        "hidden": batch.hidden[where],
        "weight": batch.weight,
        "token_ids": batch.ids[where],
        "advantages": batch.advantages,
        "cu_seqlens": torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
        "mask": None if drop_holes else batch.sampled[where],
    }


def rows(batch: Batch, values: Tensor | None) -> Tensor | None:
    """[N]: padded values [B, T] or [B, 1] in the order of ``pack``."""
    return None if values is None else values.expand(batch.completion.shape)[batch.completion]


def gradients(batch: Batch, loss: Tensor) -> tuple[Tensor, Tensor]:
    """Of ``loss`` with respect to the padded hidden states [B, T, D] and the weight [V, D]."""
    return torch.autograd.grad(loss, (batch.hidden, batch.weight))


def graph(batch: Batch, *, impl: str, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """What ``policy_loss`` returns for the packed batch; per-token options are padded [B, T] (or [B, 1])."""
    per_token = ("old_logprobs", "ref_logprobs", "sampler_logprobs", "sampler_weights")
    packed = {name: rows(batch, value) if name in per_token else value for name, value in options.items()}
    return policy_loss(**pack(batch) | packed, impl=impl)


def ours(batch: Batch, *, impl: str, **options: Any) -> tuple[Tensor, tuple[Tensor, Tensor], dict[str, Tensor]]:
    """Our loss, gradients and statistics; the options as in ``graph``."""
    loss, statistics = graph(batch, impl=impl, **options)
    return loss.detach(), gradients(batch, loss), statistics


def distance(actual: Tensor, expected: Tensor) -> float:
    """RMS of the difference over RMS of what is expected, in float64; infinite where anything is not a number."""
    actual, expected = actual.detach().double(), expected.detach().double()
    error = float((actual - expected).square().mean().sqrt() / expected.square().mean().sqrt())
    return math.inf if math.isnan(error) else error


def disagreement(actual: tuple[Any, ...], expected: tuple[Any, ...]) -> float:
    """The largest distance among loss and gradients, each given as ``(loss, (of hidden, of weight), ...)``."""
    pairs = [(actual[0], expected[0]), *zip(actual[1], expected[1], strict=True)]
    return max(distance(got, want) for got, want in pairs)
