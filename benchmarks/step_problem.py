"""The steps that whole trainers are compared on: a picture, some text, one turn of a fixed length, a reward of its ids.

Prompts depend on the seed only. No trainer sees one twice, so nobody has a picture ready that the others prepare anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from arft_fast.policy.model import Policy
from arft_fast.protocol import Action
from arft_fast.tools.tool import Tool, ToolResult
from arft_fast.trajectory import Prompt, Trajectory

from .train_problem import TrainShape


class OneTurn:
    """The task: the model writes ``shape.sampled_tokens`` tokens about a picture, and even ids are what is wanted.

    Attributes:
        prompts: of all steps, ``shape.groups`` a step.
        suppressed: ids that nobody may sample: the placeholders of pictures and the end of a turn, so that every turn
            has the same length.
    """

    name = "one_turn"
    stepwise = True
    tools: Mapping[str, Tool] = {}

    def __init__(self, policy: Policy, shape: TrainShape, *, steps: int, seed: int = 0) -> None:
        """Args:
        steps: how many there are prompts for.

        Raises:
            ValueError: the shape has no picture, turns before its last one, or no room for a word.
        """
        if shape.turns or not shape.image:
            raise ValueError("shape: a step has one turn about one picture; give a shape without turns, with an image")
        self.shape = shape
        tokens = shape.prompt_tokens
        self.prompts = [_prompt(policy, tokens, shape.image, (seed, index)) for index in range(steps * shape.groups)]
        forbidden = torch.isinf(policy.logit_bias).nonzero().flatten().tolist()
        self.suppressed: list[int] = sorted({*forbidden, policy.chat.end_of_turn_id})

    def of_step(self, step: int) -> list[Prompt]:
        """The prompts of a step.

        Raises:
            IndexError: there are none so late.
        """
        first = step * self.shape.groups
        if first >= len(self.prompts):
            raise IndexError(f"step {step}: prompts are there for {len(self.prompts) // self.shape.groups} steps only")
        return self.prompts[first : first + self.shape.groups]

    def suppressing(self, bias: Tensor) -> Tensor:
        """A copy of a logit bias [V] that also forbids what nobody may sample."""
        bias = bias.clone()
        bias[self.suppressed] = float("-inf")
        return bias

    def train_prompt(self, index: int) -> Prompt:
        return self.prompts[index]

    def eval_prompts(self, count: int) -> Sequence[Prompt]:
        return self.prompts[:count]

    def observe(self, action: Action, result: ToolResult | None) -> str:
        raise AssertionError("an episode of one turn sees no observation")

    def reward(self, trajectory: Trajectory) -> dict[str, float]:
        return {"even": even_share(trajectory.token_ids[trajectory.policy_mask])}


def even_share(token_ids: Sequence[int] | np.ndarray) -> float:
    """Share of the ids that are even: the reward, which every trainer computes from its own samples."""
    return float(np.mean(np.asarray(token_ids) % 2 == 0))


def _prompt(policy: Policy, tokens: int, size: tuple[int, int], seed: tuple[int, int]) -> Prompt:
    rng, (width, height) = np.random.default_rng(seed), size
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    parts: list[dict[str, Any]] = [{"type": "image"}]
    messages = [{"role": "user", "content": parts}]
    bare, _ = policy.chat.prompt(messages, [image])
    parts.append({"type": "text", "text": _text(policy, rng, tokens - len(bare))})
    return Prompt(uid="-".join(map(str, seed)), task=OneTurn.name, messages=messages, images=(image,))


def _text(policy: Policy, rng: np.random.Generator, tokens: int) -> str:
    """Random words of so many tokens together, or a few less."""
    text = ""
    while True:
        longer = f"{text} {''.join(map(chr, rng.integers(97, 123, 5)))}"
        if len(policy.chat.plain(longer)) > tokens:
            break
        text = longer
    if not text:
        raise ValueError(f"prompt_tokens: {tokens} are left beside template and picture, not enough for a word")
    return text
