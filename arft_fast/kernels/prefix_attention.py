"""Attention over a forest of sequences that share prefixes. Dimension letters: S rows, H heads, H_kv key heads, d."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from . import cascade, checks, flash_operators
from .attention_tree import AttentionTree, Node

TreeImpl = Literal["auto", "cascade", "dense"]
TREE_IMPLS: tuple[TreeImpl, ...] = ("auto", "cascade", "dense")

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest error of the self-test, relative to the norm; without the gradient of the merge dq and dk are off by 0.9."""


@torch.compiler.disable  # the tree is a Python object of this batch: a trace would be one batch's
def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tree: AttentionTree,
    *,
    scale: float | None = None,
    impl: TreeImpl = "auto",
) -> Tensor:
    """``softmax(scale * q_i . k_j over the rows j that row i sees) @ v``: row i's own node up to i, and all ancestors.

    So a prefix that several sequences share is there once, and each row's output and gradient are those of ordinary
    causal attention over its own path. Query head h reads key head ``h // (H / H_kv)``.

    ``"cascade"`` computes exactly the pairs that may look (``tree.pairs``), stores no scores and repeats no keys: see
    ``cascade.py``. Per row and head it keeps one log-sum-exp beside q, k, v and the output. ``"dense"`` masks an
    ordinary S x S attention; it is the definition, runs everywhere, and keeps S x S numbers for the tree.

    Args:
        query: [1, H, S, d] floating, S the rows of the tree.
        key, value: [1, H_kv, S, d], H a multiple of H_kv.
        tree: which row sees which.
        scale: of the scores; None: ``d ** -0.5``.
        impl: ``"auto"``: the cascade where its self-test passes (``tree_impl`` says whether it does).

    Returns:
        [1, H, S, d] in the dtype of the query (under autocast: in autocast's), rows first in memory.

    Raises:
        TypeError: a dtype or type is wrong.
        ValueError: a shape or device is wrong, or ``impl`` is unknown.
        RuntimeError: ``impl`` is ``"cascade"``, which cannot run here.
    """
    _check(query, key, value, tree)
    if scale is None:
        scale = query.shape[-1] ** -0.5
    else:
        checks.number("scale", scale)
    query, key, value = _autocast(query), _autocast(key), _autocast(value)
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(f"key, value: must be {query.dtype} as query is, got {key.dtype} and {value.dtype}; cast them")
    if tree_impl(query, impl) == "dense":
        return dense(query, key, value, tree, scale)
    return cascade.cascade(query, key, value, tree, scale, flash_operators.operators(query.device.type))


def tree_impl(query: Tensor, impl: TreeImpl = "auto") -> Literal["cascade", "dense"]:
    """Which implementation ``prefix_attention`` uses for queries of this device, dtype and width [..., d].

    The first question about each of them runs the self-test: forward and backward over a small forest of three levels
    with grouped heads, against plain products in float64. ``"auto"`` warns once where that fails.

    Raises:
        ValueError: ``impl`` is unknown.
        RuntimeError: ``impl`` is ``"cascade"``, which cannot run here.
    """
    checks.choice("impl", impl, TREE_IMPLS)
    if impl == "dense":
        return "dense"
    kind = query.device, query.dtype, query.shape[-1]
    if impl == "auto":
        return _auto(*kind)
    fault = cascade_fault(*kind)
    if fault is not None:
        raise RuntimeError(f"impl: 'cascade' cannot run here ({fault}); pass 'auto' or 'dense'")
    return "cascade"


@cache
def _auto(device: torch.device, dtype: torch.dtype, width: int) -> Literal["cascade", "dense"]:
    fault = cascade_fault(device, dtype, width)
    if fault is None:
        return "cascade"
    warnings.warn(
        f"prefix_attention: 'dense' runs instead of 'cascade' ({fault}); it is exact, slower, and keeps S x S numbers",
        stacklevel=2,
    )
    return "dense"


