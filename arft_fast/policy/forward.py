"""The policy's forward pass over trajectories: hidden states of exactly the rows that predict a sampled token.

Dimension letters: B trajectories, T padded length, N rows (sampled tokens of the batch), D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from arft_fast.policy.images import EncodedImage
from arft_fast.policy.model import Policy
from arft_fast.trajectory import Trajectory


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Trajectories as the model takes them, padded on the right (a causal model never looks there)."""

    input_ids: Tensor
    """[B, T] int64."""
    position_ids: Tensor
    """[3, B, T] int64: time, height, width (arXiv 2409.12191 section 2.1, M-RoPE)."""
    images: Sequence[EncodedImage]
    """In the order of their placeholders, row by row."""
    rows: Tensor
    """[N] int64 into the flattened [B * T]: the position before each sampled token."""
    targets: Tensor
    """[N] int64: the sampled ids."""
    cu_seqlens: Tensor
    """[B + 1] int64: rows of trajectory b are ``cu_seqlens[b]:cu_seqlens[b + 1]``."""


def rope_positions(model: PreTrainedModel, token_ids: np.ndarray, images: Sequence[EncodedImage]) -> Tensor:
    """[3, T] rotary positions of one trajectory, by the model's own rule."""
    ids = torch.from_numpy(token_ids)[None]
    if not images:
        return torch.arange(ids.shape[1]).expand(3, -1)
    is_image = (ids == model.config.image_token_id).int()
    grids = torch.tensor([image.grid_thw for image in images])
    positions, _ = model.model.get_rope_index(ids, mm_token_type_ids=is_image, image_grid_thw=grids)
    return positions[:, 0]


def collate(policy: Policy, trajectories: Sequence[Trajectory]) -> Batch:
    """One padded batch of trajectories on the policy's device."""
    longest = max(len(t.token_ids) for t in trajectories)
    input_ids = torch.zeros(len(trajectories), longest, dtype=torch.long)
    position_ids = torch.zeros(3, len(trajectories), longest, dtype=torch.long)
    rows, targets, counts = [], [], [0]
    for b, trajectory in enumerate(trajectories):
        length = len(trajectory.token_ids)
        input_ids[b, :length] = torch.from_numpy(trajectory.token_ids)
        position_ids[:, b, :length] = rope_positions(policy.model, trajectory.token_ids, trajectory.images)
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
        cu_seqlens=torch.tensor(counts, device=device),
    )


def image_features(model: PreTrainedModel, images: Sequence[EncodedImage]) -> dict[str, Tensor]:
    """Features [tokens, D] of each distinct image by its key; the vision tower runs once per distinct image."""
    distinct = {image.key: image for image in images}
    if not distinct:
        return {}
    device = model.device
    pixels = torch.cat([image.pixel_values for image in distinct.values()]).to(device)
    grids = torch.tensor([image.grid_thw for image in distinct.values()], device=device)
    features = model.model.get_image_features(pixels, grids).pooler_output
    return dict(zip(distinct, features, strict=True))


def embed(model: PreTrainedModel, input_ids: Tensor, features: Sequence[Tensor]) -> Tensor:
    """[B, T, D] input embeddings with ``features`` (in placeholder order) put where the image placeholders stand.

    Raises:
        ValueError: the placeholders and the features differ in number.
    """
    embeddings = model.get_input_embeddings()(input_ids)
    is_image = input_ids == model.config.image_token_id
    if not features:
        return embeddings
    flat = torch.cat(list(features)).to(embeddings.dtype)
    if int(is_image.sum()) != len(flat):
        raise ValueError(
            f"features: {len(flat)} image features for {int(is_image.sum())} placeholders; one each is needed"
        )
    return embeddings.masked_scatter(is_image[..., None], flat)


def hidden_rows(policy: Policy, batch: Batch) -> Tensor:
    """[N, D] last hidden states of the rows that predict a sampled token; no logits are made here."""
    by_key = image_features(policy.model, batch.images)
    embeddings = embed(policy.model, batch.input_ids, [by_key[image.key] for image in batch.images])
    # No mask: padding stands on the right, where a causal row never looks, and without a mask the fast path is taken.
    output = policy.model.model.language_model(
        inputs_embeds=embeddings, position_ids=batch.position_ids, attention_mask=None, use_cache=False
    )
    return output.last_hidden_state.flatten(0, 1).index_select(0, batch.rows)
