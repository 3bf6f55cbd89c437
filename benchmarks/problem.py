"""The problems that the benchmarks solve.

Dimension letters: N rows, D hidden, V vocabulary, B sequences, T rows of each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

EPSILON = 0.2
"""The clip range of every side's loss, which is DAPO's (one mean over all tokens, no KL)."""
LOGIT_STD = 3.0
ROWS_AT_A_TIME = 256


@dataclass(frozen=True)
class Shape:
    """The size of a problem; ``sequences`` divides ``rows``."""

    name: str
    device: str
    rows: int
    hidden: int
    vocabulary: int
    sequences: int
    dtype: torch.dtype
    rounds: int

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.name}: N={self.rows:,} D={self.hidden:,} V={self.vocabulary:,} B={self.sequences} {kind}"


CPU = Shape("cpu", "cpu", 2048, 512, 32_000, 8, torch.float32, rounds=5)
SHAPES = (
    CPU,
    Shape("7b", "cuda", 8192, 3584, 152_064, 8, torch.bfloat16, rounds=11),  # Qwen2.5-VL 7B and 3B
    Shape("3b", "cuda", 8192, 2048, 151_936, 8, torch.bfloat16, rounds=11),
    Shape("7b-long", "cuda", 32_768, 3584, 152_064, 32, torch.bfloat16, rounds=5),
)
HEADLINE = ("cpu", "7b")
"""The shapes, one a device, whose results become named figures."""


@dataclass(frozen=True)
class Problem:
    """One policy-gradient loss: B sequences of T = N / B rows each, so that no side pays for padding.

    ``hidden`` and ``weight`` are leaves; a side leaves its gradients in their ``.grad``.
    """

    hidden: Tensor
    """[N, D]"""
    weight: Tensor
    """[V, D]"""
    token_ids: Tensor
    """[N], drawn from the policy."""
    advantages: Tensor
    """[B] float32"""
    old_logprobs: Tensor
    """[N] float32"""
    mask: Tensor
    """[N] bool"""

    @property
    def sequences(self) -> int:
        return len(self.advantages)

    @property
    def live(self) -> float:
        """Share of the sequences with an advantage other than 0."""
        return float((self.advantages != 0).float().mean())

    @cached_property
    def cu_seqlens(self) -> Tensor:
        rows = len(self.token_ids)
        return torch.arange(0, rows + 1, rows // self.sequences, device=self.token_ids.device)

    def padded(self, values: Tensor) -> Tensor:
        """[N, ...] as [B, T, ...], the layout of the peers."""
        return values.view(self.sequences, -1, *values.shape[1:])

    def forget_gradients(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def with_live(self, share: float) -> Problem:
        """The same problem with advantage 0 in all but this share of the sequences, spread evenly; at least one."""
        count = max(1, round(share * self.sequences))
        keep = torch.zeros_like(self.advantages)
        keep[torch.linspace(0, self.sequences - 1, count).round().long()] = 1.0
        return replace(self, advantages=self.advantages * keep)

    def with_frozen_head(self) -> Problem:
        return replace(self, weight=self.weight.detach())

    def part(self, rows: int) -> Problem:
        """The first ``rows // B`` rows of every sequence, with leaves of their own."""
        each = max(1, rows // self.sequences)

        def cut(values: Tensor) -> Tensor:
            return self.padded(values)[:, :each].flatten(0, 1).clone()

        return Problem(
            cut(self.hidden.detach()).requires_grad_(),
            self.weight.detach().requires_grad_(),
            *(cut(self.token_ids), self.advantages, cut(self.old_logprobs), cut(self.mask)),
        )

    def to(self, dtype: torch.dtype) -> Problem:
        """The same values in another floating dtype, with leaves of their own."""
        hidden, weight = (values.detach().to(dtype).requires_grad_() for values in (self.hidden, self.weight))
        old = self.old_logprobs.to(dtype)
        return replace(self, hidden=hidden, weight=weight, advantages=self.advantages.to(dtype), old_logprobs=old)


def make_problem(
    rows: int,
    hidden: int,
    vocabulary: int,
    sequences: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    drift: float = 0.05,
    masked: float = 0.0,
    seed: int = 0,
) -> Problem:
    """A random problem; every sequence has an advantage.

    Args:
        drift: standard deviation of the log-ratio. 0.05 puts the clip range at 3.6 deviations: practically every row
            has a gradient, and ours does the work of all rows as the others do.
        masked: share of rows that the mask takes out.
    """
    assert rows % sequences == 0, "sequences of equal length"
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    states = normal(rows, hidden).to(dtype)
    weight = (normal(vocabulary, hidden) * (LOGIT_STD / math.sqrt(hidden))).to(dtype)
    token_ids = torch.empty(rows, dtype=torch.int64, device=device)
    logprobs = torch.empty(rows, device=device)
    for start in range(0, rows, ROWS_AT_A_TIME):
        span = slice(start, start + ROWS_AT_A_TIME)
        logp = (states[span] @ weight.t()).float().log_softmax(dim=1)
        quantile = torch.rand(len(logp), 1, generator=generator, device=device)
        drawn = torch.searchsorted(logp.exp().cumsum(dim=1), quantile).clamp(max=vocabulary - 1)
        token_ids[span], logprobs[span] = drawn[:, 0], logp.gather(1, drawn)[:, 0]
    advantages = normal(sequences)
    advantages += advantages.sign() * 0.1  # none is 0 by chance
    mask = torch.rand(rows, generator=generator, device=device) >= masked
    old = logprobs + drift * normal(rows)
    return Problem(states.requires_grad_(), weight.requires_grad_(), token_ids, advantages, old, mask)


@lru_cache(maxsize=1)
def of_shape(shape: Shape) -> Problem:
    """The problem of a shape; the benchmarks share it."""
    return make_problem(
        *(shape.rows, shape.hidden, shape.vocabulary, shape.sequences),
        device=torch.device(shape.device),
        dtype=shape.dtype,
    )
