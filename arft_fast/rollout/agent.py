"""One trajectory: generate, parse, act, observe, until it ends. Each is an asyncio task of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL.Image import Image

from arft_fast.policy.images import EncodedImage
from arft_fast.policy.model import Policy
from arft_fast.protocol import STOP_TAGS, Action, parse_turn
from arft_fast.rollout.engine import Engine, Generation, Sampling
from arft_fast.rollout.ledger import Ledger
from arft_fast.tasks.task import Task
from arft_fast.tools.executor import call_tool
from arft_fast.tools.tool import InfraFault, ToolResult
from arft_fast.trajectory import Ending, Prompt, Trajectory, Turn


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Budgets of one trajectory."""

    max_turns: int
    max_turn_tokens: int
    max_tokens: int
    """Prompt, turns and observations together, images expanded."""
    tool_deadline_s: float = 60.0


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How turns are sampled; 0 for ``temperature`` is greedy."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


class Agent:
    """Plays episodes of one task with one engine."""

    def __init__(self, policy: Policy, engine: Engine, task: Task, limits: Limits, sampling: SamplingSettings) -> None:
        self._policy, self._engine, self._task = policy, engine, task
        self._limits, self._sampling = limits, sampling

    async def play(self, prompt: Prompt, sample: int, seed: Sequence[int]) -> Trajectory:
        """One episode.

        Args:
            seed: entropy of the trajectory's own random stream, e.g. (run seed, step, prompt, sample).

        Raises:
            ValueError: the prompt itself leaves no room for a turn.
        """
        ledger = open_ledger(self._policy, prompt, self._limits.max_tokens)
        turns: list[Turn] = []
        generations: list[Generation] = []
        ending = Ending.MAX_TURNS
        image = prompt.images[-1] if prompt.images else None
        turn_seeds = np.random.SeedSequence(list(seed)).generate_state(self._limits.max_turns)
        for turn_seed in turn_seeds:
            generation = await self._generate(ledger, int(turn_seed))
            generations.append(generation)
            ledger.add_sampled(generation.token_ids, generation.logprobs)
            text = self._policy.tokenizer.decode(generation.token_ids, skip_special_tokens=True)
            turns.append(Turn(role="assistant", text=text, seconds=generation.seconds))
            action = parse_turn(text)
            if (ended := self._ended(action, generation)) is not None:
                ending = ended
                break
            if len(generations) == self._limits.max_turns:
                break  # nobody would read another observation
            try:
                observation = await self._act(action, image)
            except InfraFault:
                ending = Ending.INFRA_FAULT
                break
            turns.append(observation)
            closed = generation.token_ids[-1] == self._policy.chat.end_of_turn_id
            ids, images = self._policy.chat.observation(observation.text, observation.images, turn_is_closed=closed)
            if len(ids) >= ledger.room or not ledger.add_context(ids, images):
                ending = Ending.MAX_TOKENS
                break
            if observation.images:
                image = observation.images[-1]
        token_ids, policy_mask, logprobs = ledger.arrays()
        return Trajectory(
            prompt=prompt,
            sample=sample,
            token_ids=token_ids,
            policy_mask=policy_mask,
            logprobs=logprobs,
            images=ledger.images,
            turns=turns,
            ending=ending,
            weight_version=generations[0].weight_version,
            cached_tokens=sum(g.cached_tokens for g in generations),
            prefilled_tokens=sum(g.prefilled_tokens for g in generations),
        )

    async def _generate(self, ledger: Ledger, seed: int) -> Generation:
        settings = Sampling(
            max_tokens=min(self._limits.max_turn_tokens, ledger.room),
            temperature=self._sampling.temperature,
            top_k=self._sampling.top_k,
            top_p=self._sampling.top_p,
            stop=STOP_TAGS,
            seed=seed,
        )
        return await self._engine.generate(ledger.token_ids, ledger.images, settings)

    def _ended(self, action: Action, generation: Generation) -> Ending | None:
        if self._task.stepwise:
            return Ending.STEP
        if action.kind == "answer":
            return Ending.ANSWER
        if action.kind is None:
            return Ending.MAX_TOKENS if generation.finish == "length" else Ending.NO_ACTION
        return None

    async def _act(self, action: Action, image: Image | None) -> Turn:
        assert action.kind is not None, "an episode without an action has ended"
        tool = self._task.tools.get(action.kind)
        result: ToolResult | None = None
        if tool is not None:
            result = await call_tool(tool, action.body, image, deadline_s=self._limits.tool_deadline_s)
        return Turn(
            role="observation",
            text=self._task.observe(action, result),
            images=result.images if result else (),
            tool=tool.name if tool else None,
            failed=bool(result and result.error),
            seconds=result.seconds if result else 0.0,
        )


def open_ledger(policy: Policy, prompt: Prompt, max_tokens: int) -> Ledger:
    """A ledger that holds the prompt.

    Raises:
        ValueError: the prompt leaves no room for a turn.
    """
    ledger = Ledger(image_token_id=policy.chat.image_token_id, max_tokens=max_tokens)
    ids, images = policy.chat.prompt(prompt.messages, prompt.images)
    if len(ids) >= max_tokens or not ledger.add_context(ids, images):
        raise ValueError(
            f"prompt {prompt.uid}: {len(ids)} tokens leave no room within rollout.max_tokens = {max_tokens}; raise it, "
            "or lower policy.max_pixels to shrink its images"
        )
    return ledger


def replay(policy: Policy, prompt: Prompt, turns: Sequence[Turn], max_tokens: int) -> Trajectory:
    """The trajectory in which the policy wrote ``turns``: the same template and the same mask as a live episode.

    Raises:
        ValueError: the episode does not fit into ``max_tokens``.
    """
    ledger = open_ledger(policy, prompt, max_tokens)
    for turn in turns:
        ids: list[int] = policy.tokenizer.encode(turn.text, add_special_tokens=False)
        images: list[EncodedImage] = []
        if turn.role == "observation":
            ids, images = policy.chat.observation(turn.text, turn.images, turn_is_closed=False)
        if len(ids) > ledger.room:
            raise ValueError(
                f"prompt {prompt.uid}: the teacher's episode is longer than rollout.max_tokens = {max_tokens}"
            )
        if turn.role == "assistant":
            ledger.add_sampled(ids, [0.0] * len(ids))
        else:
            ledger.add_context(ids, images)
    token_ids, policy_mask, logprobs = ledger.arrays()
    return Trajectory(
        prompt=prompt, sample=0, token_ids=token_ids, policy_mask=policy_mask, logprobs=logprobs,
        images=ledger.images, turns=list(turns), ending=Ending.ANSWER,
    )  # fmt: skip
