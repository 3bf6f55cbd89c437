"""The update that whole trainers are compared on: groups of samples that share a prompt, its image, perhaps turns.

Everything is random and depends on the seed only: ids, pictures, the sampler's log-probs, advantages, weights.
Dimension letters: G samples of a group, B samples of all groups, P prompt tokens, R tokens of the last turn.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from arft_fast.policy.images import EncodedImage
from arft_fast.policy.model import Policy, load_policy
from arft_fast.policy.tiny import build_tiny, train_tokenizer
from arft_fast.rollout.ledger import Ledger
from arft_fast.trajectory import Ending, Prompt, Trajectory

MERGED = 28
"""Pixels of an image along one side of the square that becomes one token."""
_DRIFT = 0.05
_MARGIN_TOKENS = 4  # between an image and either end of the text around it


@dataclass(frozen=True, kw_only=True)
class ToolTurn:
    """An action, and what the world answered."""

    sampled: int = 100
    """Tokens of the action."""
    observed: int = 300
    """Tokens of the answer, the placeholders of its image included."""
    image: tuple[int, int] | None = None
    """Width and height in pixels, multiples of 28; every distinct answer has a picture of its own."""
    distinct: int | None = None
    """How many of a group's samples went different ways up to here; the others share a turn. None: all G."""


@dataclass(frozen=True, kw_only=True)
class TrainShape:
    """The size of an update."""

    name: str = "tiny"
    groups: int = 2
    samples: int = 8
    """G"""
    prompt_tokens: int = 600
    """P, the placeholders of the image included."""
    image: tuple[int, int] | None = (448, 448)
    """Of the prompt: width and height in pixels, multiples of 28; None: text only."""
    turns: tuple[ToolTurn, ...] = ()
    """Turns before the last one."""
    sampled_tokens: int = 64
    """R: mean over the samples; it varies by an eighth in either direction, so that padding exists."""

    def __str__(self) -> str:
        size = f"P={self.prompt_tokens:,} R={self.sampled_tokens} G={self.samples}, {self.groups} groups"
        picture = f", image {'x'.join(map(str, self.image))}" if self.image else ""
        return f"{self.name}: {size}{picture}{f', {len(self.turns)} turns before' if self.turns else ''}"

    @property
    def most_pixels(self) -> int:
        """Of the largest image; 0 without images."""
        images = (self.image, *(turn.image for turn in self.turns))
        return max((image[0] * image[1] for image in images if image), default=0)


@dataclass(frozen=True, eq=False)
class TrainProblem:
    """One batch for an update."""

    groups: tuple[tuple[Trajectory, ...], ...]
    advantages: Tensor
    """[B] float32, in the order of ``trajectories``; none is 0."""

    @property
    def trajectories(self) -> list[Trajectory]:
        return list(itertools.chain.from_iterable(self.groups))

    @property
    def tokens(self) -> int:
        """Of all samples, prompts included: what an update works through that shares nothing, without its padding."""
        return sum(len(t.token_ids) for t in self.trajectories)


def make_problem(policy: Policy, shape: TrainShape, *, seed: int = 0) -> TrainProblem:
    """Random trajectories in the policy's ids.

    Raises:
        ValueError: a prompt or an answer has no room for its image, or the image is no multiple of 28 or is resized.
    """
    ids = np.setdiff1d(np.arange(policy.logit_bias.numel()), list(policy.tokenizer.added_tokens_decoder))
    groups = tuple(_make_group(policy, ids, shape, (seed, g)) for g in range(shape.groups))
    rng = np.random.default_rng((seed, 1 << 20))
    rewards = rng.normal(size=(shape.groups, shape.samples))
    advantages = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, ddof=1, keepdims=True) + 1e-4)
    return TrainProblem(groups, torch.from_numpy(advantages.astype(np.float32)).flatten())


