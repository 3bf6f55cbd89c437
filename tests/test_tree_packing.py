from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import numpy as np
import pytest

from arft_fast.observe.theory import ModelShape, Work
from arft_fast.policy.packing import cut, pack, tree_work
from arft_fast.policy.prefix_tree import Path, build_tree
from tests.tree_models import make_model


def _path(keys: Sequence[int], start: int = 0) -> Path:
    ids = np.array(keys, dtype=np.int64)
    sampled = np.arange(len(ids)) >= max(1, len(ids) - 3)
    return Path(ids, np.arange(start, start + len(ids)), sampled)


def _random_paths(seed: int, groups: int = 5, samples: int = 6) -> tuple[list[Path], list[list[int]]]:
    """Groups with a prompt of their own and turns that some samples share; some samples are equal."""
    rng = np.random.default_rng(seed)
    paths: list[Path] = []
    members: list[list[int]] = []
    for number in range(groups):
        prompt = [1, 2, 100 + number, *rng.integers(3, 50, size=rng.integers(5, 30)).tolist()]
        first = [rng.integers(3, 5, size=rng.integers(1, 12)).tolist() for _ in range(3)]
        members.append(list(range(len(paths), len(paths) + samples)))
        for _ in range(samples):
            last = rng.integers(3, 5, size=rng.integers(0, 15)).tolist()
            paths.append(_path([*prompt, *first[rng.integers(3)], *last]))
    order = rng.permutation(len(paths)).tolist()  # neither groups nor neighbours lie side by side
    paths = [paths[i] for i in order]
    return paths, [[order.index(i) for i in group] for group in members]


def _tokens(paths: Sequence[Path], chosen: Sequence[int]) -> int:
    return build_tree([paths[i] for i in chosen]).tokens


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("budget", [1, 40, 75, 150, 10_000])
def test_every_path_is_in_one_micro_batch_within_the_budget(seed: int, budget: int) -> None:
    paths, groups = _random_paths(seed)
    batches = pack(paths, groups, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(paths)))
    for batch in batches:
        assert _tokens(paths, batch) <= budget or len(batch) == 1


@pytest.mark.parametrize("seed", range(8))
def test_a_group_that_fits_stays_whole(seed: int) -> None:
    paths, groups = _random_paths(seed)
    budget = sorted(_tokens(paths, group) for group in groups)[2]
    batches = [set(batch) for batch in pack(paths, groups, budget)]
    whole = [any(batch >= set(group) for batch in batches) for group in groups]
    assert whole == [_tokens(paths, group) <= budget for group in groups]
    assert 0 < sum(whole) < len(groups)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("budget", [35, 60, 90])
def test_a_part_has_the_tokens_that_its_tree_has(seed: int, budget: int) -> None:
    paths, groups = _random_paths(seed, samples=9)
    parts = [part for group in groups for part in cut(paths, group, budget)]
    assert len(parts) > len(groups)
    for part in parts:
        assert part.tokens == _tokens(paths, part.members)


def _all_cuts(paths: Sequence[Path], order: Sequence[int], budget: int) -> list[list[int]]:
    """Sizes of the parts of every cut of ``order`` that keeps the budget."""
    found = []
    for marks in itertools.product([False, True], repeat=len(order) - 1):
        bounds = [0, *(i + 1 for i, mark in enumerate(marks) if mark), len(order)]
        parts = [order[a:b] for a, b in itertools.pairwise(bounds)]
        sizes = [_tokens(paths, part) for part in parts]
        if all(size <= budget or len(part) == 1 for size, part in zip(sizes, parts, strict=True)):
            found.append(sizes)
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [30, 45, 60])
def test_a_cut_has_the_fewest_parts_and_then_the_smallest_squares_of_all(seed: int, budget: int) -> None:
    paths, (group, *_) = _random_paths(seed, samples=8)
    parts = cut(paths, group, budget)
    order = [i for part in parts for i in part.members]
    tries = [(len(sizes), sum(s**2 for s in sizes)) for sizes in _all_cuts(paths, order, budget)]
    assert (len(parts), sum(part.tokens**2 for part in parts)) == min(tries)


def test_a_cut_falls_between_turns_and_not_inside_one() -> None:
    prompt, left, right = [1] * 10, [2] * 20, [3] * 20
    paths = [_path([*prompt, *turn, 50 + i, 60 + i]) for i, turn in enumerate([left, left, left, right, right])]
    parts = cut(paths, range(5), budget=40)
    assert [set(part.members) for part in parts] == [{0, 1, 2}, {3, 4}]
    assert sum(part.tokens for part in parts) == _tokens(paths, range(5)) + 10  # the prompt, and no turn


def test_the_parts_of_a_group_of_equal_samples_are_even() -> None:
    paths = [_path([*range(1, 101), *[200 + i] * 50]) for i in range(8)]
    parts = cut(paths, range(8), budget=460)  # seven samples would fit
    assert [len(part.members) for part in parts] == [4, 4]


def test_a_path_over_the_budget_stands_alone() -> None:
    paths = [_path([*range(90)]), _path([*range(5), 200]), _path([*range(5), 201])]
    assert pack(paths, [[0, 1, 2]], 20) == [[0], [1, 2]]


