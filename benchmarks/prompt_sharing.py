"""A group's samples on the embedded engine: with one prompt, which is computed once, and with a prompt each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass

import numpy as np

from arft_fast.policy.images import EncodedImage
from arft_fast.policy.model import Policy
from arft_fast.rollout.engine import Generation, Sampling
from arft_fast.rollout.transformers_engine import TransformersEngine

from .train_problem import TrainShape, make_problem


@dataclass(frozen=True, kw_only=True)
class GroupPrompt:
    """G prompts of P tokens with one image: equal ones, or such that differ in their first token only."""

    policy: Policy
    prompts: tuple[tuple[int, ...], ...]
    images: tuple[EncodedImage, ...]
    sampled_tokens: int

    @property
    def tokens(self) -> int:
        """P"""
        return len(self.prompts[0])


def make_prompts(policy: Policy, shape: TrainShape) -> tuple[GroupPrompt, GroupPrompt]:
    """The prompt of ``shape`` for all its samples, and one each that shares nothing but its image."""
    sample = make_problem(policy, shape).trajectories[0]
    behind_first = tuple(sample.token_ids[1 : int(sample.policy_mask.argmax())].tolist())
    special = list(policy.tokenizer.added_tokens_decoder)
    first = np.setdiff1d(np.arange(len(policy.tokenizer)), special)[: shape.samples].tolist()

    def group(first: Sequence[int]) -> GroupPrompt:
        prompts = tuple((token, *behind_first) for token in first)
        return GroupPrompt(
            policy=policy, prompts=prompts, images=tuple(sample.images), sampled_tokens=shape.sampled_tokens
        )

    return group(first[:1] * shape.samples), group(first)


def play_together(group: GroupPrompt) -> list[Generation]:
    """One turn of each sample, all at once, on an engine that has computed nothing yet."""

    async def together(engine: TransformersEngine) -> list[Generation]:
        return await asyncio.gather(*(_generate(engine, group, sample) for sample in range(len(group.prompts))))

    return _with_engine(group, together)


def play_alone(group: GroupPrompt) -> list[Generation]:
    """The same one after another, each on an engine that has forgotten the others."""

    async def alone(engine: TransformersEngine) -> list[Generation]:
        found = []
        for sample in range(len(group.prompts)):
            found.append(await _generate(engine, group, sample))
            await engine.load_weights(0)
        return found

    return _with_engine(group, alone)


async def _generate(engine: TransformersEngine, group: GroupPrompt, sample: int) -> Generation:
    sampling = Sampling(max_tokens=group.sampled_tokens, seed=sample)
    return await engine.generate(group.prompts[sample], group.images, sampling)


def _with_engine(
    group: GroupPrompt, play: Callable[[TransformersEngine], Coroutine[None, None, list[Generation]]]
) -> list[Generation]:
    async def run() -> list[Generation]:
        most = group.tokens + group.sampled_tokens
        engine = TransformersEngine(group.policy, slots=len(group.prompts), max_tokens=most)
        try:
            return await play(engine)
        finally:
            await engine.close()

    return asyncio.run(run())
