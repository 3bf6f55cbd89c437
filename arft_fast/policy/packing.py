"""Micro-batches by a budget of tree tokens, and what their trees cost, from lengths alone: before any tree is built.

In depth-first order a path adds to the tree what it does not share with the path before it. The paths i .. j - 1 of
that order make a tree of

    shared_i + sum over i <= k < j of (length_k - shared_k)

tokens: where a group is cut, what the first path of a part shares with the last one of the part before is computed
twice, and nothing else. Gradients of the parts add up to those of the whole, so a cut costs time and no exactness.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from arft_fast.observe.theory import Grid, ModelShape, Work, causal_pairs
from arft_fast.policy.prefix_tree import Path, shared_lengths


class Part(NamedTuple):
    """Paths that stay together."""

    tokens: int
    """Of their tree."""
    members: tuple[int, ...]
    """Indices of the paths, in depth-first order."""


def pack(paths: Sequence[Path], groups: Sequence[Sequence[int]], budget: int) -> list[list[int]]:
    """Micro-batches: as few as found, then as even as found; each of the groups' paths in exactly one.

    A group whose tree fits is kept whole. A larger one is cut into the fewest parts that fit, each of them paths that
    follow each other in depth-first order; among these cuts the sum of squared sizes is smallest: few tokens are
    repeated, and the parts are even. Whole groups and parts fill the micro-batches. What two groups share is not
    counted, so their common tree is at most as large as the budget says.

    Linear in tokens.

    Args:
        groups: indices into ``paths``: those that share much, the samples of one prompt. None of them twice.
        budget: tree tokens of a micro-batch, >= 1. A single path above it stands alone.

    Returns:
        Ascending indices, the largest micro-batch first: what memory a step needs shows at once.

    Raises:
        ValueError: ``budget`` is below 1, or ``groups`` name a path twice or one that is not there.
    """
    if budget < 1:
        raise ValueError(f"budget: {budget} tree tokens; give 1 or more")
    named = sorted(i for group in groups for i in group)
    if len(set(named)) != len(named) or (named and not 0 <= named[0] <= named[-1] < len(paths)):
        raise ValueError(f"groups: must name each of the {len(paths)} paths at most once, and no others")
    parts = [part for group in groups if group for part in cut(paths, group, budget)]
    batches = _fill([part.tokens for part in parts], budget)
    batches.sort(key=lambda batch: (-sum(parts[i].tokens for i in batch), min(parts[i].members[0] for i in batch)))
    return [sorted(member for i in batch for member in parts[i].members) for batch in batches]


def cut(paths: Sequence[Path], group: Sequence[int], budget: int) -> list[Part]:
    """The parts of one group, whole if it fits; see ``pack``."""
    order, shared = shared_lengths([_records(paths[i]) for i in group])
    lengths = [len(paths[group[i]].token_ids) for i in order]
    # The tree of the paths first .. last - 1 has tokens[last] - repeated[first].
    tokens = [0, *accumulate(length - common for length, common in zip(lengths, shared, strict=True))]
    repeated = [before - common for before, common in zip(tokens, shared, strict=False)]
    bounds = [0, len(order)] if tokens[-1] <= budget else _best_cuts(tokens, repeated, budget)
    return [
        Part(tokens[stop] - repeated[start], tuple(group[i] for i in order[start:stop]))
        for start, stop in pairwise(bounds)
    ]


def tree_work(paths: Sequence[Path], shape: ModelShape, grids: Mapping[str, Grid] | None = None) -> Work:
    """What one pass over the tree of ``paths`` looks at, without building it.

    Args:
        grids: of the images in them, by content key: each distinct image goes through the vision tower once.

    Returns:
        Exact, but for ``rows`` where paths that share a token disagree on who wrote it. Works of trees that share
        nothing add up.
    """
    order, shared = shared_lengths([_records(path) for path in paths])
    work = shape.look((grids or {}).values())
    for i, common in zip(order, shared, strict=True):
        length = len(paths[i].token_ids)
        work += Work(
            tokens=length - common,
            pairs=causal_pairs(length) - causal_pairs(common),
            rows=int(paths[i].sampled[common:].sum()),
        )
    return work


def _records(path: Path) -> np.ndarray:
    """[T, C] numbers that are equal where tokens may be merged (``build_tree``)."""
    return np.vstack((path.token_ids if path.keys is None else path.keys, path.positions)).T


def _best_cuts(tokens: Sequence[int], repeated: Sequence[int], budget: int) -> list[int]:
    """Bounds of the fewest parts within the budget with the smallest sum of squared sizes.

    Every beginning of a best cut is the best cut of that beginning, which makes it a walk from the left. The tree of
    ``first .. last - 1`` only shrinks as ``first`` grows, so the starts that fit are the ones from some point on.
    """
    ends, starts = np.array(tokens, dtype=np.int64), np.array(repeated, dtype=np.int64)
    parts, squares, previous = [0], [0.0], [0]
    for last in range(1, len(tokens)):
        # The last path alone is always allowed, however long it is.
        first = min(bisect_left(repeated, tokens[last] - budget, hi=last), last - 1)
        sizes = (ends[last] - starts[first:last]).astype(np.float64)
        best = int(np.lexsort((np.array(squares[first:last]) + sizes**2, parts[first:last]))[0])
        parts.append(parts[first + best] + 1)
        squares.append(squares[first + best] + float(sizes[best]) ** 2)
        previous.append(first + best)
    bounds = [len(tokens) - 1]
    while bounds[-1]:
        bounds.append(previous[bounds[-1]])
    return bounds[::-1]


def _fill(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of ``sizes`` in as few bins as two rules find, and among these the more even ones.

    Best fit decreasing needs at most 11/9 of the fewest bins and four more (Johnson et al., 1974). Whether the same
    number or fewer do when each item goes to the emptiest bin is tried from the least conceivable number on.
    """
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    alone = [[i] for i in order if sizes[i] > budget]
    order = order[len(alone) :]
    fitted: list[list[int]] = []
    room: list[int] = []
    for i in order:
        tight = min((b for b in range(len(fitted)) if room[b] >= sizes[i]), key=room.__getitem__, default=None)
        if tight is None:
            fitted.append([i])
            room.append(budget - sizes[i])
        else:
            fitted[tight].append(i)
            room[tight] -= sizes[i]
    for bins in range(-(-sum(sizes[i] for i in order) // budget), len(fitted) + 1):
        if (even := _spread(sizes, order, bins, budget)) is not None:
            return alone + even
    return alone + fitted


def _spread(sizes: Sequence[int], order: Sequence[int], bins: int, budget: int) -> list[list[int]] | None:
    """Each item to the emptiest of so many bins; None where that breaks the budget."""
    spread: list[list[int]] = [[] for _ in range(bins)]
    filled = [0] * bins
    for i in order:
        emptiest = min(range(bins), key=filled.__getitem__)
        if filled[emptiest] + sizes[i] > budget:
            return None
        spread[emptiest].append(i)
        filled[emptiest] += sizes[i]
    return spread
