"""The tree alone: what it says about rows, and what it refuses."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from arft_fast.kernels.attention_tree import AttentionTree, Node
from tests.attention_forests import FORESTS, FOUR_LEVELS, SINGLE_NODE, THREE_GROUPS, paths, random_forest

SEEDS = range(40)


def mask_by_paths(tree: AttentionTree) -> torch.Tensor:
    """A row sees itself and what stands before it on a path."""
    mask = torch.zeros(tree.rows, tree.rows, dtype=torch.bool)
    for path in paths(tree):
        for number, row in enumerate(path):
            mask[row, path[: number + 1]] = True
    return mask


@pytest.mark.parametrize("seed", SEEDS)
def test_the_mask_is_what_stands_before_a_row_on_its_path(seed: int) -> None:
    tree = random_forest(seed)
    assert torch.equal(tree.mask("cpu"), mask_by_paths(tree))


def test_a_plain_causal_mask_would_show_more() -> None:
    for tree in (FORESTS["group_of_8"], THREE_GROUPS):
        causal = torch.ones(tree.rows, tree.rows, dtype=torch.bool).tril()
        assert (causal & ~mask_by_paths(tree)).sum() > 300


@pytest.mark.parametrize("seed", SEEDS)
def test_pairs_count_what_the_mask_allows(seed: int) -> None:
    tree = random_forest(seed)
    assert tree.pairs == int(mask_by_paths(tree).sum())


@pytest.mark.parametrize("seed", SEEDS)
def test_levels_hold_each_node_with_descendants_once_by_depth(seed: int) -> None:
    tree = random_forest(seed)
    depths = {node: sum(other.start < node.start < other.end for other in tree.nodes) for node in tree.nodes}
    expected = [(node, depths[node]) for node in tree.nodes if node.end > node.stop]
    found = [(node, depth) for depth, level in enumerate(tree.levels) for node in level]
    assert sorted(found) == sorted(expected)
    assert all(tree.levels)


@pytest.mark.parametrize("tree", FORESTS.values(), ids=FORESTS)
def test_the_bias_is_the_mask_as_a_summand(tree: AttentionTree) -> None:
    bias = tree.bias("cpu", torch.float32)
    assert bias.shape == (tree.rows, tree.rows) and bias.stride(0) % 16 == 0
    assert torch.equal(bias == 0, tree.mask("cpu")) and torch.equal(bias.isneginf(), ~tree.mask("cpu"))


def test_the_bias_is_made_once_for_a_device_and_dtype() -> None:
    tree = random_forest(1)
    assert tree.bias("cpu", torch.float32) is tree.bias(torch.device("cpu"), torch.float32)
    assert tree.bias("cpu", torch.float64).dtype == torch.float64


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda tree: pickle.loads(pickle.dumps(tree))])
def test_a_copy_says_the_same_and_carries_no_tensors(duplicate) -> None:  # type: ignore[no-untyped-def]
    tree = random_forest(3)
    size = len(pickle.dumps(tree))
    tree.bias("cpu", torch.float64)
    copied = duplicate(tree)
    assert (copied.nodes, copied.rows, copied.levels, copied.pairs) == (tree.nodes, tree.rows, tree.levels, tree.pairs)
    assert copied is not tree and len(pickle.dumps(copied)) == size


def test_a_tree_without_a_branch_has_no_levels() -> None:
    assert SINGLE_NODE.levels == () and SINGLE_NODE.pairs == 23 * 24 // 2


def test_the_tree_of_four_levels_has_them() -> None:
    assert [len(level) for level in FOUR_LEVELS.levels] == [1, 2, 2, 1] and len(FOUR_LEVELS.nodes) == 13


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([], "nodes: is empty"),
        ([(1, 3, 3)], r"node 0 has its own rows at 1 \.\. 2, expected some from 0"),
        ([(0, 2, 2), (3, 4, 4)], r"node 1 has its own rows at 3 \.\. 3, expected some from 2"),
        ([(0, 3, 3), (2, 4, 4)], r"node 1 has its own rows at 2 \.\. 3, expected some from 3"),
        ([(0, 2, 2), (2, 2, 2), (2, 3, 3)], "node 1 has its own rows .* without empty ones"),
        ([(2, 4, 4), (0, 2, 2)], "node 0 has its own rows .* in preorder"),
        ([(0, 2, 5), (2, 4, 4)], r"node 0 ends at 5, expected 2 \.\. 4"),
        ([(0, 2, 1), (2, 4, 4)], r"node 0 ends at 1, expected 2 \.\. 4"),
        ([(0, 2, 3), (2, 4, 4)], r"node 1 ends at 4, expected 4 \.\. 3: after its own rows and within its parent"),
        ([(0, 2, 4), (2, 3, 5), (3, 4, 4), (4, 5, 5)], r"node 1 ends at 5, expected 3 \.\. 4"),
        ([(0, 2)], "node 0 must be three integers"),
    ],
)
def test_what_is_no_forest_in_preorder_is_refused(nodes: list[Node], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionTree(nodes)


def test_row_numbers_are_integers() -> None:
    with pytest.raises(TypeError, match="node 0 must be three integers"):
        AttentionTree([(0, 2.0, 2.0)])  # type: ignore[list-item]


def test_integers_of_an_array_are_taken_as_they_are() -> None:
    tree = AttentionTree([Node(*torch.tensor([0, 2, 3])), Node(*torch.tensor([2, 3, 3]))])
    assert tree.nodes == (Node(0, 2, 3), Node(2, 3, 3)) and type(tree.nodes[0].start) is int
