"""The engine around the real SGLang with a tiny policy, and what the trainer and transformers make of the same."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from arft_fast.observe.timeline import Timeline
from arft_fast.policy.batch import collate
from arft_fast.policy.forward import score
from arft_fast.policy.images import EncodedImage
from arft_fast.policy.model import Policy
from arft_fast.rollout.engine import Generation, Sampling
from arft_fast.rollout.ledger import Ledger
from arft_fast.rollout.sglang_engine import SGLangEngine
from arft_fast.rollout.sglang_process import SglangProcess
from arft_fast.trajectory import Ending, Prompt, Trajectory

MAX_TOKENS = 256


class Bench:
    """The policy, the engine around SGLang, and short names for what the steps do with them."""

    def __init__(self, policy: Policy, backend: SglangProcess) -> None:
        self.policy, self.backend, self.timeline = policy, backend, Timeline()
        self.engine = SGLangEngine(policy, backend, max_tokens=MAX_TOKENS, timeline=self.timeline)

    def prompt(self, text: str, shade: int | None = None) -> tuple[list[int], list[EncodedImage]]:
        part = [] if shade is None else [{"type": "image"}]
        messages = [{"role": "user", "content": [*part, {"type": "text", "text": text}]}]
        return self.policy.chat.prompt(messages, [] if shade is None else [picture(shade)])

    async def greedy(self, ids: list[int], images: list[EncodedImage], tokens: int = 10) -> Generation:
        return await self.engine.generate(ids, images, Sampling(max_tokens=tokens, temperature=0))

    @torch.no_grad()
    def expected(self, ids: list[int], images: list[EncodedImage], tokens: int = 10) -> list[int]:
        """Greedy ids by transformers' own generate."""
        pixels: dict[str, Any] = {}
        if images:
            pixels["pixel_values"] = torch.cat([image.pixel_values for image in images])
            pixels["image_grid_thw"] = torch.tensor([image.grid_thw for image in images])
            pixels["mm_token_type_ids"] = (torch.tensor([ids]) == self.policy.chat.image_token_id).long()
        model: Any = self.policy.model
        output = model.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=tokens,
            do_sample=False,
            suppress_tokens=torch.isneginf(self.policy.logit_bias).nonzero().flatten().tolist(),
            **pixels,
        )
        return output[0, len(ids) :].tolist()

    def to_scheduler(self, number: signal.Signals) -> None:
        os.kill(self.backend._launched.engine.get_all_child_pids()[0], number)

    async def refresh(self, version: int) -> None:
        await self.engine.sleep()
        await self.engine.load_weights(version)


def picture(shade: int) -> Image.Image:
    return Image.new("RGB", (84, 84), (shade, 9, 200 - shade % 200))


@contextmanager
def changed(weight: Tensor, row: int, value: Tensor) -> Iterator[None]:
    """One row of a weight, for a while."""
    before = weight.data[row].clone()
    weight.data[row] = value
    try:
        yield
    finally:
        weight.data[row] = before


async def episode(bench: Bench, shade: int, sampling: Sampling) -> tuple[Trajectory, list[Generation]]:
    """Three turns with a new image after the first and text after the second."""
    ledger = Ledger(image_token_id=bench.policy.chat.image_token_id, max_tokens=MAX_TOKENS)
    ledger.add_context(*bench.prompt(f"What is on picture {shade}?", shade))
    generations = []
    for turn in range(3):
        generation = await bench.engine.generate(ledger.token_ids, ledger.images, sampling)
        generations.append(generation)
        ledger.add_sampled(generation.token_ids, generation.logprobs)
        closed = generation.token_ids[-1] == bench.policy.chat.end_of_turn_id
        pictures = [Image.new("RGB", (56, 84), (0, shade, 9))] if turn == 0 else []
        ledger.add_context(*bench.policy.chat.observation(f"seen {turn}", pictures, turn_is_closed=closed))
    token_ids, mask, logprobs = ledger.arrays()
    trajectory = Trajectory(
        prompt=Prompt(uid="p", task="t", messages=[]), sample=0, token_ids=token_ids, policy_mask=mask,
        logprobs=logprobs, images=ledger.images, turns=[], ending=Ending.MAX_TURNS,
    )  # fmt: skip
    return trajectory, generations


def distance(bench: Bench, trajectories: list[Trajectory], temperature: float) -> float:
    """Largest difference between recorded log-probs and the trainer's."""
    recorded = torch.from_numpy(np.concatenate([t.logprobs[t.policy_mask] for t in trajectories]))
    return (score(bench.policy, collate(bench.policy, trajectories), temperature) - recorded).abs().max().item()
