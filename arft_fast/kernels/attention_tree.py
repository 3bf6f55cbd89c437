"""Which rows of a packed forest may look at which: integers and what is derived from them, no arithmetic of attention.

Dimension letter: S rows, in depth-first preorder.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from operator import index
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Node(NamedTuple):
    """A run of rows without a branch."""

    start: int
    """Own rows are ``start .. stop - 1``."""
    stop: int
    """Descendants are the rows ``stop .. end - 1``; a leaf has ``end == stop``."""
    end: int


class AttentionTree:
    """Rows in depth-first preorder; a row sees its own node up to itself, and all of its node's ancestors.

    It never changes, holds integers only and is copied and pickled without the tensors that were derived from it.

    Attributes:
        nodes: as given.
        rows: S.
        levels: the nodes that have descendants, by depth (0: roots). A depth without any is absent; so is every one
            below it.
    """

    nodes: tuple[Node, ...]
    rows: int
    levels: tuple[tuple[Node, ...], ...]

    def __init__(self, nodes: Sequence[Node]) -> None:
        """Check the nodes.

        Args:
            nodes: ``(start, stop, end)`` each, in preorder: their own rows follow each other from 0 to S - 1 without a
                gap, and ``end`` is where the next node begins that is not a descendant (S where there is none).

        Raises:
            TypeError: a row number is not an integer.
            ValueError: the nodes are not a forest in preorder.
        """
        self.nodes = tuple(_node(number, node) for number, node in enumerate(nodes))
        self.rows, self.levels = _levels(self.nodes)
        self._derived: dict[Hashable, Any] = {}

    def __repr__(self) -> str:
        return f"AttentionTree({self.rows} rows, {len(self.nodes)} nodes, {len(self.levels)} levels)"

    def __reduce__(self) -> tuple[type[AttentionTree], tuple[tuple[Node, ...]]]:
        return AttentionTree, (self.nodes,)

    @property
    def pairs(self) -> int:
        """(query, key) pairs that may look: each row's path length up to and including the row, summed."""
        # A row is looked at by itself and by what follows it up to the end of its node: the sum of end - row.
        return sum((stop - start) * (2 * end - start - stop + 1) // 2 for start, stop, end in self.nodes)

    def mask(self, device: torch.device | str) -> Tensor:
        """[S, S] bool, made anew: ``mask[i, j]`` says that row i sees row j, ``(j <= i) & (i < end of j's node)``."""
        lengths = torch.tensor([node.stop - node.start for node in self.nodes], device="cpu")
        end = torch.tensor([node.end for node in self.nodes], device="cpu").repeat_interleave(lengths).to(device)
        return (torch.arange(self.rows, device=device)[:, None] < end).tril_()

    def bias(self, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """[S, S]: what is added to the scores, 0 where a row sees and -inf elsewhere; made once and kept.

        ``scaled_dot_product_attention`` makes one of every boolean mask in every call and keeps it for the backward
        pass, once a layer. Rows lie 16 numbers aligned, or its memory-efficient kernel would copy this one too.
        """
        device = torch.device(device)

        def make() -> Tensor:
            width = -(-self.rows // 16) * 16
            bias = torch.full((self.rows, width), -torch.inf, device=device, dtype=dtype)[:, : self.rows]
            return bias.masked_fill_(self.mask(device), 0.0)

        return self.derived(("bias", device, dtype), make)

    def derived(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` returns, made once for each ``key`` and kept as long as the tree lives."""
        if key not in self._derived:
            # A tensor made under inference mode could not be saved for a backward pass later.
            with torch.inference_mode(False):
                self._derived[key] = make()
        return self._derived[key]


def _node(number: int, node: Node) -> Node:
    try:
        start, stop, end = node
        return Node(index(start), index(stop), index(end))
    except (TypeError, ValueError) as error:
        raise type(error)(f"nodes: node {number} must be three integers (start, stop, end), got {node!r}") from error


def _levels(nodes: tuple[Node, ...]) -> tuple[int, tuple[tuple[Node, ...], ...]]:
    """The number of rows and the nodes with descendants by depth, or what is wrong with the nodes."""
    if not nodes:
        raise ValueError("nodes: is empty; a tree has one node at least")
    rows, row = nodes[-1].stop, 0
    levels: list[list[Node]] = []
    path: list[Node] = []
    for number, node in enumerate(nodes):
        while path and path[-1].end <= node.start:
            path.pop()
        inside = path[-1].end if path else rows
        if node.start != row or node.stop <= node.start:
            raise ValueError(
                f"nodes: node {number} has its own rows at {node.start} .. {node.stop - 1}, expected some from {row} "
                "on; list the nodes in preorder, without gaps and without empty ones"
            )
        if not node.stop <= node.end <= inside:
            raise ValueError(
                f"nodes: node {number} ends at {node.end}, expected {node.stop} .. {inside}: after its own rows and "
                "within its parent; let a node end where its last descendant does"
            )
        row = node.stop
        if node.end > node.stop:
            if len(levels) == len(path):
                levels.append([])
            levels[len(path)].append(node)
        path.append(node)
    return rows, tuple(tuple(level) for level in levels)
