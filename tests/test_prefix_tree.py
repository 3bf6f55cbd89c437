from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from arft_fast.policy.prefix_tree import Node, Path, PrefixTree, build_tree, shared_lengths

SEEDS = range(40)


def _path(ids: Sequence[int], *, scored_from: int = 1, shift: Sequence[int] = (), **changes: Any) -> Path:
    """A text path; ``shift`` is added to the positions."""
    length = len(ids)
    positions = np.arange(length)
    positions[: len(shift)] += np.array(shift, dtype=np.int64)
    path = Path(np.array(ids, dtype=np.int64), positions, np.arange(length) >= scored_from)
    return path._replace(**changes)


def _random_paths(seed: int) -> list[Path]:
    """Short paths over few tokens, some of which have other keys, positions of 1 or 3 rows, or are repeated."""
    random = np.random.default_rng(seed)
    three_rows = bool(random.integers(2))
    alphabet = int(random.integers(1, 4))
    paths = []
    for _ in range(int(random.integers(1, 12))):
        length = int(random.integers(1, 15))
        ids = random.integers(0, alphabet, length)
        positions = np.arange(length) + (random.random(length) < 0.1).cumsum()
        sampled = random.random(length) < 0.5
        sampled[0] = False
        keys = None if random.integers(2) else np.where(random.random(length) < 0.1, -5 - ids, ids)
        many = np.stack([positions, positions // 2, positions % 3]) if three_rows else positions
        paths += [Path(ids, many, sampled, keys)] * int(random.integers(1, 3))
    return paths


class _Trie:
    """The definition: a row for each distinct past."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.row_of: dict[tuple[Any, ...], int] = {}
        self.places: list[list[int]] = []
        for path in paths:
            keys = path.token_ids if path.keys is None else path.keys
            steps = list(zip(keys.tolist(), np.atleast_2d(path.positions).T.tolist(), strict=True))
            pasts = [tuple((key, *where) for key, where in steps[: t + 1]) for t in range(len(steps))]
            self.places.append([self.row_of.setdefault(past, len(self.row_of)) for past in pasts])


def _places(tree: PrefixTree) -> list[list[int]]:
    return [place.tolist() for place in np.split(tree.place, tree.cu_paths[1:-1])]


@pytest.mark.parametrize("seed", SEEDS)
def test_every_path_is_read_back_from_the_tree(seed: int) -> None:
    paths = _random_paths(seed)
    tree = build_tree(paths)
    assert tree.token_ids[tree.place].tolist() == [i for path in paths for i in path.token_ids.tolist()]
    assert np.array_equal(tree.positions[..., tree.place], np.concatenate([p.positions for p in paths], axis=-1))


@pytest.mark.parametrize("seed", SEEDS)
def test_tokens_share_a_row_exactly_when_they_share_their_past(seed: int) -> None:
    paths = _random_paths(seed)
    tree, trie = build_tree(paths), _Trie(paths)
    expected = [row for place in trie.places for row in place]
    assert tree.tokens == len(trie.row_of)
    assert len(set(zip(tree.place.tolist(), expected, strict=True))) == len(trie.row_of)  # one to one


@pytest.mark.parametrize("seed", SEEDS)
def test_a_row_sees_its_own_past_and_nothing_else(seed: int) -> None:
    tree = build_tree(_random_paths(seed))
    mask = tree.attention().mask("cpu").numpy()
    for place in _places(tree):
        for t, row in enumerate(place):
            assert set(np.flatnonzero(mask[row])) == set(place[: t + 1])


@pytest.mark.parametrize("seed", SEEDS)
def test_nodes_are_the_longest_chains_without_a_branch(seed: int) -> None:
    tree = build_tree(_random_paths(seed))
    children: dict[int, set[int]] = {}
    for place in _places(tree):
        for before, row in zip([-1, *place], place, strict=False):
            children.setdefault(before, set()).add(row)
    starts = set(children[-1]) | {row for before, after in children.items() if len(after) > 1 for row in after}
    assert [node.start for node in tree.nodes] == sorted(starts)


@pytest.mark.parametrize("seed", SEEDS)
def test_each_sampled_token_has_its_own_term_and_each_row_and_target_stands_once(seed: int) -> None:
    paths = _random_paths(seed)
    tree = build_tree(paths)
    expected = [
        [(place[t - 1], int(path.token_ids[t])) for t in np.flatnonzero(path.sampled)]
        for path, place in zip(paths, _places(tree), strict=True)
    ]
    pairs = list(zip(tree.rows.tolist(), tree.targets.tolist(), strict=True))
    terms = [[pairs[i] for i in own] for own in np.split(tree.terms, tree.cu_seqlens[1:-1])]
    assert terms == expected
    assert pairs == sorted({pair for own in expected for pair in own})


@pytest.mark.parametrize("seed", SEEDS)
def test_the_origin_of_a_row_is_its_first_token(seed: int) -> None:
    tree = build_tree(_random_paths(seed))
    assert tree.origin.tolist() == [tree.place.tolist().index(row) for row in range(tree.tokens)]


@pytest.mark.parametrize("seed", SEEDS)
def test_pairs_are_counted_as_the_attention_kernel_counts_them(seed: int) -> None:
    paths = _random_paths(seed)
    tree = build_tree(paths)
    assert tree.pairs == tree.attention().pairs == int(tree.attention().mask("cpu").sum())
    assert tree.path_pairs == sum(t + 1 for path in paths for t in range(len(path.token_ids)))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_rows_do_not_depend_on_the_order_of_the_paths(seed: int) -> None:
    paths = _random_paths(seed)
    order = np.random.default_rng(seed).permutation(len(paths))
    tree, other = build_tree(paths), build_tree([paths[i] for i in order])
    assert tree.nodes == other.nodes
    assert np.array_equal(tree.token_ids, other.token_ids)
    places = _places(tree)
    assert [places[i] for i in order] == _places(other)


def test_one_path_is_one_node_and_shares_nothing() -> None:
    tree = build_tree([_path([3, 1, 2])])
    assert tree.nodes == (Node(0, 3, 3),)
    assert tree.place.tolist() == [0, 1, 2]
    assert tree.ratio == 1 and tree.pairs == tree.path_pairs == 6


def test_a_tree_of_identical_trajectories_is_one_path_with_a_term_each() -> None:
    tree = build_tree([_path([3, 1, 2])] * 4)
    assert tree.nodes == (Node(0, 3, 3),)
    assert tree.ratio == 4
    assert tree.rows.tolist() == [0, 1] and tree.terms.tolist() == [0, 1] * 4
    assert tree.cu_seqlens.tolist() == [0, 2, 4, 6, 8]


def test_a_trajectory_that_begins_another_makes_no_node() -> None:
    tree = build_tree([_path([5, 6, 7, 8]), _path([5, 6])])
    assert tree.nodes == (Node(0, 4, 4),)
    assert _places(tree) == [[0, 1, 2, 3], [0, 1]]


def test_two_continuations_after_an_end_part_there() -> None:
    tree = build_tree([_path([5, 6, 7]), _path([5, 6]), _path([5, 6, 8])])
    assert tree.nodes == (Node(0, 2, 4), Node(2, 3, 3), Node(3, 4, 4))


def test_a_forest_without_a_shared_token_has_a_root_for_each_path() -> None:
    tree = build_tree([_path([2, 2, 2]), _path([1, 2])])
    assert tree.nodes == (Node(0, 2, 2), Node(2, 5, 5))
    assert tree.pairs == tree.path_pairs
    assert tree.attention().mask("cpu")[4].tolist() == [False, False, True, True, True]


def test_two_groups_share_their_system_prompt() -> None:
    system, groups = [1, 1, 1], ([2, 2], [3, 3])
    tree = build_tree([_path([*system, *prompt, sample]) for prompt in groups for sample in (4, 5)])
    assert tree.tokens == 3 + 2 * (2 + 2)
    assert tree.nodes[0] == Node(0, 3, 11) and [node.start for node in tree.nodes] == [0, 3, 5, 6, 7, 9, 10]
    assert tree.attention().levels == ((Node(0, 3, 11),), (Node(3, 5, 7), Node(7, 9, 11)))


def test_equal_tokens_at_other_positions_are_not_merged() -> None:
    apart = build_tree([_path([1, 2, 3]), _path([1, 2, 3], shift=[0, 1, 1])])
    assert apart.tokens == 5
    assert build_tree([_path([1, 2, 3])] * 2).tokens == 3


def test_a_position_between_two_equal_ones_does_not_keep_them_apart() -> None:
    # By keys alone the second path would stand between the first and the third, which share two rows.
    tree = build_tree([_path([1, 2, 3]), _path([1, 2, 4], shift=[0, 1]), _path([1, 2, 5])])
    assert tree.tokens == 1 + 1 + 2 + 2


@pytest.mark.parametrize("axis", range(3))
def test_each_of_the_three_rows_of_positions_counts(axis: int) -> None:
    positions = np.tile(np.arange(3), (3, 1))
    other = positions.copy()
    other[axis, 1] += 1
    assert build_tree([_path([1, 2, 3], positions=p) for p in (positions, other)]).tokens == 5


def test_one_target_after_one_row_is_one_loss_row_even_where_its_tokens_are_two_rows() -> None:
    tree = build_tree([_path([1, 2]), _path([1, 2], shift=[0, 1])])
    assert tree.tokens == 3
    assert tree.rows.tolist() == [0] and tree.targets.tolist() == [2] and tree.terms.tolist() == [0, 0]


def test_paths_without_a_sampled_token_have_no_terms() -> None:
    tree = build_tree([_path([1, 2], scored_from=2), _path([1, 3], scored_from=2)])
    assert len(tree.rows) == len(tree.targets) == len(tree.terms) == 0
    assert tree.cu_seqlens.tolist() == [0, 0, 0]


def test_shared_lengths_stand_beside_their_sorted_sequences() -> None:
    keys = [np.array(k, dtype=np.int64) for k in ([1, 2, 4], [1, 256], [], [1, 2, 3, 0], [1, 2], [1, 2, 4])]
    assert shared_lengths(keys) == ([2, 4, 3, 0, 5, 1], [0, 0, 2, 2, 3, 1])
    assert shared_lengths([]) == ([], [])


def test_shared_lengths_count_whole_keys_of_several_numbers() -> None:
    keys = [np.array(k) for k in ([[1, 5], [2, 5]], [[1, 5], [2, 6]], [[1, 4], [2, 5]])]
    assert shared_lengths(keys) == ([2, 0, 1], [0, 0, 1])


@pytest.mark.parametrize(
    ("error", "changes", "message"),
    [
        (ValueError, {"positions": np.arange(4)}, r"paths\[1\]\.positions: shape \[4\]"),
        (ValueError, {"positions": np.zeros((2, 3), np.int64)}, r"paths\[1\]\.positions: shape \[2, 3\]"),
        (ValueError, {"positions": np.zeros((3, 3), np.int64)}, r"paths\[1\]\.positions: .* beside \[3\]"),
        (ValueError, {"sampled": np.zeros(2, np.bool_)}, r"paths\[1\]\.sampled: shape \[2\]"),
        (ValueError, {"sampled": np.ones(3, np.bool_)}, r"paths\[1\]\.sampled: the first token"),
        (ValueError, {"keys": np.zeros(2, np.int64)}, r"paths\[1\]\.keys: shape \[2\]"),
        (ValueError, {"token_ids": np.zeros((1, 3), np.int64)}, r"paths\[1\]\.token_ids: shape \[1, 3\]"),
        (ValueError, {"token_ids": np.array([1, -1, 2])}, r"paths\[1\]\.token_ids: -1"),
        (ValueError, {"keys": np.array([1, 2, 8]), "token_ids": np.array([1, 3, 8])}, r"paths\[1\]\.keys: equal keys"),
        (TypeError, {"token_ids": np.zeros(3, np.int32)}, r"paths\[1\]\.token_ids: .* int64, got int32"),
        (TypeError, {"positions": np.zeros(3)}, r"paths\[1\]\.positions: .* int64, got float64"),
        (TypeError, {"sampled": np.zeros(3, np.int64)}, r"paths\[1\]\.sampled: .* bool, got int64"),
        (TypeError, {"keys": [1, 2, 3]}, r"paths\[1\]\.keys: .* got list"),
    ],
)
def test_a_bad_path_is_named(error: type[Exception], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(error, match=message):
        build_tree([_path([1, 2, 3]), _path([1, 2, 3], **changes)])


def test_no_paths_and_empty_paths_are_refused() -> None:
    with pytest.raises(ValueError, match="paths: is empty"):
        build_tree([])
    with pytest.raises(ValueError, match=r"paths\[0\]\.token_ids: is empty"):
        build_tree([_path([])])


def _groups(groups: int, samples: int = 8) -> list[Path]:
    """1,560 tokens a path: a prompt of 1,000 a group, two turns that some samples share, 440 tokens of its own."""
    random = np.random.default_rng(0)
    paths = []
    for _ in range(groups):
        prompt, turns = random.integers(0, 150_000, 1000), random.integers(0, 150_000, (2, 4, 60))
        for sample in range(samples):
            parts = [prompt, turns[0, sample % 2], turns[1, sample % 4], random.integers(0, 150_000, 440)]
            ids = np.concatenate(parts)
            paths.append(Path(ids, np.tile(np.arange(1560), (3, 1)), np.arange(1560) >= 1000))
    return paths


def test_a_hundred_thousand_tokens_take_less_than_half_a_second() -> None:
    paths = _groups(8)
    start = time.thread_time()
    tree = build_tree(paths)
    seconds = time.thread_time() - start
    assert tree.path_tokens == 99_840 and tree.tokens == 8 * (1000 + 2 * 60 + 4 * 60 + 8 * 440)
    assert seconds < 0.5