def test_groups_fill_the_fewest_micro_batches_and_fill_them_evenly() -> None:
    lengths = [40, 40, 40, 30, 30, 30, 30, 30, 30]  # 300 tokens: three of 100 would be [40, 30, 30] each
    paths = [_path([1000 * (i + 1) + k for k in range(length)]) for i, length in enumerate(lengths)]
    batches = pack(paths, [[i] for i in range(9)], 100)
    assert [sum(lengths[i] for i in batch) for batch in batches] == [100, 100, 100]
    batches = pack(paths, [[i] for i in range(9)], 130)  # best fit alone would leave 130, 130 and 40
    assert [sum(lengths[i] for i in batch) for batch in batches] == [100, 100, 100]


@pytest.mark.parametrize("seed", range(30))
def test_few_groups_take_the_fewest_micro_batches_there_are_or_one_more(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(10, 61, size=7).tolist()
    paths = [_path([1000 * (i + 1) + k for k in range(length)]) for i, length in enumerate(lengths)]
    fewest = next(
        bins
        for bins in range(1, 8)
        if any(max(np.bincount(places, weights=lengths)) <= 100 for places in itertools.product(range(bins), repeat=7))
    )
    assert fewest <= len(pack(paths, [[i] for i in range(7)], 100)) <= fewest + (fewest > 3)


@pytest.mark.parametrize("seed", range(5))
def test_the_order_in_which_paths_are_given_does_not_matter(seed: int) -> None:
    paths, groups = _random_paths(seed)
    shuffled = np.random.default_rng(99).permutation(len(paths)).tolist()
    new_index = {old: new for new, old in enumerate(shuffled)}
    again = pack([paths[i] for i in shuffled], [[new_index[i] for i in reversed(g)] for g in reversed(groups)], 75)
    assert again == pack([paths[i] for i in shuffled], [[new_index[i] for i in g] for g in groups], 75)
    sizes = [_tokens(paths, batch) for batch in pack(paths, groups, 75)]
    assert sorted(_tokens(paths, [shuffled[i] for i in batch]) for batch in again) == sorted(sizes)


def test_the_largest_micro_batch_comes_first() -> None:
    paths = [_path([100 * (i + 1) + k for k in range(length)]) for i, length in enumerate([5, 9, 7])]
    assert pack(paths, [[0], [1], [2]], 9) == [[1], [2], [0]]


def test_paths_that_no_group_names_are_left_out() -> None:
    paths, groups = _random_paths(0)
    assert sorted(i for batch in pack(paths, groups[1:3], 75) for i in batch) == sorted(groups[1] + groups[2])


def test_nothing_takes_no_micro_batch() -> None:
    assert pack([], [], 10) == [] and pack([_path([1, 2])], [[]], 10) == []


def test_a_token_at_another_position_is_not_counted_as_shared() -> None:
    paths = [_path(range(10)), _path(range(10), start=1)]
    assert len(pack(paths, [[0, 1]], 19)) == 2 and len(pack(paths, [[0, 1]], 20)) == 1


@pytest.mark.parametrize("seed", range(5))
def test_the_work_of_a_tree_is_known_before_it_is_built(seed: int) -> None:
    paths, groups = _random_paths(seed)
    shape = ModelShape.of(make_model("qwen2_5_vl").config)
    assert shape.vision is not None
    grids = {"a": (1, 4, 6), "b": (1, 8, 8)}
    for group in groups:
        chosen = [paths[i]._replace(sampled=paths[i].token_ids < 50) for i in group]
        chosen = [path._replace(sampled=path.sampled & (np.arange(len(path.sampled)) > 0)) for path in chosen]
        tree = build_tree(chosen)
        expected = Work(tokens=tree.tokens, pairs=tree.pairs, rows=len(tree.rows)) + shape.look(grids.values())
        assert tree_work(chosen, shape, grids) == expected
        assert expected.patches == 24 + 64


def test_a_hundred_thousand_tokens_are_packed_in_half_a_second() -> None:
    rng = np.random.default_rng(0)
    paths = []
    for number in range(8):
        prompt = [number, *rng.integers(0, 50_000, size=1200).tolist()]
        first = [rng.integers(0, 50_000, size=150).tolist() for _ in range(4)]
        paths += [_path([*prompt, *first[k % 4], *rng.integers(0, 50_000, size=209).tolist()]) for k in range(8)]
    assert sum(len(path.token_ids) for path in paths) == 64 * 1560
    groups = [list(range(8 * number, 8 * number + 8)) for number in range(8)]
    seconds = []
    for budget in (2000, 8192):
        start = time.thread_time()
        pack(paths, groups, budget)
        seconds.append(time.thread_time() - start)
    assert max(seconds) < 0.5


def test_a_group_of_a_thousand_paths_is_cut_in_half_a_second() -> None:
    rng = np.random.default_rng(0)
    paths = [_path([*range(40), *rng.integers(100, 200, size=20).tolist()]) for _ in range(1000)]
    start = time.thread_time()
    parts = cut(paths, range(1000), 4096)
    assert time.thread_time() - start < 0.5
    assert max(part.tokens for part in parts) - min(part.tokens for part in parts) < 200


@pytest.mark.parametrize(
    ("groups", "budget", "message"),
    [
        ([[0]], 0, "budget: 0 tree tokens; give 1 or more"),
        ([[0, 1], [1]], 9, "groups: must name each of the 2 paths at most once, and no others"),
        ([[0, 2]], 9, "groups: must name each of the 2 paths at most once, and no others"),
        ([[-1]], 9, "groups: must name each of the 2 paths at most once, and no others"),
    ],
)
def test_bad_input_is_named(groups: list[list[int]], budget: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack([_path([1, 2]), _path([3])], groups, budget)
