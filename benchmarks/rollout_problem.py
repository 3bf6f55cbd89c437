"""The rollout that engines and schedules are compared on: how long each turn is, how long each tool call takes.

All of it depends on the seed only, and a turn's and a call's share of it on who they are, so every side of a comparison
has the same lengths and latencies. The policy writes what ``script`` says, or with a real engine as many tokens.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING
from zlib import crc32

import numpy as np
import torch

from arft_fast.policy.model import Policy, load_policy
from arft_fast.policy.tiny import build_tiny
from arft_fast.protocol import Action
from arft_fast.tools.tool import Tool, ToolResult
from arft_fast.trajectory import Prompt, Trajectory

if TYPE_CHECKING:
    from PIL.Image import Image

TASK = "overlap"
_NUMBERS = 256


@dataclass(frozen=True, kw_only=True)
class RolloutShape:
    """The size of a rollout. Every episode has ``turns`` turns: tool calls, and the answer at the end."""

    groups: int = 8
    samples: int = 8
    """G"""
    turns: int = 4
    prompt_tokens: int = 120
    """About so many; the chat template's come on top."""
    turn_tokens: int = 36
    """Mean of what is sampled in a turn."""
    spread: float = 0.7
    """Of a turn's length, which is lognormal: the standard deviation of its logarithm. 0.7: the longest tenth of 64
    turns takes half of the time until the last one ends, which is what Seer (arXiv 2511.14617) reports of requests."""
    most_turn_tokens: int = 256
    observation_tokens: int = 40
    """About so many, as for the prompt."""

    @property
    def trajectories(self) -> int:
        return self.groups * self.samples

    @property
    def most_tokens(self) -> int:
        """No sequence gets longer: for ``Limits.max_tokens`` and an engine's cache. 100: the template's share."""
        return self.prompt_tokens + 100 + self.turns * (self.most_turn_tokens + self.observation_tokens + 100)

    def scaled(self, factor: float) -> RolloutShape:
        """The same rollout with ``factor`` times as many tokens of every kind."""
        names = ("prompt_tokens", "turn_tokens", "most_turn_tokens", "observation_tokens")
        return replace(self, **{name: round(factor * getattr(self, name)) for name in names})

    def __str__(self) -> str:
        return (
            f"{self.groups} groups x {self.samples}, {self.turns} turns of about {self.turn_tokens} tokens (lognormal, "
            f"{self.spread:g})"
        )


@dataclass(frozen=True, kw_only=True)
class Latency:
    """How long a tool takes."""

    name: str
    mean_s: float
    spread: float = 0.0
    """0: always the mean. Else lognormal, the standard deviation of its logarithm; 1: one call in a hundred takes six
    times the mean."""

    def seconds(self, argument: str) -> float:
        """Of the call with this argument, whoever makes it and whenever."""
        if not self.spread:
            return self.mean_s
        normal = np.random.default_rng(crc32(argument.encode())).normal()
        return self.mean_s * math.exp(self.spread * normal - self.spread**2 / 2)

    def scaled(self, factor: float) -> Latency:
        """The same tool, taking ``factor`` times as long."""
        return replace(self, mean_s=factor * self.mean_s)


@dataclass(frozen=True)
class ScriptedTurn:
    """What a turn says: ``body`` is free text, ``action`` the tool call or the answer."""

    body: tuple[int, ...]
    action: tuple[int, ...]
    argument: str
    """Of the action, a different one in every turn: no two calls are identical."""

    def __len__(self) -> int:
        return len(self.body) + len(self.action)


@dataclass(frozen=True, kw_only=True)
class RolloutProblem:
    """Prompts, and what each turn of each trajectory says."""

    policy: Policy
    shape: RolloutShape
    seed: tuple[int, ...]
    """As ``collect`` takes it."""
    prompts: tuple[Prompt, ...]
    script: Mapping[int, ScriptedTurn]
    """By the seed of the turn's sampling."""
    episodes: Mapping[tuple[str, int], tuple[ScriptedTurn, ...]]
    """The same turns by prompt uid and sample, in order."""
    observation: str


@dataclass
class SleepTool:
    """Answers every call with the same words, after the call's latency."""

    latency: Latency
    observation: str
    name: str = "search"

    async def start(self) -> str:
        return f"{self.name}: sleeps {self.latency.name}"

    async def call(self, argument: str, image: Image | None = None) -> ToolResult:
        await asyncio.sleep(self.latency.seconds(argument))
        return ToolResult(text=self.observation)

    async def close(self) -> None: ...