def dense(query: Tensor, key: Tensor, value: Tensor, tree: AttentionTree, scale: float) -> Tensor:
    """``prefix_attention`` by a mask; key heads are read by their queries without being copied."""
    bias = tree.bias(query.device, query.dtype)
    _, heads, rows, width = query.shape
    groups = key.shape[1]
    # [H_kv, H / H_kv, S, d], a key head standing for each of its query heads with a stride of 0. (enable_gqa would
    # leave CUDA no kernel but the one that stores all scores.)
    grouped = query[0].unflatten(0, (groups, heads // groups))
    keys, values = (operand[0, :, None].expand(-1, heads // groups, -1, -1) for operand in (key, value))
    out = scaled_dot_product_attention(grouped, keys, values, attn_mask=bias, scale=scale)
    return out.permute(2, 0, 1, 3).reshape(1, rows, heads, width).transpose(1, 2)


def _check(query: Tensor, key: Tensor, value: Tensor, tree: AttentionTree) -> None:
    if not isinstance(tree, AttentionTree):
        raise TypeError(f"tree: expected an AttentionTree, got {type(tree).__name__}")
    arguments = checks.Arguments()
    arguments.tensor("query", query, "1 H S d", "floating")
    arguments.tensor("key", key, "1 H_kv S d", "floating")
    arguments.tensor("value", value, "1 H_kv S d", "floating")
    if arguments.size("1") != 1:
        raise ValueError(f"query: expected one packed forest [1, H, S, d], got {list(query.shape)}; pack the sequences")
    if arguments.size("S") != tree.rows:
        raise ValueError(f"tree: has {tree.rows} rows but query {query.shape[2]}; pass the tree that packed the rows")
    heads, groups = arguments.size("H"), arguments.size("H_kv")
    if groups == 0 or heads % groups:
        raise ValueError(f"query: its {heads} heads must be a multiple of the {groups} heads of key; reshape it")


def _autocast(tensor: Tensor) -> Tensor:
    """As ``scaled_dot_product_attention`` reads it under autocast: narrow unless it is float64."""
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensor
    if tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


@cache
def cascade_fault(device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """Why the cascade cannot run for heads of this width; None: its self-test passes."""
    if dtype not in TOLERANCE:
        return f"it has no self-test for {dtype}"
    if device.type == "cuda" and (dtype not in (torch.float16, torch.bfloat16) or width % 8 or width > 256):
        return (
            "on CUDA flash attention takes float16 or bfloat16 heads of a width that is a multiple of 8 up to 256, "
            f"got {dtype} of width {width}"
        )
    try:
        errors = self_test(flash_operators.operators(device.type), device, dtype, width)
    except torch.OutOfMemoryError:
        raise  # says nothing about the operators
    except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
        # The operators are semi-private: gone, changed or not built for this device. Whoever asked is told the reason.
        return f"{type(error).__name__} in the self-test: {error}"
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE[dtype]}
    if wrong:
        found = ", ".join(f"{name} {error:.1e}" for name, error in wrong.items())
        return f"its self-test is off by {found}, allowed {TOLERANCE[dtype]:.1e}: do not trust flash attention here"
    return None


SELF_TEST_TREE = AttentionTree(
    [
        *(Node(0, 37, 96), Node(37, 48, 83), Node(48, 60, 60), Node(60, 83, 83), Node(83, 96, 96)),
        *(Node(96, 225, 263), Node(225, 250, 263), Node(250, 262, 263), Node(262, 263, 263)),
    ]
)


@torch.no_grad()
def self_test(
    flash: flash_operators.Operators,
    device: torch.device,
    dtype: torch.dtype,
    width: int,
    tree: AttentionTree = SELF_TEST_TREE,
) -> dict[str, float]:
    """The cascade's error in the output, dq, dk and dv, each a norm relative to that of the truth in float64.

    Values differ between nodes far more than within: nearly all of dq and dk is then the gradient of the merge.
    Autograd has no part in this, since the first call may stand inside a checkpoint that counts saved tensors.
    """
    generator = torch.Generator().manual_seed(0)
    heads, groups, scale = 4, 2, width**-0.5

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64, device="cpu")

    query, grad = normal(tree.rows, heads, width), normal(tree.rows, heads, width)
    key, value = normal(tree.rows, groups, width), 0.1 * normal(tree.rows, groups, width)
    for node in tree.nodes:
        value[node.start : node.stop] += normal(groups, width)
    query, key, value, grad = (operand.to(device, dtype) for operand in (query, key, value, grad))
    with torch.autocast(device.type, enabled=False):
        out, lse = cascade.forward(query, key, value, tree, scale, flash)
        found = (out, *cascade.backward(grad, query, key, value, out, lse, tree, scale, flash))
        # In float64 on a CPU, which not every device has.
        query, key, value, grad = (operand.cpu().double() for operand in (query, key, value, grad))
        truth = by_products(query, key, value, grad, tree, scale)
    return {
        name: float((ours.cpu().double() - true).norm() / true.norm())
        for name, ours, true in zip(("output", "dq", "dk", "dv"), found, truth, strict=True)
    }


def by_products(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, tree: AttentionTree, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, dq, dk and dv, rows first, by the formula: S x S probabilities, gradients written out."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scores = torch.einsum("ihd,jhd->hij", query, key) * scale
    shares = (scores + tree.bias(query.device, query.dtype)).softmax(-1)
    out = torch.einsum("hij,jhd->ihd", shares, value)
    of_shares = torch.einsum("ihd,jhd->hij", grad, value)
    of_scores = shares * (of_shares - (grad * out).sum(-1).t()[..., None]) * scale
    dq = torch.einsum("hij,jhd->ihd", of_scores, key)
    dk = torch.einsum("hij,ihd->jhd", of_scores, query).unflatten(1, (-1, repeats)).sum(2)
    dv = torch.einsum("hij,ihd->jhd", shares, grad).unflatten(1, (-1, repeats)).sum(2)
    return out, dq, dk, dv
