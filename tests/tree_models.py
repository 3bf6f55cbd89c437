"""Small float64 models and trajectories for comparing the prefix tree with one plain padded batch.

Dimension letters: B trajectories, T padded length, N sampled tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from arft_fast.policy.attention import NAME
from arft_fast.policy.images import EncodedImage
from arft_fast.policy.model import Policy
from arft_fast.trajectory import Ending, Prompt, Trajectory

VOCABULARY, IMAGE, VIDEO, VISION_START, VISION_END = 97, 90, 91, 92, 93
_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,  # strong enough for attention to matter: an error in the mask must show
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}


def _ready(model: nn.Module) -> PreTrainedModel:
    with torch.no_grad():
        for parameter in model.double().parameters():
            if parameter.dim() == 1:  # biases and norms start at 0 and 1, where mistakes can hide
                parameter.add_(0.1 * torch.randn_like(parameter))
    assert isinstance(model, PreTrainedModel)
    return model.eval()


def make_model(kind: str, seed: int = 0) -> PreTrainedModel:
    """``qwen2`` (text), ``qwen2_5_vl`` or ``qwen3_vl``: float64, random, with stock ``sdpa`` attention.

    Their norms and angles round to float32 all the same: ``benchmarks.exact.no_float32`` stops that.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "qwen2":
            return _ready(Qwen2ForCausalLM(Qwen2Config(**_TEXT)))
        if kind == "qwen2_5_vl":
            text = _TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
            vision = {
                "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 48,
                "fullatt_block_indexes": [1], "initializer_range": 0.1,
            }  # fmt: skip
            return _ready(
                Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_IDS))
            )
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
        text = _TEXT | {"rope_parameters": rope, "head_dim": 8}
        vision = {
            "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 48,
            "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64, "initializer_range": 0.1,
            "patch_size": 14,
        }  # fmt: skip
        return _ready(Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **_IDS)))


def on_trees(model: PreTrainedModel) -> Policy:
    """The same model as a policy whose text layers take trees."""
    ours = copy.deepcopy(model)
    vision = {"vision_config": "sdpa"} if hasattr(model.config, "vision_config") else {}
    ours.set_attn_implementation({"text_config": NAME, **vision} if vision else NAME)
    nothing: Any = SimpleNamespace(image_token_id=IMAGE)
    return Policy(
        model=ours, tokenizer=None, images=nothing, chat=nothing,
        logit_bias=torch.zeros(VOCABULARY, dtype=torch.float64),
    )  # fmt: skip


def picture(seed: int, grid: tuple[int, int] = (4, 6)) -> EncodedImage:
    """Random patches; pictures of one grid have the same placeholders."""
    height, width = grid
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(height * width, 3 * 2 * 14 * 14, generator=generator)
    return EncodedImage(
        pixel_values=pixels, grid_thw=(1, height, width), tokens=height * width // 4, key=f"{seed} {grid}"
    )


Piece = int | EncodedImage | str
"""So many tokens that the policy sampled; an image; or, as a text, words that somebody else wrote."""


def trajectory(prompt: Prompt, pieces: Sequence[Piece], seed: int, sample: int = 0) -> Trajectory:
    """Pieces in order. The same seed gives the same sampled tokens, and equal words are equal tokens."""
    rng = np.random.default_rng(seed)
    ids: list[int] = []
    sampled: list[bool] = []
    for piece in pieces:
        if isinstance(piece, EncodedImage):
            new = [VISION_START, *[IMAGE] * piece.tokens, VISION_END]
        elif isinstance(piece, str):
            new = [ord(letter) % 80 for letter in piece]
        else:
            new = rng.integers(0, 80, size=piece).tolist()
        ids += new
        sampled += [isinstance(piece, int)] * len(new)
    mask = np.array(sampled)
    logprobs = np.where(mask, -4.0 + rng.normal(size=len(ids)), 0.0).astype(np.float32)
    return Trajectory(
        prompt=prompt, sample=sample, token_ids=np.array(ids), policy_mask=mask, logprobs=logprobs,
        images=[piece for piece in pieces if isinstance(piece, EncodedImage)], turns=[], ending=Ending.ANSWER,
    )  # fmt: skip


def group(name: str, prompt: Sequence[Piece], branches: Sequence[tuple[Sequence[Piece], int]]) -> list[Trajectory]:
    """A group: each branch is what follows the prompt, with the seed of what is sampled in it."""
    shared = Prompt(uid=name, task="t", messages=[])
    return [trajectory(shared, [*prompt, *pieces], seed, k) for k, (pieces, seed) in enumerate(branches)]


def padded_inputs(model: PreTrainedModel, trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    """The batch as anybody would hand it to transformers: padded on the right, images once for each trajectory."""
    longest = max(len(t.token_ids) for t in trajectories)
    ids = torch.zeros(len(trajectories), longest, dtype=torch.long)
    attention = torch.zeros_like(ids)
    for b, t in enumerate(trajectories):
        ids[b, : len(t.token_ids)] = torch.from_numpy(t.token_ids)
        attention[b, : len(t.token_ids)] = 1
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": attention}
    images = [image for t in trajectories for image in t.images]
    if images:
        inputs["pixel_values"] = torch.cat([image.pixel_values for image in images]).double()
        inputs["image_grid_thw"] = torch.tensor([image.grid_thw for image in images])
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    return inputs


def padded_logprobs(model: PreTrainedModel, trajectories: Sequence[Trajectory]) -> Tensor:
    """[N] log-probs of the sampled tokens, from full logits of the padded batch by the stock model."""
    logits = model(**padded_inputs(model, trajectories)).logits
    parts = []
    for b, t in enumerate(trajectories):
        where = torch.from_numpy(np.flatnonzero(t.policy_mask))
        targets = torch.from_numpy(t.token_ids)[where]
        parts.append(logits[b, where - 1].log_softmax(-1).gather(-1, targets[:, None])[:, 0])
    return torch.cat(parts)