def _make_group(policy: Policy, ids: np.ndarray, shape: TrainShape, seed: tuple[int, ...]) -> tuple[Trajectory, ...]:
    prompt = Prompt(uid="-".join(map(str, seed)), task="benchmark", messages=[])
    lengths = np.linspace(-1, 1, shape.samples) * (shape.sampled_tokens // 8)
    lengths = shape.sampled_tokens + np.random.default_rng((*seed, 1)).permutation(lengths.round().astype(int))
    return tuple(_sample(policy, ids, shape, prompt, seed, g, int(lengths[g])) for g in range(shape.samples))


def _sample(
    policy: Policy, ids: np.ndarray, shape: TrainShape, prompt: Prompt, seed: tuple[int, ...], sample: int, last: int
) -> Trajectory:
    """What samples share is drawn from a generator of its own; log-probs are the sampler's and never shared."""
    noise = np.random.default_rng((*seed, 2, sample))
    ledger = Ledger(image_token_id=policy.chat.image_token_id, max_tokens=1 << 30)

    def read(rng: np.random.Generator, tokens: int, size: tuple[int, int] | None) -> None:
        images = [_picture(policy, rng, size)] if size else []
        ledger.add_context(_text_around(policy, rng, ids, tokens, images), images)

    def write(rng: np.random.Generator, tokens: int) -> None:
        logprobs = np.log(policy.logit_bias.numel()) * -noise.uniform(0.7, 1.3, tokens)
        ledger.add_sampled(rng.choice(ids, tokens).tolist(), logprobs.tolist())

    read(np.random.default_rng((*seed, 3)), shape.prompt_tokens, shape.image)
    for k, turn in enumerate(shape.turns):
        branch = sample * (turn.distinct or shape.samples) // shape.samples
        shared = np.random.default_rng((*seed, 4, k, branch))
        write(shared, turn.sampled)
        read(shared, turn.observed, turn.image)
    write(np.random.default_rng((*seed, 5, sample)), last)
    token_ids, mask, logprobs = ledger.arrays()
    return Trajectory(
        prompt=prompt, sample=sample, token_ids=token_ids, policy_mask=mask, logprobs=logprobs,
        images=ledger.images, turns=[], ending=Ending.ANSWER,
    )  # fmt: skip


def _picture(policy: Policy, rng: np.random.Generator, size: tuple[int, int]) -> EncodedImage:
    width, height = size
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    encoded = policy.images.encode(Image.fromarray(pixels))
    if encoded.tokens * MERGED**2 != width * height:
        raise ValueError(
            f"image: {width} x {height} pixels become {encoded.tokens} tokens; "
            f"give multiples of {MERGED} within the image processor's limits (min_pixels, max_pixels)"
        )
    return encoded


def _text_around(
    policy: Policy, rng: np.random.Generator, ids: np.ndarray, tokens: int, images: list[EncodedImage]
) -> list[int]:
    """So many ids, with the images near their beginning."""
    marks = policy.tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>"])
    inside = [[marks[0], *[policy.chat.image_token_id] * image.tokens, marks[1]] for image in images]
    text = tokens - sum(map(len, inside))
    if text < 2 * _MARGIN_TOKENS:
        raise ValueError(f"tokens: {tokens} leave no text beside an image; give at least {tokens - text} more")
    words: list[int] = rng.choice(ids, text).tolist()
    return [*words[:_MARGIN_TOKENS], *itertools.chain.from_iterable(inside), *words[_MARGIN_TOKENS:]]


class Models(NamedTuple):
    """Folders of a policy and of the reference that it drifted away from."""

    policy: Path
    reference: Path


def write_tiny(folder: Path, *, seed: int = 0) -> Models:
    """The embedded policy, untrained, with a vocabulary of random words."""
    models = Models(folder / "policy", folder / "reference")
    build_tiny(models.reference, _words(seed), seed=seed)
    _write_drifted(Qwen2_5_VLForConditionalGeneration.from_pretrained(models.reference), models, seed)
    return models


def write_3b(folder: Path, device: torch.device, *, seed: int = 0) -> Models:
    """Random weights in the shape of Qwen2.5-VL-3B (arXiv 2502.13923, table 1), bfloat16: twice 7.5 GB."""
    models = Models(folder / "policy", folder / "reference")
    tokenizer = train_tokenizer(_words(seed))
    special = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    special_ids = tokenizer.convert_tokens_to_ids(list(special))
    assert isinstance(special_ids, list), "a list of tokens, a list of ids"
    image, video, start, end = special_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 11_008, "num_hidden_layers": 36,
            "num_attention_heads": 16, "num_key_value_heads": 2, "max_position_embeddings": 128_000,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
            "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end,
        tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(models.reference)
    tokenizer.save_pretrained(models.reference)
    Qwen2VLImageProcessorPil().save_pretrained(models.reference)
    _write_drifted(model, models, seed)
    return models


@torch.no_grad()
def _write_drifted(model: PreTrainedModel, models: Models, seed: int) -> None:
    """Noise on every matrix, of a share of its own spread, and on every vector: a KL of about 0.01."""
    generator = torch.Generator(model.device).manual_seed(seed)
    for parameter in model.parameters():
        spread = parameter.float().std() if parameter.dim() > 1 else 0.1
        noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
        parameter.add_((_DRIFT * spread * noise).to(parameter.dtype))
    shutil.copytree(models.reference, models.policy)
    model.save_pretrained(models.policy)


def _words(seed: int) -> Iterator[str]:
    """Text from which a tokenizer learns as many merges as it may."""
    rng = np.random.default_rng(seed)
    vocabulary = ["".join(map(chr, rng.integers(97, 123, size))) for size in rng.integers(3, 9, 3000)]
    return (" ".join(rng.choice(vocabulary, 50)) for _ in range(500))


def open_policies(models: Models, shape: TrainShape, device: torch.device, dtype: torch.dtype) -> tuple[Policy, Policy]:
    """The policy and its frozen reference, as this trainer loads them, with room for the images of ``shape``."""
    pixels = max(shape.most_pixels, MERGED**2)
    policy, reference = (
        load_policy(folder, device=device, dtype=dtype, min_pixels=MERGED**2, max_pixels=pixels) for folder in models
    )
    reference.model.requires_grad_(False)
    return policy, reference


def open_stock(folder: Path, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The same weights as transformers loads them, with stock ``sdpa`` attention."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    return model.eval().to(device=device)


def without_bias(policy: Policy) -> Policy:
    """The same policy, free to sample any id: for trainers that know of no logit bias."""
    return replace(policy, logit_bias=torch.zeros_like(policy.logit_bias))
