"""Attention over a forest as a cascade of plain attention calls, merged by their log-sum-exp.

One causal call covers every node's own rows. Then one call a level, not causal: the descendants of each node (in
preorder one block) look at the node's own rows. With ``o_c, l_c`` the output and log-sum-exp of a row in call c::

    l = log sum_c exp(l_c)        o = sum_c exp(l_c - l) o_c

The gradient is not taken through that merge: flash operators ignore the gradient of their log-sum-exp, silently. Each
call is differentiated with the **merged** o and l instead. Its probabilities are then ``exp(scores - l)``, those of
the whole row, and ``sum(do * o)`` is the term that the softmax of the whole row needs; so each call yields its exact
share of dq, dk and dv, and the shares are summed. Ring attention (arXiv 2310.01889) rests on the same identity.

No score is stored and no key is repeated; what is kept is q, k, v, o and l, as in plain flash attention. Sums run in
at least float32 and are rounded once.

Dimension letters: S rows, L rows of a call, H query heads, H_kv key heads, d width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .attention_tree import AttentionTree
from .flash_operators import Operators, Rows, heads_first, rows_first


def cascade(query: Tensor, key: Tensor, value: Tensor, tree: AttentionTree, scale: float, flash: Operators) -> Tensor:
    """Attention of each row to its own node up to itself, and to all ancestors; differentiable once.

    Args:
        query: [1, H, S, d]; key, value: [1, H_kv, S, d], H a multiple of H_kv; of one dtype that ``flash`` takes.

    Returns:
        [1, H, S, d]; in memory rows come first.
    """
    return _Cascade.apply(query, key, value, tree, scale, flash)


class _Cascade(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, tree: AttentionTree, scale: float, flash: Operators
    ) -> Tensor:
        out, lse = forward(rows_first(query), rows_first(key), rows_first(value), tree, scale, flash)
        result = heads_first(out)
        ctx.save_for_backward(query, key, value, result, lse)
        ctx.tree, ctx.scale, ctx.flash = tree, scale, flash
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, result, lse = ctx.saved_tensors
        grad, query, key, value, out = (rows_first(tensor) for tensor in (grad, query, key, value, result))
        grads = backward(grad, query, key, value, out, lse, ctx.tree, ctx.scale, ctx.flash)
        needed = zip(grads, ctx.needs_input_grad[:3], strict=True)
        return *(heads_first(total).to(query.dtype) if need else None for total, need in needed), None, None, None


def forward(
    query: Tensor, key: Tensor, value: Tensor, tree: AttentionTree, scale: float, flash: Operators
) -> tuple[Tensor, Tensor]:
    """Output [S, H, d] in the dtype of the query and log-sum-exp [H, S] in at least float32."""
    rows, heads, _ = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    # Without a level nothing is merged, and a copy as it is does.
    out = query.new_empty(query.shape, dtype=wide if tree.levels else query.dtype)
    lse = query.new_empty(heads, rows, dtype=wide)
    for launch in flash.launches(tree, query.device):
        queries, keys = launch.queries, launch.keys
        part, part_lse = flash.forward(_take(query, queries), _take(key, keys), _take(value, keys), launch, scale)
        if launch.own:
            _take(out, queries).copy_(part)
            _take(lse, queries, 1).copy_(part_lse)
        else:
            _merge(out, lse, queries, part.to(wide), part_lse.to(wide))
    return out.to(query.dtype), lse


def _merge(out: Tensor, lse: Tensor, rows: Rows, part: Tensor, part_lse: Tensor) -> None:
    """Merge a call's ``part`` [L, H, d] and log-sum-exp [H, L] into those of its rows, in place."""
    out_rows, lse_rows = _take(out, rows), _take(lse, rows, 1)
    share = torch.sigmoid(part_lse - lse_rows)  # exp(l_part - l), whichever of both is larger
    out_rows.lerp_(part, share.t().unsqueeze(-1))
    torch.logaddexp(lse_rows, part_lse, out=lse_rows)
    if isinstance(rows, Tensor):  # these were copies
        out.index_copy_(0, rows, out_rows)
        lse.index_copy_(1, rows, lse_rows)


def _take(tensor: Tensor, rows: Rows, dim: int = 0) -> Tensor:
    """Some rows: a view for a slice, else a copy."""
    if isinstance(rows, Tensor):
        return tensor.index_select(dim, rows)
    return tensor.narrow(dim, rows.start, rows.stop - rows.start)


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    tree: AttentionTree,
    scale: float,
    flash: Operators,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq [S, H, d], dk and dv [S, H_kv, d] in at least float32, from what ``forward`` returned."""
    wide = torch.promote_types(query.dtype, torch.float32)
    totals = [torch.empty(operand.shape, dtype=wide, device=operand.device) for operand in (query, key, value)]
    for launch in flash.launches(tree, query.device):
        queries, keys = launch.queries, launch.keys
        seen = _take(grad, queries), _take(query, queries), _take(key, keys), _take(value, keys)
        parts = flash.backward(*seen, _take(out, queries), _take(lse, queries, 1), launch, scale)
        for total, part, rows in zip(totals, parts, (queries, keys, keys), strict=True):
            if isinstance(rows, Tensor):
                total.index_add_(0, rows, part.to(wide))
            elif launch.own:
                _take(total, rows).copy_(part)
            else:
                _take(total, rows).add_(part)
    return totals[0], totals[1], totals[2]
