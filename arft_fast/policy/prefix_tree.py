"""Sequences that begin alike, merged into a prefix tree: what they share becomes one row and is computed once.

A row stands for one token after one past. A causal model gives two tokens the same hidden state when they and all
tokens before them are equal: the ids, what the images under the placeholders show, and the rotary positions. Two crops
of one size have equal placeholders, so ids alone would merge them. For text: arXiv 2506.05433 and 2511.00413.

Rows are numbered in depth-first preorder: what follows from a row stands behind it without a gap, which is all that an
attention kernel has to know. Chains without a branch are one node. Siblings stand in the order of their keys, then of
their positions: the rows do not depend on the order in which the sequences are given.

Dimension letters: B paths, T tokens of a path, S rows of the tree, M rows that predict, N sampled tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from arft_fast.kernels.attention_tree import AttentionTree, Node

_IMAGE_STRIDE = 2**32
"""Keys set aside for each image: more than it can have tokens."""


class Path(NamedTuple):
    """One sequence that goes into the tree."""

    token_ids: np.ndarray
    """[T] int64."""
    positions: np.ndarray
    """[3, T] int64: rotary positions of this sequence on its own (time, height, width); [T] for text models."""
    sampled: np.ndarray
    """[T] bool: tokens that the loss scores; never the first one, which no row predicts."""
    keys: np.ndarray | None = None
    """[T] int64: equal keys, with equal positions and an equal past, are the same row; by ``merge_keys`` where images
    stand. None: the token ids, for text only."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PrefixTree:
    """The rows that one forward pass computes, and where each token of each path finds its row and its loss term."""

    token_ids: np.ndarray
    """[S] int64."""
    positions: np.ndarray
    """[3, S] or [S] int64: of the path, so that they start again after each branch."""
    nodes: tuple[Node, ...]
    """Chains of rows in preorder; a node ends only where paths part or the last of them ends."""
    place: np.ndarray
    """[sum T] int64: the row of each token of each path, path by path in the given order."""
    cu_paths: np.ndarray
    """[B + 1] int64: path b is ``place[cu_paths[b]:cu_paths[b + 1]]``."""
    origin: np.ndarray
    """[S] int64: the token, counted as in ``place``, that brought the row: the first of all that share it."""
    rows: np.ndarray
    """[M] int64: rows that predict a sampled token, each (row, target) once, ascending."""
    targets: np.ndarray
    """[M] int64: the token ids that they predict."""
    terms: np.ndarray
    """[N] int64 into ``rows``: what each sampled token reads, path by path in the given order. Shared tokens keep a
    term a path: advantage and clipping are the path's own, only the gradients add up in the row."""
    cu_seqlens: np.ndarray
    """[B + 1] int64: path b has the terms ``cu_seqlens[b]:cu_seqlens[b + 1]``."""

    @property
    def tokens(self) -> int:
        """S, the rows of the tree."""
        return len(self.token_ids)

    @property
    def path_tokens(self) -> int:
        """Rows that the paths take without a tree."""
        return len(self.place)

    @property
    def ratio(self) -> float:
        """Tokens of the paths for each row of the tree; 1 where nothing is shared."""
        return self.path_tokens / self.tokens

    @property
    def pairs(self) -> int:
        """(query, key) pairs of causal attention over the tree."""
        return self.attention().pairs

    @property
    def path_pairs(self) -> int:
        """(query, key) pairs of causal attention over each path by itself."""
        lengths = np.diff(self.cu_paths)
        return int((lengths * (lengths + 1) // 2).sum())

    def attention(self) -> AttentionTree:
        """Which rows may look at which, for the attention kernel; made once."""
        return self._attention

    @cached_property
    def _attention(self) -> AttentionTree:
        return AttentionTree(self.nodes)


def build_tree(paths: Sequence[Path]) -> PrefixTree:
    """Merge paths as far as they are equal from the start on; linear in their tokens.

    Two tokens become one row only where keys and positions are equal, and so are all before them. A token with another
    position is another row even if the rest agrees: its keys are rotated differently. Neither the end of a path inside
    a longer one nor a second, identical path makes a node.

    Merged rows must come out of the model alike: switch dropout off.

    Raises:
        TypeError: a field of a path is no numpy array, or has another dtype.
        ValueError: no paths, an empty one, lengths or positions that disagree, a first token that is sampled, or equal
            keys on different token ids.
    """
    _check(paths)
    cu_paths = np.cumsum([0, *(len(path.token_ids) for path in paths)])
    token_ids = np.concatenate([path.token_ids for path in paths])
    positions = np.concatenate([path.positions for path in paths], axis=-1)
    sampled = np.concatenate([path.sampled for path in paths])
    keys = np.concatenate([path.token_ids if path.keys is None else path.keys for path in paths])

    place, rows = _merge(np.vstack((keys, positions)).T, cu_paths)
    origin = np.full(rows, len(place))
    np.minimum.at(origin, place, np.arange(len(place)))
    if (wrong := token_ids[origin][place] != token_ids).any():
        where = np.searchsorted(cu_paths, wrong.argmax(), side="right") - 1
        raise ValueError(f"paths[{where}].keys: equal keys stand for different token ids; make them by merge_keys")

    scored = np.flatnonzero(sampled)
    pair_rows, pair_targets, terms = _distinct(place[scored - 1], token_ids[scored])
    return PrefixTree(
        token_ids=token_ids[origin],
        positions=positions.take(origin, axis=-1),
        nodes=_nodes(place, cu_paths, origin),
        place=place,
        cu_paths=cu_paths,
        origin=origin,
        rows=pair_rows,
        targets=pair_targets,
        terms=terms,
        cu_seqlens=np.searchsorted(scored, cu_paths),
    )


def shared_lengths(keys: Sequence[np.ndarray]) -> tuple[list[int], list[int]]:
    """Sequences in the order of a tree's leaves, and how much each shares with the one before it.

    In that order a sequence shares with none before it more than with its neighbour, so the rows of their tree are the
    total length less the sum of what is shared.

    Args:
        keys: [T] int64 each, or [T, C] where C numbers make one key.

    Returns:
        order: the sequences' indices; ties stay in the given order, a sequence stands before those that it begins.
        shared: length of the longest common prefix with the predecessor in that order, 0 for the first.
    """
    if not keys:
        return [], []
    flat = [np.ascontiguousarray(k).ravel() for k in keys]
    width = keys[0].shape[1] if keys[0].ndim == 2 else 1
    # Big-endian numbers compare like their bytes, and bytes compare by memcmp (negative numbers stand last; any fixed
    # order would do).
    as_bytes = [k.astype(">i8").tobytes() for k in flat]
    order = sorted(range(len(keys)), key=as_bytes.__getitem__)
    shared = [0]
    for before, this in pairwise(order):
        length = min(len(flat[before]), len(flat[this]))
        differs = flat[before][:length] != flat[this][:length]
        first = int(differs.argmax()) if differs.any() else length
        shared.append(first // width)
    return order, shared


def merge_keys(
    token_ids: np.ndarray, images: Sequence[tuple[str, int]], image_token_id: int, numbering: dict[str, int]
) -> np.ndarray:
    """What each token of a sequence is, as a number: equal numbers may be merged.

    Text is its token id. The k-th placeholder of an image is a negative number that only this content and k have: two
    crops of one size look alike in the ids and are different in the keys.

    Args:
        token_ids: [T] int64.
        images: (content key, number of placeholders) of each image in the order of the placeholders; consecutive images
            may stand in one run. Equal content keys promise equal features and an equal grid.
        image_token_id: the placeholder's id; one that does not occur (-1) for text.
        numbering: what content keys have been numbered so far; grows. Sequences that are to be compared share one.

    Returns:
        [T] int64.

    Raises:
        ValueError: the placeholders are not as many as the images' tokens, or an image has none.
    """
    keys = token_ids.astype(np.int64)
    at = np.flatnonzero(token_ids == image_token_id)
    wanted = sum(tokens for _, tokens in images)
    if len(at) != wanted or any(tokens < 1 for _, tokens in images):
        raise ValueError(
            f"images: {len(images)} images with {wanted} tokens for {len(at)} placeholders (id {image_token_id}) in "
            "token_ids; give each image, in order, with its number of placeholders, at least one"
        )
    if images:
        bases = [numbering.setdefault(content, -1 - _IMAGE_STRIDE * len(numbering)) for content, _ in images]
        keys[at] = np.concatenate([base - np.arange(tokens) for base, (_, tokens) in zip(bases, images, strict=True)])
    return keys


def _merge(records: np.ndarray, cu_paths: np.ndarray) -> tuple[np.ndarray, int]:
    """The row of each token, numbered in preorder, and how many there are; equal records are equal tokens."""
    place = np.empty(len(records), dtype=np.int64)
    rows = 0
    before = place[:0]
    for b, common in zip(*shared_lengths(np.split(records, cu_paths[1:-1])), strict=True):
        this = place[cu_paths[b] : cu_paths[b + 1]]
        this[:common] = before[:common]
        this[common:] = np.arange(rows, rows + len(this) - common)
        rows += len(this) - common
        before = this
    return place, rows


def _nodes(place: np.ndarray, cu_paths: np.ndarray, origin: np.ndarray) -> tuple[Node, ...]:
    """The chains of rows in preorder: one starts at each root and at each child of a row with several."""
    depth = origin - cu_paths[np.searchsorted(cu_paths, origin, side="right") - 1]
    is_root = depth == 0
    parent = place[origin - 1]  # meaningless for roots
    children = np.bincount(parent[~is_root], minlength=len(origin))
    starts = np.flatnonzero(is_root | (children[parent] > 1))
    # A node's reach ends where the next one starts that is no deeper.
    ends = np.full(len(starts), len(origin))
    open_nodes: list[int] = []
    depths = depth[starts].tolist()
    for n, start in enumerate(starts.tolist()):
        while open_nodes and depths[open_nodes[-1]] >= depths[n]:
            ends[open_nodes.pop()] = start
        open_nodes.append(n)
    stops = [*starts[1:].tolist(), len(origin)]
    return tuple(Node(*node) for node in zip(starts.tolist(), stops, ends.tolist(), strict=True))


def _distinct(rows: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct (row, target) in ascending order, and the index of each given one among them."""
    ids = int(targets.max(initial=0)) + 1
    codes, terms = np.unique(rows * ids + targets, return_inverse=True)
    return codes // ids, codes % ids, terms


def _check(paths: Sequence[Path]) -> None:
    if not paths:
        raise ValueError("paths: is empty; give at least one sequence")
    for b, path in enumerate(paths):
        fields = {"token_ids": np.int64, "positions": np.int64, "sampled": np.bool_, "keys": np.int64}
        for name, dtype in fields.items():
            value = getattr(path, name)
            if name == "keys" and value is None:
                continue
            if not isinstance(value, np.ndarray) or value.dtype != dtype:
                kind = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
                raise TypeError(
                    f"paths[{b}].{name}: expected a numpy array of {dtype.__name__}, got {kind}; "
                    f"convert it with np.asarray(..., dtype=np.{dtype.__name__})"
                )
            length = path.token_ids.size
            shapes = [(length,), (3, length)] if name == "positions" else [(length,)]
            if value.shape not in shapes:
                wanted = " or ".join(str(list(shape)) for shape in shapes)
                raise ValueError(f"paths[{b}].{name}: shape {list(value.shape)}, expected {wanted} as of token_ids")
        if length == 0:
            raise ValueError(f"paths[{b}].token_ids: is empty; leave out sequences without tokens")
        if path.token_ids.min() < 0:
            raise ValueError(f"paths[{b}].token_ids: {path.token_ids.min()} is no token id; ids are 0 or more")
        if path.sampled[0]:
            raise ValueError(f"paths[{b}].sampled: the first token cannot be scored, no row predicts it; mark it False")
        if path.positions.ndim != paths[0].positions.ndim:
            raise ValueError(
                f"paths[{b}].positions: shape {list(path.positions.shape)} beside {list(paths[0].positions.shape)} of "
                "paths[0]; give all paths [3, T] or all [T]"
            )
