"""A rollout written as plainly as Visual-ARFT's trainer writes it: ``generate`` on G copies of a prompt and its image.

Each group is generated on its own; its G copies share nothing: each has its image processed by the vision tower and its
prompt prefilled. Rewards follow, then advantages. The model is transformers' own, and so is the processor.
Source: arXiv 2505.14246 and its trainer.

Dimension letters: P prompts, G samples of a prompt, R sampled tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, BatchFeature, GenerationConfig, PreTrainedModel, ProcessorMixin
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from arft_fast.policy.images import EncodedImage
from arft_fast.trajectory import Ending, Prompt, Trajectory, Turn

from .train_problem import MERGED, TrainProblem

_PATCH = 14
"""Pixels along one side of a patch."""


class ImageTextProcessor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor without its video half, which cannot be made without torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token])
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def open_processor(folder: Path, *, most_pixels: int = MERGED**2) -> ImageTextProcessor:
    """The processor of the model in ``folder``, for images of up to ``most_pixels``."""
    images = Qwen2VLImageProcessorPil.from_pretrained(folder)
    images.size = {"shortest_edge": MERGED**2, "longest_edge": max(most_pixels, MERGED**2)}
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")  # where a sampler needs it; TRL relies on it
    return ImageTextProcessor(images, tokenizer, chat_template=tokenizer.chat_template)


def plain_rollout(
    model: PreTrainedModel,
    processor: ImageTextProcessor,
    prompts: Sequence[Prompt],
    reward: Callable[[Trajectory], dict[str, float]],
    *,
    samples: int,
    tokens: int,
    suppressed: Sequence[int],
    temperature: float = 1.0,
    top_k: int = 0,
) -> TrainProblem:
    """Groups of G = ``samples`` turns with their rewards and advantages.

    Args:
        tokens: R, of every turn; ``suppressed`` must hold whatever would end one before.
        top_k: keep the k most likely tokens; 0 keeps all.
    """
    config = GenerationConfig(
        max_new_tokens=tokens,
        do_sample=True,
        temperature=temperature,
        top_k=top_k,
        top_p=1.0,
        num_return_sequences=samples,
        suppress_tokens=list(suppressed),
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    groups = tuple(_group(model, processor, prompt, config) for prompt in prompts)
    for trajectory in (t for group in groups for t in group):
        trajectory.rewards = reward(trajectory)
    rewards = torch.tensor([[sum(t.rewards.values()) for t in group] for group in groups])
    return TrainProblem(groups, group_relative(rewards))


def group_relative(rewards: Tensor) -> Tensor:
    """Advantages [P * G] of rewards [P, G]: less their group's mean, over its deviation (arXiv 2402.03300, 4.1.2)."""
    return ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()


def model_inputs(processor: ImageTextProcessor, prompt: Prompt) -> BatchFeature:
    """What the model takes for a prompt, its image's placeholders expanded."""
    messages: Any = list(prompt.messages)
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return processor(text=[text], images=list(prompt.images), return_tensors="pt")


def _group(
    model: PreTrainedModel, processor: ImageTextProcessor, prompt: Prompt, config: GenerationConfig
) -> tuple[Trajectory, ...]:
    inputs = model_inputs(processor, prompt).to(model.device)
    found: Tensor = model.generate(**inputs, generation_config=config)  # type: ignore[operator]
    before = inputs["input_ids"].shape[1]
    texts = processor.batch_decode(found[:, before:], skip_special_tokens=True)
    image = encoded(prompt, inputs["pixel_values"], inputs["image_grid_thw"][0])
    return tuple(
        one_turn(prompt, g, ids[:before], ids[before:], image, text=texts[g]) for g, ids in enumerate(found.cpu())
    )


def encoded(prompt: Prompt, pixel_values: Tensor, grid: Tensor) -> EncodedImage:
    """A prompt's image as a processor gave it: [patches, D] and [3]."""
    t, h, w = (int(size) for size in grid)
    tokens = t * h * w // (MERGED // _PATCH) ** 2
    return EncodedImage(pixel_values=pixel_values.cpu(), grid_thw=(t, h, w), tokens=tokens, key=prompt.uid)


def one_turn(
    prompt: Prompt, sample: int, before: Tensor, sampled: Tensor, image: EncodedImage, *, text: str = ""
) -> Trajectory:
    """A prompt's ids and the turn that was sampled behind them, by a sampler that tells no log-probs (0)."""
    token_ids = torch.cat([before, sampled]).numpy()
    return Trajectory(
        prompt=prompt,
        sample=sample,
        token_ids=token_ids,
        policy_mask=np.arange(len(token_ids)) >= len(before),
        logprobs=np.zeros(len(token_ids), dtype=np.float32),
        images=[image],
        turns=[Turn(role="assistant", text=text)],
        ending=Ending.STEP,
    )
