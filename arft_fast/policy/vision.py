"""Images on their way into the language model: features of each distinct image once, put where its placeholders stand.

Dimension letters: B rows, T tokens, D hidden size, K levels of features (1, and one for each deepstack layer).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from arft_fast.policy.images import EncodedImage


def image_features(model: PreTrainedModel, images: Sequence[EncodedImage]) -> dict[str, Tensor]:
    """Features [K, tokens, D] of each distinct image by its key; the vision tower runs once per distinct image.

    Level 0 takes the place of the embeddings; the others, of models with deepstack (Qwen3-VL, arXiv 2406.04334), are
    added to the hidden states behind the first layers.
    """
    distinct = {image.key: image for image in images}
    if not distinct:
        return {}
    device = model.device
    pixels = torch.cat([image.pixel_values for image in distinct.values()]).to(device)
    grids = torch.tensor([image.grid_thw for image in distinct.values()], device=device)
    output = model.model.get_image_features(pixels, grids)
    sizes = [image.tokens for image in distinct.values()]
    levels = [torch.cat(list(output.pooler_output)), *(getattr(output, "deepstack_features", None) or ())]
    stacked = levels[0][None] if len(levels) == 1 else torch.stack(levels)
    return dict(zip(distinct, stacked.split(sizes, dim=1), strict=True))


def embed(model: PreTrainedModel, input_ids: Tensor, features: Sequence[Tensor]) -> dict[str, Tensor | list[Tensor]]:
    """What the language model takes for ``input_ids`` [B, T]: ``inputs_embeds`` [B, T, D], and deepstack's arguments.

    Args:
        features: [K, tokens, D] in the order of the placeholders, row by row.

    Raises:
        ValueError: the placeholders and the features differ in number.
    """
    embeddings = model.get_input_embeddings()(input_ids)
    if not features:
        return {"inputs_embeds": embeddings}
    is_image = input_ids == model.config.image_token_id
    levels = torch.cat(list(features), dim=1).to(embeddings.dtype)
    if int(is_image.sum()) != levels.shape[1]:
        raise ValueError(
            f"features: {levels.shape[1]} image features for {int(is_image.sum())} placeholders; one each is needed"
        )
    inputs: dict[str, Tensor | list[Tensor]] = {
        "inputs_embeds": embeddings.masked_scatter(is_image[..., None], levels[0])
    }
    if len(levels) > 1:
        inputs |= {"visual_pos_masks": is_image, "deepstack_visual_embeds": list(levels[1:])}
    return inputs
