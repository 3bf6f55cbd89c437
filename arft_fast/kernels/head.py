"""The vocabulary head in chunks of rows: products, row kernels, gradients, and never more than one chunk of logits.

A product is 2 N V D floating-point operations; everything else here is a few percent of one. Scoring takes 1, a
gradient in the forward pass 3 (2 where weight or hidden states need none), a gradient in a backward pass 3 for stashed
chunks and 4 for those that are computed again; a share f of rows with a gradient makes that 1 + 2 f or 1 + 3 f.

Dimension letters: N rows, D hidden, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import Chosen, row_kernels
from .reference import CHUNK_BYTES, compute_dtype
from .rows import RowObjective, Transform, Vectors

CUDA_CHUNK_BYTES = 1792 * 2**20
"""Default budget of a chunk on CUDA: 3,000 rows of 152,064 float32 logits. Adding a chunk's product to the float32
gradient of the weight reads and writes that gradient once, which hides behind the product from about 3,000 rows on."""

WEIGHT_BLOCK_BYTES = 2 * 2**20
"""On a CPU a few hundred rows meet the weight in blocks that stay in the cache: threads of a product share rows out,
and each packs all of the weight for itself (12 % of a product of 512 rows on two cores)."""

Index = slice | Tensor
"""Rows of a chunk: a slice (views, no copy), or int64 row numbers."""


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool


class Head:
    """The operands of ``hidden @ weight.T`` in the precision of the products, and what turns a product into a logit.

    On a CPU bfloat16 operands are upcast (its bfloat16 products are 35 times slower). On CUDA they stay bfloat16 with
    float32 logits: rounding logits to bfloat16 costs 0.03 nat in a log-prob (PR 525 of Fast-LLM), a ratio of its own.
    float16 is upcast too: gradients divided by the number of tokens underflow in it.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        token_ids: Tensor,
        bias: Tensor | None,
        transform: Transform,
        chunk_bytes: int,
        chosen: Chosen,
    ) -> None:
        self.logits_dtype = compute_dtype(hidden, weight)
        self.dtype = torch.bfloat16 if _has_tensor_cores(hidden, weight) else self.logits_dtype
        self.hidden = hidden.detach().to(self.dtype)
        self.weight = weight.detach().to(self.dtype)
        self.token_ids = token_ids.long()
        self.bias = None if bias is None else bias.detach().to(self.logits_dtype)
        self.transform = transform
        self.kernels = row_kernels(chosen)
        self.chunk_rows = rows_within(chunk_bytes, weight.shape[0], self.logits_dtype)
        self._workspace: Tensor | None = None

    def products(self, rows: Tensor, out: Tensor) -> Tensor:
        """``rows @ weight.T`` into ``out`` [C, V]."""
        block = len(self.weight) if rows.is_cuda else max(1, WEIGHT_BLOCK_BYTES // (rows.shape[1] * rows.itemsize))
        for start in range(0, len(self.weight), block):
            _product(rows, self.weight[start : start + block].t(), out[:, start : start + block])
        return out

    def workspace(self, rows: int) -> tuple[Tensor, Tensor]:
        """Logits [rows, V] and their gradient over the same memory: itself, or the narrower dtype at the row starts."""
        if self._workspace is None:
            size = min(self.chunk_rows, len(self.hidden)), self.weight.shape[0]
            self._workspace = self.hidden.new_empty(size, dtype=self.logits_dtype)
        logits = self._workspace[:rows]
        narrow = logits if self.dtype == self.logits_dtype else logits.view(self.dtype)[:, : logits.shape[1]]
        return logits, narrow

    def per_row(self, values: float = 0.0) -> Tensor:
        """[N] in the dtype of the statistics."""
        return self.hidden.new_full((len(self.hidden),), values, dtype=self.logits_dtype)


def _has_tensor_cores(hidden: Tensor, weight: Tensor) -> bool:
    """Whether products of bfloat16 operands are fast here and may sum into float32."""
    return hidden.is_cuda and hidden.dtype == weight.dtype == torch.bfloat16


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``; the product is not rounded to narrower operands before it is added."""
    if left.dtype == total.dtype:
        torch.addmm(total, left, right, out=total)
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


def _product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """``left @ right`` into ``out``, which on CUDA may be wider than the operands: the sum is not rounded to them.

    Autocast leaves products into an ``out`` as they are.
    """
    if left.dtype == out.dtype:
        return torch.mm(left, right, out=out)
    return torch.mm(left, right, out_dtype=out.dtype, out=out)


def rows_within(budget: int, vocabulary: int, dtype: torch.dtype) -> int:
    """How many rows of logits a budget in bytes holds; at least one."""
    return max(1, budget // (vocabulary * dtype.itemsize))


def default_chunk_bytes(hidden: Tensor) -> int:
    """The budget of one chunk where the caller gives none."""
    return CUDA_CHUNK_BYTES if hidden.is_cuda else CHUNK_BYTES


def chunks(selection: Tensor | None, total: int, size: int) -> Iterator[Index]:
    """The selected rows (None: all ``total``) in chunks of at most ``size``, of nearly the same length."""
    count = total if selection is None else len(selection)
    if count == 0:
        return
    even = -(-count // -(-count // size))
    for start in range(0, count, even):
        span = slice(start, min(start + even, count))
        yield span if selection is None else selection[span]


class Gradients:
    """Both gradients, collected chunk by chunk; sums over chunks run in at least float32 and are rounded once."""

    def __init__(self, head: Head, needs: Needs) -> None:
        self._head, self._needs = head, needs
        self._hidden = torch.zeros_like(head.hidden) if needs.hidden else None
        self._weight: Tensor | None = None
        self._bias = head.bias.new_zeros(head.bias.shape) if needs.bias and head.bias is not None else None

    def add(self, index: Index, rows: Tensor, gradient: Tensor) -> None:
        """Add the gradient [C, V] of the products of ``rows`` [C, D], the hidden states at ``index``."""
        if self._hidden is not None:
            if isinstance(index, slice):
                _product(gradient, self._head.weight, self._hidden[index])
            else:
                self._hidden[index] = _product(gradient, self._head.weight, torch.empty_like(rows))
        if self._needs.weight:
            self._add_weight(gradient.t(), rows)
        if self._bias is not None:
            self._bias += gradient.sum(dim=0, dtype=self._bias.dtype)

    def _add_weight(self, gradient: Tensor, rows: Tensor) -> None:
        if self._weight is None:
            self._weight = rows.new_empty(self._head.weight.shape, dtype=self._head.logits_dtype)
            _product(gradient, rows, self._weight)
        else:
            _accumulate(self._weight, gradient, rows)

    def collect(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients in the dtypes of their operands; empty where none is needed."""
        if self._needs.weight and self._weight is None:
            self._weight = torch.zeros_like(weight)

        def rounded(gradient: Tensor | None, operand: Tensor | None) -> Tensor:
            return hidden.new_empty(0) if gradient is None or operand is None else gradient.to(operand.dtype)

        return rounded(self._hidden, hidden), rounded(self._weight, weight), rounded(self._bias, bias)


def score(head: Head, selection: Tensor | None, stash: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """logprobs [N] and entropy [N] of the selected rows (0 elsewhere): one product.

    Args:
        stash: [S, V]; keeps the products of the first S selected rows.
    """
    logprobs, entropy = head.per_row(), head.per_row()
    kept = 0 if stash is None else len(stash)
    total = len(head.hidden) if selection is None else len(selection)
    assert selection is None or kept == 0, "a stash belongs to the first rows"
    spans = [*chunks(selection, kept, head.chunk_rows)] if kept else []
    for index in (*spans, *_rest(selection, kept, total, head.chunk_rows)):
        rows = head.hidden[index]
        into_stash = stash is not None and isinstance(index, slice) and index.stop <= kept
        logits = stash[index] if into_stash and stash is not None else head.workspace(len(rows))[0]
        out = logprobs.new_empty(2, len(rows))
        head.products(rows, logits)
        head.kernels.score(logits, head.token_ids[index], head.bias, head.transform, out[0], out[1])
        logprobs[index], entropy[index] = out
    return logprobs, entropy


def _rest(selection: Tensor | None, start: int, total: int, size: int) -> Iterator[Index]:
    """Chunks of the selected rows from ``start`` on."""
    for index in chunks(None if selection is None else selection[start:], total - start, size):
        yield slice(index.start + start, index.stop + start) if isinstance(index, slice) else index


def policy_gradients(
    head: Head, needs: Needs, selection: Tensor | None, objective: RowObjective, vectors: Vectors
) -> tuple[Tensor, Tensor, Tensor, Gradients]:
    """logprobs, entropy and coefficient [N] of the selected rows (0 elsewhere), and the gradients: 1 + 2 f products."""
    logprobs, entropy, coefficient = head.per_row(), head.per_row(), head.per_row()
    gradients = Gradients(head, needs)
    for index in chunks(selection, len(head.hidden), head.chunk_rows):
        rows, part = head.hidden[index], vectors.take(index)
        logits, gradient = head.workspace(len(rows))
        out = logprobs.new_empty(3, len(rows))
        head.products(rows, logits)
        head.kernels.policy(
            logits, head.token_ids[index], head.bias, head.transform, objective, part, out[0], out[1], out[2], gradient
        )
        logprobs[index], entropy[index], coefficient[index] = out
        if objective.entropy_coef == 0 and _may_vanish(objective, part):
            index, rows, gradient = _compact(index, rows, gradient, out[2] != 0)
        if len(rows):
            gradients.add(index, rows, gradient)
    return logprobs, entropy, coefficient, gradients


def given_gradients(
    head: Head, needs: Needs, coefficient: Tensor, entropy_weight: Tensor | None, stash: Tensor
) -> Gradients:
    """The gradients for given ``coefficient`` = d loss / d logp and ``entropy_weight`` = d loss / d entropy [N].

    Rows where both are 0 cost nothing. Stashed products are copied first, so that the stash serves a second backward.
    """
    gradients = Gradients(head, needs)
    has_gradient = coefficient != 0 if entropy_weight is None else (coefficient != 0) | (entropy_weight != 0)
    live = has_gradient.nonzero()[:, 0]
    stashed = int((live < len(stash)).sum())
    for span in (*chunks(live[:stashed], 0, head.chunk_rows), *chunks(live[stashed:], 0, head.chunk_rows)):
        assert isinstance(span, Tensor)
        index = _as_slice(span)
        rows = head.hidden[index]
        logits, gradient = head.workspace(len(rows))
        if int(span[-1]) < len(stash):
            torch.index_select(stash, 0, span, out=logits)
        else:
            head.products(rows, logits)
        weights = None if entropy_weight is None else entropy_weight[index].contiguous()
        head.kernels.gradients(
            logits, head.token_ids[index], head.bias, head.transform, coefficient[index].contiguous(), weights, gradient
        )
        gradients.add(index, rows, gradient)
    return gradients


def _as_slice(index: Tensor) -> Index:
    """Consecutive row numbers as a slice, which views instead of copying."""
    first, last = int(index[0]), int(index[-1])
    return slice(first, last + 1) if last - first + 1 == len(index) else index


def _may_vanish(objective: RowObjective, vectors: Vectors) -> bool:
    """Whether rows are likely to turn out without a gradient: on CUDA asking them costs a wait for the chunk.

    A row that is not asked is a row of zeros: it costs its share of two products and changes nothing.
    """
    if not vectors.advantage.is_cuda:
        return True
    clips = vectors.old is not None and objective.surrogate != "cispo"
    return (clips and vectors.ref is None) or objective.sampler == "mask"


def _compact(index: Index, rows: Tensor, gradient: Tensor, live: Tensor) -> tuple[Index, Tensor, Tensor]:
    """Leave out the rows that are not ``live`` [C]: live rows from the end fill the holes before it, in place.

    It moves no more rows than have died, in pieces, so that no second chunk is needed.
    """
    count = int(live.sum())
    if count == len(rows):
        return index, rows, gradient
    order = torch.arange(len(rows), device=rows.device)
    holes = (~live[:count]).nonzero()[:, 0]
    fillers = live[count:].nonzero()[:, 0] + count
    for hole, filler in zip(holes.split(16), fillers.split(16), strict=True):
        gradient.index_copy_(0, hole, gradient.index_select(0, filler))
    order[holes] = fillers
    order = order[:count]
    where = order + index.start if isinstance(index, slice) else index[order]
    return where, rows[order], gradient[:count]
