"""A small loss problem whose rows several tokens read, and its definition: every token with a row of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from arft_fast.kernels import linear_logprob, policy_loss

LENGTHS = [4, 0, 3, 5, 2]
SHARED = [0, 1, 2, 3, 0, 1, 4, 0, 5, 6, 7, 8, 9, 4]
"""Three samples share row 0, two rows 1 and 4; nobody reads row 10."""
DISTINCT = [13, 2, 7, 1, 0, 9, 5, 11, 3, 4, 12, 8, 6, 10]
WIDTH, VOCABULARY = 6, 37

Results = tuple[Tensor, list[Tensor], dict[str, Tensor]]


class Problem:
    """Fourteen tokens on up to fourteen rows in fp64, off-policy by 0.4 nat, with a forbidden id."""

    def __init__(self, index: list[int] = SHARED, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.index = torch.tensor(index)
        rows = 11 if index == SHARED else len(index)
        self.hidden = normal(rows, WIDTH).requires_grad_()
        self.weight = normal(VOCABULARY, WIDTH).requires_grad_()
        bias = normal(VOCABULARY)
        bias[5] = -torch.inf
        self.bias = bias.requires_grad_()
        self.ids = torch.randint(6, VOCABULARY, (rows,), generator=generator)
        self.advantages = normal(len(LENGTHS))
        self.cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0)
        now = linear_logprob(self.hidden, self.weight, self.ids, bias=self.bias, impl="reference")[0].detach()
        self.ref = now + 0.4 * normal(rows)
        self.old, self.sampler = (now[self.index] + 0.4 * normal(len(index)) for _ in range(2))
        self.mask = torch.rand(len(index), generator=generator) > 0.2
        self.weights = torch.rand(len(index), generator=generator, dtype=torch.float64) * 2

    def call(self, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """``policy_loss`` on the rows as they are, with ``row_index``."""
        chosen = {"cu_seqlens": self.cu_seqlens, "bias": self.bias, "row_index": self.index} | options
        return policy_loss(self.hidden, self.weight, self.ids, chosen.pop("advantages", self.advantages), **chosen)

    def repeated(self, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The definition: every token with a row of its own."""
        chosen = {"cu_seqlens": self.cu_seqlens, "bias": self.bias} | options
        if chosen.get("ref_logprobs") is not None:
            chosen["ref_logprobs"] = chosen["ref_logprobs"][self.index]
        operands = self.hidden[self.index], self.weight, self.ids[self.index]
        return policy_loss(*operands, chosen.pop("advantages", self.advantages), **chosen)

    def results(self, call: Callable[..., tuple[Tensor, dict[str, Tensor]]], **options: Any) -> Results:
        """Loss, gradients and statistics that do not count rows."""
        loss, statistics = call(**options)
        statistics.pop("gradient_rows")
        return loss.detach(), list(torch.autograd.grad(loss, (self.hidden, self.weight, self.bias))), statistics


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-3))


def assert_same(actual: Results, expected: Results, case: object = None) -> None:
    assert error(actual[0], expected[0]) <= 1e-12, case
    assert max(error(got, want) for got, want in zip(actual[1], expected[1], strict=True)) <= 1e-12, case
    torch.testing.assert_close(actual[2], expected[2], rtol=1e-12, atol=1e-12, msg=lambda text: f"{case}: {text}")
