"""Forests for the tests of attention, and attention over them as plainly as it can be written: path by path."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from arft_fast.kernels.attention_tree import AttentionTree, Node
from arft_fast.kernels.flash_operators import HostOperators

Branch = tuple[int, "Sequence[Branch]"]
"""Own rows of a node, and its children."""


def forest(*roots: Branch) -> AttentionTree:
    nodes: list[Node] = []

    def grow(start: int, branch: Branch) -> int:
        length, children = branch
        number, end = len(nodes), start + length
        nodes.append(Node(start, end, end))
        for child in children:
            end = grow(end, child)
        nodes[number] = nodes[number]._replace(end=end)
        return end

    end = 0
    for root in roots:
        end = grow(end, root)
    return AttentionTree(nodes)


def leaves(*lengths: int) -> list[Branch]:
    return [(length, []) for length in lengths]


GROUP_OF_8 = forest((40, leaves(12, 9, 15, 1, 12, 12, 7, 11)))
FOUR_LEVELS = forest(
    (21, [(7, [(5, leaves(3, 8)), (1, [])]), (13, []), (2, [(6, [(4, []), (9, leaves(1, 10))])])]),
)  # 13 nodes
THREE_GROUPS = forest((19, leaves(5, 8, 3)), (1, leaves(17, 4)), (11, [(6, leaves(2, 9)), (3, [])]))
UNARY_CHAIN = forest((6, [(1, [(14, [(3, [])])])]))
SINGLE_NODE = forest((23, []))
NOTHING_SHARED = forest(*leaves(8, 1, 13))
FORESTS = {
    "group_of_8": GROUP_OF_8,
    "four_levels": FOUR_LEVELS,
    "three_groups": THREE_GROUPS,
    "unary_chain": UNARY_CHAIN,
    "single_node": SINGLE_NODE,
    "nothing_shared": NOTHING_SHARED,
}


def random_forest(seed: int, longest: int = 9) -> AttentionTree:
    chance = random.Random(seed)

    def branch(depth: int) -> Branch:
        children = chance.choice([0, 1, 2, 3]) if depth < 4 else 0
        return chance.randint(1, longest), [branch(depth + 1) for _ in range(children)]

    return forest(*(branch(0) for _ in range(chance.randint(1, 3))))


def paths(tree: AttentionTree) -> list[list[int]]:
    """The rows of each path from a root to a leaf."""
    found = []
    for leaf in tree.nodes:
        if leaf.end == leaf.stop:
            above = [node for node in tree.nodes if node.start <= leaf.start < node.end]
            found.append([row for node in above for row in range(node.start, node.stop)])
    return found


class Problem(NamedTuple):
    """Operands that need gradients, and an upstream gradient for each row of each path."""

    query: Tensor
    key: Tensor
    value: Tensor
    upstream: list[Tensor]
    """[1, H, T, d] a path."""

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    def changed(self, change: Callable[[Tensor], Tensor]) -> Problem:
        """The same problem for changed operands."""
        query, key, value = (change(operand.detach()).requires_grad_() for operand in self.operands)
        return Problem(query, key, value, [change(grad) for grad in self.upstream])

    def upstream_of_rows(self, tree: AttentionTree) -> Tensor:
        """[1, H, S, d]: a row gets the sum over the paths that go through it."""
        total = torch.zeros_like(self.query)
        for rows, grad in zip(paths(tree), self.upstream, strict=True):
            total.index_add_(2, torch.tensor(rows, device=grad.device), grad)
        return total


def problem(
    tree: AttentionTree, heads: int = 6, groups: int = 2, width: int = 8, dtype: torch.dtype = torch.float64
) -> Problem:
    """Laid out as a model does it: rows first in memory, values of neighbouring nodes apart."""
    generator = torch.Generator().manual_seed(tree.rows)

    def normal(heads: int, rows: int) -> Tensor:
        made = torch.randn(1, rows, heads, width, generator=generator, dtype=torch.float64)
        return made.transpose(1, 2)

    value = normal(groups, tree.rows)
    for node in tree.nodes:
        value[:, :, node.start : node.stop] += normal(groups, 1)
    query, key = normal(heads, tree.rows), normal(groups, tree.rows)
    upstream = [normal(heads, len(rows)).to(dtype) for rows in paths(tree)]
    query, key, value = (operand.to(dtype).requires_grad_() for operand in (query, key, value))
    return Problem(query, key, value, upstream)


def plain_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """Every score, every probability; [1, H, T, d]."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value


def path_by_path(given: Problem, tree: AttentionTree, scale: float | None = None) -> tuple[Tensor, ...]:
    """Output [1, H, S, d], dq, dk, dv: ordinary causal attention over each path, gradients summed over the paths."""
    out = torch.zeros_like(given.query)
    total = out.new_zeros(())
    for rows, grad in zip(paths(tree), given.upstream, strict=True):
        index = torch.tensor(rows)
        causal = torch.ones(len(rows), len(rows), dtype=torch.bool).tril()
        query, key, value = (operand[:, :, index] for operand in given.operands)
        path_out = plain_attention(query, key, value, causal, scale)
        out[:, :, index] = path_out.detach()
        total = total + (path_out * grad).sum()
    return out, *torch.autograd.grad(total, given.operands)


def worst(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest absolute difference."""
    return max(float((one - other).detach().abs().max()) for one, other in zip(found, expected, strict=True))


class OwnStatistics(HostOperators):
    """Each call is differentiated with the output and log-sum-exp that it returned itself."""

    def backward(self, grad, query, key, value, out, lse, launch, scale):  # type: ignore[no-untyped-def]
        out, lse = self.forward(query, key, value, launch, scale)
        return super().backward(grad, query, key, value, out, lse, launch, scale)


class DroppedGradient(HostOperators):
    """What autograd makes of the merge when the gradient of the log-sum-exp is dropped: a call gets its share of do."""

    def backward(self, grad, query, key, value, out, lse, launch, scale):  # type: ignore[no-untyped-def]
        own_out, own_lse = self.forward(query, key, value, launch, scale)
        share = (own_lse - lse).exp().t().unsqueeze(-1).to(grad.dtype)
        return super().backward(grad * share, query, key, value, own_out, own_lse, launch, scale)
