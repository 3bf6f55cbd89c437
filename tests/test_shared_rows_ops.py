"""Shared rows as ``torch.library`` operators and under ``torch.compile``, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from arft_fast.kernels import policy_loss
from arft_fast.kernels.dispatch import Impl
from arft_fast.kernels.objective import Loss, Objective

from .repeated_rows import DISTINCT, SHARED, Problem, assert_same

FUSED = pytest.mark.parametrize("every_impl", ["native", "triton"], indirect=True)


@FUSED
def test_the_operator_with_shared_rows_passes_opcheck(every_impl: Impl) -> None:
    problem = Problem()
    tokens, dtype = len(SHARED), torch.float64
    scale, sequence = torch.ones(tokens, dtype=dtype) / tokens, torch.zeros(tokens, dtype=torch.int64)
    rows = (problem.old, scale, sequence, torch.full((1,), float(tokens), dtype=dtype), None, None, None, None)
    chosen = ([1.0, 0.0, 1.0], Objective().to_numbers(), False, [True] * 3, 500, every_impl, problem.index)
    operands = (problem.hidden, problem.weight, problem.ids, problem.bias)
    torch.library.opcheck(torch.ops.arft_fast.policy_loss, (*operands, *rows, *chosen))


@FUSED
@pytest.mark.parametrize("loss", ["grpo", "gspo"])
@pytest.mark.parametrize("off_policy", [False, True])
def test_the_loss_on_shared_rows_compiles_without_a_graph_break(loss: Loss, off_policy: bool, every_impl: Impl) -> None:
    def step(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        hidden, weight, ids, advantages, cu_seqlens, old, ref, index = tensors
        total, statistics = policy_loss(
            hidden, weight, ids, advantages, cu_seqlens=cu_seqlens, row_index=index, impl=every_impl, loss=loss,
            old_logprobs=old if off_policy else None, ref_logprobs=ref, beta=0.1,
        )  # fmt: skip
        return 2 * total, statistics["entropy"]

    torch.compiler.reset()  # or the cases count as recompilations of one function
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for index in (SHARED, DISTINCT):
        p = Problem(index)
        tensors = (p.hidden, p.weight, p.ids, p.advantages, p.cu_seqlens, p.old, p.ref, p.index)
        (eager, eager_entropy), (loss_value, entropy) = step(*tensors), compiled(*tensors)
        torch.testing.assert_close((loss_value, entropy), (eager, eager_entropy))
        gradients = (torch.autograd.grad(value, tensors[:2]) for value in (loss_value, eager))
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("index", [SHARED, None])
def test_compiled_too_nothing_looks_at_rows_that_only_masked_tokens_read(index: list[int] | None) -> None:
    problem = Problem(SHARED if index else list(range(14)))
    mask = problem.index != 0
    row_index = problem.index if index else None
    torch.compiler.reset()
    compiled = torch.compile(policy_loss, fullgraph=True, backend="aot_eager")

    def call() -> tuple[Tensor, dict[str, Tensor]]:
        return compiled(
            problem.hidden, problem.weight, problem.ids, problem.advantages, cu_seqlens=problem.cu_seqlens,
            row_index=row_index, bias=problem.bias, loss="gspo", old_logprobs=problem.old, mask=mask, impl="native",
            ref_logprobs=problem.ref, beta=0.1, kl="k2",
        )  # fmt: skip

    expected = problem.results(call)
    with torch.no_grad():
        problem.hidden[0] = torch.nan
    assert_same(problem.results(call), expected)


BAD = [
    ({"row_index": SHARED}, TypeError, r"row_index: expected a torch.Tensor \[N\]"),
    ({"row_index": torch.zeros(14)}, TypeError, "row_index: expected a integer dtype"),
    ({"row_index": torch.zeros(2, 7).long()}, ValueError, r"row_index: expected shape \[N\]"),
    ({"row_index": torch.tensor(SHARED) + 2}, ValueError, r"row_index: must lie in 0 \.\. 10 .* got 2 \.\. 11; number"),
    ({"row_index": torch.tensor(SHARED) - 1}, ValueError, r"row_index: must lie in 0 \.\. 10 .* got -1 \.\. 8; number"),
    ({"ref_logprobs": torch.zeros(14)}, ValueError, r"ref_logprobs: expected shape \[M\] with M=11 \(from hidden\)"),
    ({"ref_logprobs": torch.full((11,), torch.nan)}, ValueError, "ref_logprobs: row 0 is not finite"),
    ({"old_logprobs": torch.zeros(11)}, ValueError, r"old_logprobs: expected shape \[N\] with N=14 \(from row_index\)"),
    ({"mask": torch.ones(11).bool()}, ValueError, r"mask: expected shape \[N\] with N=14 \(from row_index\)"),
    ({"cu_seqlens": torch.tensor([0, 11])}, ValueError, r"cu_seqlens: must start at 0 and end at N=14"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD)
def test_a_bad_argument_is_named_with_its_remedy(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        Problem().call(**change)
