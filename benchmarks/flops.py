"""Floating-point operations that really run: products and attention of all operators, ours opened up.

torch's own counter misses three things: attention on a CPU is unknown to it, a causal call counts as a full one, and an
operator of ours is a box whose products it does not see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten
FORWARD, BACKWARD = 2, 5
"""Products over all pairs: scores and output; scores again, the gradients of weights, values, queries and keys."""
Formula = Callable[..., int]


class _OpenBoxes(TorchDispatchMode):
    """Runs the implementations of our operators in sight of the modes below."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace != "arft_fast":
            return func(*args, **kwargs)
        device = next(value.device.type for value in args if isinstance(value, Tensor))
        backend = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, device.upper()))
        with self:
            return func.redispatch(backend, *args, **kwargs)


def _pairs(queries: int, keys: int, causal: bool) -> int:
    """Causal masks are aligned at the first query and the first key (both sides are as long in all calls of ours)."""
    if not causal:
        return queries * keys
    short = min(queries, keys)
    return short * (short + 1) // 2 + (queries - short) * keys


def _dense(products: int, first: int, causal_at: int) -> Formula:
    """Attention of [B, H, L, d] tensors; the query is argument ``first``, the causal flag argument ``causal_at``."""

    def formula(*args: Any, **kwargs: Any) -> int:
        query, key = args[first], args[first + 1]
        causal = kwargs.get("is_causal", args[causal_at] if len(args) > causal_at else False)
        batch, heads, length, width = query.shape
        return 2 * products * batch * heads * width * _pairs(length, key.shape[2], causal)

    return _raw(formula)


def _varlen(products: int, first: int, cu_at: int, causal_at: int) -> Formula:
    """Attention of packed [tokens, H, d] tensors with cumulative lengths, or [B, L, H, d] without."""

    def formula(*args: Any, **kwargs: Any) -> int:
        query, key = args[first], args[first + 1]
        cu_query, cu_key, causal = args[cu_at], args[cu_at + 1], args[causal_at]
        heads, width = query.shape[-2:]
        if cu_query is None:
            lengths = [(query.shape[1], key.shape[1])] * query.shape[0]
        else:
            lengths = list(zip(cu_query.diff().tolist(), cu_key.diff().tolist(), strict=True))
        return 2 * products * heads * width * sum(_pairs(queries, keys, causal) for queries, keys in lengths)

    return _raw(formula)


def _raw(formula: Formula) -> Formula:
    """Hands the formula tensors, not their shapes."""
    formula._get_raw = True  # type: ignore[attr-defined]  # how torch's counter asks
    return formula


FORMULAS: dict[Any, Formula] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _dense(FORWARD, 0, 4),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _dense(BACKWARD, 1, 7),
    aten._scaled_dot_product_flash_attention: _dense(FORWARD, 0, 4),
    aten._scaled_dot_product_flash_attention_backward: _dense(BACKWARD, 1, 11),
    aten._scaled_dot_product_efficient_attention: _dense(FORWARD, 0, 6),
    aten._scaled_dot_product_efficient_attention_backward: _dense(BACKWARD, 1, 11),
    aten._scaled_dot_product_cudnn_attention: _dense(FORWARD, 0, 6),
    aten._scaled_dot_product_cudnn_attention_backward: _dense(BACKWARD, 1, 14),
    aten._flash_attention_forward: _varlen(FORWARD, 0, 3, 8),
    aten._flash_attention_backward: _varlen(BACKWARD, 1, 6, 11),
}
"""Overrides of torch's formulas: a causal call computes a triangle."""


class Count:
    """Operations by operator, filled when the block is left."""

    def __init__(self) -> None:
        self.by_operator: dict[str, int] = {}

    @property
    def total(self) -> int:
        return sum(self.by_operator.values())


@contextmanager
def counted_flops() -> Iterator[Count]:
    """Counts what runs in the block: ``with counted_flops() as count: loss.backward()``, then ``count.total``."""
    count = Count()
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    with counter, _OpenBoxes():
        yield count
    count.by_operator = {str(name): flops for name, flops in counter.get_flop_counts().get("Global", {}).items()}
