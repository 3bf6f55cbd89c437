"""Rows of the head that several terms of a loss read: gathers, sums over a row's terms, rows in place of their terms.

On a prefix tree samples with the same past and the same next token share a row. The head computes it once; the loss has
a term for each sample, with its own advantage and weight. Without ``row_index`` every row is one term.

The scatters and gathers here give the same bits in every run, backward passes too, as ``Tensor[index]`` and
``index_add`` alone do not: on a CPU ``index_put`` with duplicates adds in the order in which threads arrive (so does
the backward pass of ``Tensor[index]``) while ``index_add`` (that of ``index_select``) adds vectors in order; on CUDA
``index_add`` is atomic, and ``index_put`` sorts first.

Dimension letters: M rows of the head, N terms (sampled tokens of all sequences).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rows import RowObjective, Vectors


def read(values: Tensor, index: Tensor | None, where: Tensor | None = None) -> Tensor:
    """[N]: ``values[index]`` (None: all ``values``), and 0, with no gradient, where ``where`` [N] is False."""
    if index is not None:
        values = values[index] if values.is_cuda else values.index_select(0, index)
    return values if where is None else torch.where(where, values, 0)


def add_up(values: Tensor, index: Tensor, size: int) -> Tensor:
    """[size]: sums of the ``values`` [N] that have the same ``index``."""
    totals = values.new_zeros(size)
    if values.is_cuda:
        return totals.index_put((index,), values, accumulate=True)
    return totals.index_add(0, index, values)


def read_by(terms: Tensor, row_index: Tensor | None, rows: int) -> Tensor:
    """[M] bool: rows that one of ``terms`` [N] bool reads."""
    if row_index is None:
        return terms
    found = torch.zeros(rows + 1, dtype=torch.bool, device=terms.device)
    return found.index_fill(0, torch.where(terms, row_index, rows), True)[:rows]


def stand_for_terms(vectors: Vectors, row_index: Tensor | None, terms: Tensor, rows: int) -> bool:
    """Whether each row's gradient is a row problem of its own: ``merge`` of ``vectors`` [N] of the live ``terms`` [N].

    At ratio 1 the coefficient is linear in the advantage, and the terms of a row add up. Elsewhere clip and weight
    belong to the term: each row must have one at most. That is looked up in the values, so not under a compiler.
    """
    if row_index is None or _linear(vectors):
        return True
    if torch.compiler.is_compiling():
        return False
    counts = torch.bincount(torch.where(terms, row_index, rows), minlength=rows + 1)[:rows]
    return not bool((counts > 1).any())


def merge(
    row: RowObjective, vectors: Vectors, row_index: Tensor | None, terms: Tensor, rows: int
) -> tuple[Tensor, Vectors]:
    """Rows with a gradient [M] bool, and vectors [M] with the sum of the gradients of their live ``terms`` [N] bool.

    ``sum_i s_i (beta KL' - A_i) = S (beta KL' - sum_i s_i A_i / S)`` with ``S = sum_i s_i``. A row whose terms cancel
    to exactly 0 has no gradient, unless its KL or its entropy has one.
    """
    if row_index is None:
        return terms, vectors
    slot = torch.where(terms, row_index, rows)  # one slot more than there are rows, for the terms that are not live

    def of_row(values: Tensor | None) -> Tensor | None:
        """Values that the terms of a row have in common."""
        return None if values is None else values.new_zeros(rows + 1).index_copy(0, slot, values)[:rows]

    pulls = vectors.scale * vectors.advantage
    scale, pull = (add_up(values, slot, rows + 1)[:rows] for values in (vectors.scale, pulls))
    advantage = pull / torch.where(scale != 0, scale, 1.0)
    merged = Vectors(advantage, scale, of_row(vectors.old), of_row(vectors.ref), of_row(vectors.sampler))
    live = read_by(terms, row_index, rows)
    if _linear(vectors) and vectors.ref is None and row.entropy_coef == 0:
        live = live & (advantage != 0)
    return live, merged


def _linear(vectors: Vectors) -> bool:
    return vectors.old is None and vectors.sampler is None
