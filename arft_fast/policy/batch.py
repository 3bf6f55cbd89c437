"""From trajectories to what one forward pass takes: a padded batch, or a prefix tree that holds what they share once.

Dimension letters: B trajectories, T padded length, S rows of a tree, M rows that predict, N sampled tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from arft_fast.kernels.attention_tree import AttentionTree
from arft_fast.policy.images import EncodedImage
from arft_fast.policy.model import Policy
from arft_fast.policy.prefix_tree import Path, build_tree, merge_keys
from arft_fast.trajectory import Trajectory


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Trajectories as the model takes them, on its device."""

    input_ids: Tensor
    """[B, T] int64, padded on the right; [1, S] of a tree."""
    position_ids: Tensor
    """[3, B, T] or [3, 1, S] int64: time, height, width (M-RoPE, arXiv 2409.12191 section 2.1); [B, T] for text."""
    images: Sequence[EncodedImage]
    """One for each run of placeholders, in the order of the flattened ``input_ids``."""
    rows: Tensor
    """[M] int64 into the flattened ``input_ids``: the rows before sampled tokens, in a tree each (row, target) once."""
    targets: Tensor
    """[M] int64: the sampled ids."""
    terms: Tensor | None
    """[N] int64 into ``rows``: what each sampled token reads, trajectory by trajectory; None: N = M, in that order."""
    cu_seqlens: Tensor
    """[B + 1] int64: the sampled tokens of trajectory b are ``cu_seqlens[b]:cu_seqlens[b + 1]`` of the N."""
    tree: AttentionTree | None
    """Which rows of a tree may look at which; None for a padded batch."""

    def per_token(self, values: Tensor) -> Tensor:
        """[N] from values of the rows [M]."""
        return values if self.terms is None else values[self.terms]


def rope_positions(model: PreTrainedModel, token_ids: np.ndarray, images: Sequence[EncodedImage]) -> Tensor:
    """[3, T] rotary positions of one trajectory, by the model's own rule; [T] of a model that reads text only."""
    ids = torch.from_numpy(token_ids)[None]
    if not hasattr(model.config, "image_token_id"):
        return torch.arange(ids.shape[1])
    if not images:
        return torch.arange(ids.shape[1]).expand(3, -1)
    is_image = (ids == model.config.image_token_id).int()
    grids = torch.tensor([image.grid_thw for image in images])
    positions, _ = model.model.get_rope_index(ids, mm_token_type_ids=is_image, image_grid_thw=grids)
    return positions[:, 0]


def collate(policy: Policy, trajectories: Sequence[Trajectory]) -> Batch:
    """One padded batch of trajectories."""
    longest = max(len(t.token_ids) for t in trajectories)
    positions = [rope_positions(policy.model, t.token_ids, t.images) for t in trajectories]
    input_ids = torch.zeros(len(trajectories), longest, dtype=torch.long)
    position_ids = torch.zeros(*positions[0].shape[:-1], len(trajectories), longest, dtype=torch.long)
    rows, targets, counts = [], [], [0]
    for b, trajectory in enumerate(trajectories):
        length = len(trajectory.token_ids)
        input_ids[b, :length] = torch.from_numpy(trajectory.token_ids)
        position_ids[..., b, :length] = positions[b]
        sampled = np.flatnonzero(trajectory.policy_mask)
        rows.append(b * longest + sampled - 1)
        targets.append(trajectory.token_ids[sampled])
        counts.append(counts[-1] + len(sampled))
    device = policy.device
    return Batch(
        input_ids=input_ids.to(device),
        position_ids=position_ids.to(device),
        images=[image for t in trajectories for image in t.images],
        rows=torch.from_numpy(np.concatenate(rows)).to(device),
        targets=torch.from_numpy(np.concatenate(targets)).to(device),
        terms=None,
        cu_seqlens=torch.tensor(counts, device=device),
        tree=None,
    )


def tree_paths(policy: Policy, trajectories: Sequence[Trajectory]) -> list[Path]:
    """Each trajectory as a path of a tree: its ids, positions, sampled tokens, and what may be merged."""
    numbering: dict[str, int] = {}
    image_token_id = getattr(policy.model.config, "image_token_id", -1)
    return [
        Path(
            token_ids=t.token_ids,
            positions=rope_positions(policy.model, t.token_ids, t.images).numpy(),
            sampled=t.policy_mask,
            keys=merge_keys(t.token_ids, [(i.key, i.tokens) for i in t.images], image_token_id, numbering),
        )
        for t in trajectories
    ]


def collate_tree(policy: Policy, trajectories: Sequence[Trajectory], paths: Sequence[Path]) -> Batch:
    """The prefix tree of trajectories; ``paths`` are theirs, by ``tree_paths``."""
    tree = build_tree(paths)
    device = policy.device

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(device)

    return Batch(
        input_ids=tensor(tree.token_ids)[None],
        position_ids=tensor(tree.positions)[..., None, :],
        images=_images_in_order(trajectories, tree.origin, getattr(policy.model.config, "image_token_id", -1)),
        rows=tensor(tree.rows),
        targets=tensor(tree.targets),
        terms=tensor(tree.terms),
        cu_seqlens=tensor(tree.cu_seqlens),
        tree=tree.attention(),
    )


def _images_in_order(trajectories: Sequence[Trajectory], origin: np.ndarray, image_token_id: int) -> list[EncodedImage]:
    """The image of each run of placeholders, in the order of the tree's rows.

    Args:
        origin: [S] index of each row into the trajectories' concatenated tokens.
    """
    images = [image for t in trajectories for image in t.images]
    is_image = np.concatenate([t.token_ids for t in trajectories]) == image_token_id
    # The k-th placeholder of all trajectories belongs to the image whose tokens reach beyond k.
    ends = np.cumsum([image.tokens for image in images], dtype=np.int64)
    placeholder = np.cumsum(is_image) - 1
    in_tree = placeholder[origin[is_image[origin]]]
    starts = np.isin(in_tree, ends - [image.tokens for image in images]) if images else np.zeros(0, dtype=bool)
    return [images[i] for i in np.searchsorted(ends, in_tree[starts], side="right")]