@dataclass
class LookupTask:
    """The task of a ``RolloutProblem``: look something up, again and again, then answer."""

    prompts: Sequence[Prompt]
    tools: Mapping[str, Tool]
    name: str = TASK
    stepwise: bool = field(default=False, init=False)

    def train_prompt(self, index: int) -> Prompt:
        return self.prompts[index % len(self.prompts)]

    def eval_prompts(self, count: int) -> Sequence[Prompt]:
        return self.prompts[:count]

    def observe(self, action: Action, result: ToolResult | None) -> str:
        return information(result.text if result else "no such tool")

    def reward(self, trajectory: Trajectory) -> dict[str, float]:
        return {"format": 1.0, "accuracy": float(trajectory.sample % 2)}


def write_policy(folder: Path, *, seed: int = 0) -> Path:
    """The embedded policy, untrained, whose tokenizer knows the protocol's tags, numbers and random words."""
    rng = np.random.default_rng(seed)
    words = ["".join(map(chr, rng.integers(97, 123, size))) for size in rng.integers(3, 9, 600)]
    numbers = [str(number) for number in range(_NUMBERS)]
    texts = (" ".join([*rng.choice(words, 30), *rng.choice(numbers, 10)]) for _ in range(1000))
    tags = (f"{_action(kind, '1')} <information> a </information>" for kind in ("search", "answer") * 50)
    build_tiny(folder, [*texts, *tags], seed=seed)
    return folder


def open_policy(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> Policy:
    """The policy as an engine samples from it here: without end of turn and without ``<``, so that a turn ends where
    the script ends it."""
    policy = load_policy(folder, device=device, dtype=dtype, min_pixels=min_pixels, max_pixels=max_pixels)
    bias = policy.logit_bias.clone()
    bias[[token for token in range(len(policy.tokenizer)) if "<" in policy.tokenizer.decode([token])]] = -math.inf
    bias[len(policy.tokenizer) :] = -math.inf  # rows that only round the head's size up
    return replace(policy, logit_bias=bias)


def plan_rollout(policy: Policy, shape: RolloutShape, *, seed: Sequence[int] = (0, 0)) -> RolloutProblem:
    """A rollout of that shape, in the policy's ids."""
    rng = np.random.default_rng([*seed])
    words = [token for token in range(len(policy.tokenizer)) if _is_word(policy.tokenizer.decode([token]))]

    def text(tokens: int) -> str:
        said: str = policy.tokenizer.decode(rng.choice(words, tokens).tolist())
        return said.strip()

    prompts = tuple(
        Prompt(uid=f"{TASK}/{p}", task=TASK, messages=[{"role": "user", "content": text(shape.prompt_tokens)}])
        for p in range(shape.groups)
    )
    script: dict[int, ScriptedTurn] = {}
    episodes: dict[tuple[str, int], tuple[ScriptedTurn, ...]] = {}
    for p, prompt in enumerate(prompts):
        for sample in range(shape.samples):
            seeds = turn_seeds(seed, prompt, sample, shape.turns)
            kinds = ["search"] * (shape.turns - 1) + ["answer"]
            turns = [_turn(policy, words, shape, rng, kind, f"{p} {sample} {k}") for k, kind in enumerate(kinds)]
            script.update(zip(seeds, turns, strict=True))
            episodes[prompt.uid, sample] = tuple(turns)
    return RolloutProblem(
        policy=policy, shape=shape, seed=tuple(seed), prompts=prompts, script=script, episodes=episodes,
        observation=text(shape.observation_tokens),
    )  # fmt: skip


def turn_seeds(seed: Sequence[int], prompt: Prompt, sample: int, turns: int) -> list[int]:
    """What ``collect`` and ``Agent`` make of a step's seed: one for the sampling of each turn."""
    entropy = np.random.SeedSequence([*seed, crc32(prompt.uid.encode()), sample])
    return [int(value) for value in entropy.generate_state(turns)]


def _turn(
    policy: Policy, words: Sequence[int], shape: RolloutShape, rng: np.random.Generator, kind: str, argument: str
) -> ScriptedTurn:
    action = policy.tokenizer.encode(_action(kind, argument), add_special_tokens=False)
    length = rng.lognormal(math.log(shape.turn_tokens) - shape.spread**2 / 2, shape.spread)
    free = min(round(length), shape.most_turn_tokens) - len(action)
    return ScriptedTurn(tuple(rng.choice(words, max(1, free)).tolist()), tuple(action), argument)


def _action(kind: str, argument: str) -> str:
    return f"\n<{kind}> {argument} </{kind}>"


def information(text: str) -> str:
    """What the policy reads of a tool's ``text``."""
    return f"<information> {text} </information>"


def _is_word(text: str) -> bool:
    return len(text) > 3 and text[0] == " " and text[1:].isascii() and text[1:].islower() and text[1:].isalpha()
