"""Flash attention as torch has it for each device, over segments of rows, with its log-sum-exp in and out.

Dimension letters: L rows of a call, H query heads, H_kv key heads, d width of a head. Rows come first here, [L, H, d],
as models lay them out; a log-sum-exp is [H, L].
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .attention_tree import AttentionTree

Rows = slice | Tensor
"""Rows of a call: a slice (views, no copy), or int64 row numbers."""


class Launch(NamedTuple):
    """One call of a flash operator: segments of query rows, each with the segment of key rows it looks at."""

    queries: Rows
    keys: Rows
    own: bool
    """Nodes look at their own rows: causal. These launches come first, each row stands in one, and rows are slices."""
    cu_queries: Tensor | None = None
    """[segments + 1] int32 offsets into the queries of this call; None: one segment."""
    cu_keys: Tensor | None = None
    max_queries: int = 0
    max_keys: int = 0


class Operators(Protocol):
    """A pair of flash operators and how a tree is laid out for it. Rows come first: [L, H, d], log-sum-exp [H, L]."""

    def launches(self, tree: AttentionTree, device: torch.device) -> tuple[Launch, ...]: ...

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, launch: Launch, scale: float
    ) -> tuple[Tensor, Tensor]: ...

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        launch: Launch,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class HostOperators:
    """A CPU: torch's own flash attention reads strides and grouped heads as they are, a segment a call."""

    def launches(self, tree: AttentionTree, device: torch.device) -> tuple[Launch, ...]:
        def make() -> tuple[Launch, ...]:
            own = [Launch(slice(start, stop), slice(start, stop), own=True) for start, stop, _ in tree.nodes]
            above = [
                Launch(slice(stop, end), slice(start, stop), own=False)
                for level in tree.levels
                for start, stop, end in level
            ]
            return (*own, *above)

        return tree.derived("host launches", make)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, launch: Launch, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            heads_first(query), heads_first(key), heads_first(value), 0.0, launch.own, scale=scale
        )
        return rows_first(out), lse.squeeze(0)

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        launch: Launch,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(heads_first(rows) for rows in (grad, query, key, value, out)),
            lse.unsqueeze(0),
            0.0,
            launch.own,
            scale=scale,
        )
        return rows_first(grads[0]), rows_first(grads[1]), rows_first(grads[2])


class VarlenOperators:
    """A CUDA device: segments of any lengths in one call; one call for all nodes, and one for each level.

    FlashAttention's backward adds to dq in no fixed order: bit-equal runs need
    ``torch.use_deterministic_algorithms(True)``.

    Args:
        forward, backward: called as torch's ``aten::_flash_attention_forward`` and ``_backward``; None: these.
    """

    def __init__(self, forward: Callable[..., Any] | None = None, backward: Callable[..., Any] | None = None) -> None:
        self._forward = forward or torch.ops.aten._flash_attention_forward
        self._backward = backward or torch.ops.aten._flash_attention_backward

    def launches(self, tree: AttentionTree, device: torch.device) -> tuple[Launch, ...]:
        def make() -> tuple[Launch, ...]:
            own = _varlen([(node.start, node.stop) for node in tree.nodes], None, device)
            above = [
                _varlen([(node.stop, node.end) for node in level], [(node.start, node.stop) for node in level], device)
                for level in tree.levels
            ]
            return (own, *above)

        return tree.derived(("varlen launches", device), make)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, launch: Launch, scale: float) -> tuple[Tensor, Tensor]:
        segments = launch.cu_queries, launch.cu_keys, launch.max_queries, launch.max_keys
        out, lse, *_ = self._forward(query, key, value, *segments, 0.0, launch.own, False, scale=scale)
        return out, lse

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        launch: Launch,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        segments = launch.cu_queries, launch.cu_keys, launch.max_queries, launch.max_keys
        # Without dropout the state of the random generator is asked for but not read.
        state = torch.zeros(2, dtype=torch.uint64, device=query.device), torch.empty(0, device=query.device)
        return self._backward(
            grad, query, key, value, out, lse.contiguous(), *segments, 0.0, launch.own, *state, scale=scale
        )


def operators(device_type: str) -> Operators:
    """The flash operators of a device type.

    Raises:
        RuntimeError: torch has none that return a log-sum-exp and take it back.
    """
    if device_type == "cpu":
        return HostOperators()
    if device_type == "cuda":
        return VarlenOperators()
    raise RuntimeError(f"torch has no flash operators for {device_type} that return a log-sum-exp")


def _varlen(queries: list[tuple[int, int]], keys: list[tuple[int, int]] | None, device: torch.device) -> Launch:
    """One launch over segments of rows (``keys`` None: the queries' own), which are consecutive within themselves."""
    cu_queries, longest = _offsets(queries, device)
    # A longest query of 1 would send grouped heads another, rarely used way; more only sizes the launch.
    longest = max(2, longest)
    if keys is None:
        rows = _rows(queries, device)
        return Launch(rows, rows, True, cu_queries, cu_queries, longest, longest)
    cu_keys, longest_key = _offsets(keys, device)
    return Launch(_rows(queries, device), _rows(keys, device), False, cu_queries, cu_keys, longest, longest_key)


def _offsets(segments: list[tuple[int, int]], device: torch.device) -> tuple[Tensor, int]:
    lengths = [stop - start for start, stop in segments]
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device), max(lengths)


def _rows(segments: list[tuple[int, int]], device: torch.device) -> Rows:
    """The rows of the segments: a slice where the segments meet."""
    if all(before[1] == after[0] for before, after in pairwise(segments)):
        return slice(segments[0][0], segments[-1][1])
    return torch.tensor([row for segment in segments for row in range(*segment)], device=device)


def rows_first(tensor: Tensor) -> Tensor:
    """[1, H, S, d] as [S, H, d], a view unless the width has a stride."""
    rows = tensor.squeeze(0).transpose(0, 1)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def heads_first(rows: Tensor) -> Tensor:
    """[S, H, d] as [1, H, S, d], a view."""
    return rows.transpose(0, 1).unsqueeze(0)
