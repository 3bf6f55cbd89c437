from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from PIL import Image

from arft_fast.policy.images import EncodedImage
from arft_fast.policy.model import Policy
from arft_fast.protocol import Action
from arft_fast.rollout.agent import Agent, Limits, SamplingSettings, replay
from arft_fast.rollout.collect import collect
from arft_fast.rollout.engine import Generation, Sampling
from arft_fast.rollout.teacher import Teacher
from arft_fast.tasks.task import Task
from arft_fast.tools.executor import call_tool
from arft_fast.tools.tool import InfraFault, Tool, ToolResult
from arft_fast.trajectory import Ending, Prompt, Trajectory, Turn

from .conftest import Mini

SEARCH = "<think> a </think>\n<search> q </search>"
ANSWER = "<think> b </think>\n<answer> x </answer>"
LIMITS = Limits(max_turns=3, max_turn_tokens=40, max_tokens=300, tool_deadline_s=0.5)


@dataclass
class Script:
    """An engine that says its lines; each turn's seed is written down."""

    policy: Policy
    lines: Sequence[str]
    finish: str = "stop"
    seeds: list[int] = field(default_factory=list)
    said: int = 0

    async def generate(
        self, token_ids: Sequence[int], images: Sequence[EncodedImage], sampling: Sampling, *, group: str = ""
    ) -> Generation:
        ids = self.policy.tokenizer.encode(self.lines[self.said % len(self.lines)])[: sampling.max_tokens]
        self.said += 1
        self.seeds.append(sampling.seed)
        return Generation(
            token_ids=ids,
            logprobs=[-0.5] * len(ids),
            finish="length" if self.finish == "length" else "stop",
            cached_tokens=0,
            prefilled_tokens=len(token_ids),
            weight_version=7,
            seconds=0.1,
        )

    async def sleep(self) -> None: ...

    async def load_weights(self, version: int) -> None: ...

    async def close(self) -> None: ...


@dataclass
class Lookup:
    """A tool that behaves as told."""

    results: Sequence[ToolResult | Exception | float]
    name: str = "search"
    seen: list[Image.Image | None] = field(default_factory=list)

    async def start(self) -> str:
        return self.name

    async def call(self, argument: str, image: Image.Image | None = None) -> ToolResult:
        result = self.results[min(len(self.seen), len(self.results) - 1)]
        self.seen.append(image)
        if isinstance(result, Exception):
            raise result
        if isinstance(result, float):
            await asyncio.sleep(result)
            return ToolResult(text="late")
        return result

    async def close(self) -> None: ...


@dataclass
class Quiz:
    """A task with one tool."""

    tools: Mapping[str, Tool]
    stepwise: bool = False
    name: str = "quiz"

    def train_prompt(self, index: int) -> Prompt:
        return Prompt(uid=f"quiz/{index}", task="quiz", messages=[{"role": "user", "content": "why?"}])

    def eval_prompts(self, count: int) -> Sequence[Prompt]:
        return [self.train_prompt(index) for index in range(count)]

    def observe(self, action: Action, result: ToolResult | None) -> str:
        return f"<information> {(result.error or result.text) if result else 'no tool'} </information>"

    def reward(self, trajectory: Trajectory) -> dict[str, float]:
        return {"format": 1.0, "accuracy": float(trajectory.sample)}


def _play(
    policy: Policy, lines: Sequence[str], task: Task, limits: Limits = LIMITS, finish: str = "stop"
) -> Trajectory:
    agent = Agent(policy, Script(policy, lines, finish), task, limits, SamplingSettings())
    return asyncio.run(agent.play(task.train_prompt(0), 0, [0]))


def test_an_episode_ends_with_its_answer_and_masks_exactly_what_was_said(policy: Policy) -> None:
    trajectory = _play(policy, [SEARCH, ANSWER], Quiz({"search": Lookup([ToolResult(text="it is x")])}))
    assert trajectory.ending is Ending.ANSWER and trajectory.weight_version == 7
    assert [turn.role for turn in trajectory.turns] == ["assistant", "observation", "assistant"]
    said = [*policy.tokenizer.encode(SEARCH), *policy.tokenizer.encode(ANSWER)]
    assert trajectory.token_ids[trajectory.policy_mask].tolist() == said
    assert set(trajectory.logprobs[trajectory.policy_mask]) == {np.float32(-0.5)}
    assert not trajectory.logprobs[~trajectory.policy_mask].any()
    assert "it is x" in policy.tokenizer.decode(trajectory.token_ids[~trajectory.policy_mask])


@pytest.mark.parametrize(
    ("lines", "finish", "ending"),
    [
        ([SEARCH], "stop", Ending.MAX_TURNS),
        (["hello"], "stop", Ending.NO_ACTION),
        (["hello"], "length", Ending.MAX_TOKENS),
    ],
)
def test_every_other_end_has_its_name(policy: Policy, lines: list[str], finish: str, ending: Ending) -> None:
    quiz = Quiz({"search": Lookup([ToolResult(text="more")])})
    assert _play(policy, lines, quiz, finish=finish).ending is ending


def test_an_observation_that_does_not_fit_ends_the_episode_and_is_left_out(policy: Policy) -> None:
    quiz = Quiz({"search": Lookup([ToolResult(text="word " * 400)])})
    trajectory = _play(policy, [SEARCH, ANSWER], quiz)
    assert trajectory.ending is Ending.MAX_TOKENS
    assert len(trajectory.token_ids) <= LIMITS.max_tokens and trajectory.policy_mask[-1]


def test_a_failing_argument_is_an_observation_and_stays_in_training(policy: Policy) -> None:
    quiz = Quiz({"search": Lookup([ToolResult(error="empty query")])})
    trajectory = _play(policy, [SEARCH, ANSWER], quiz)
    assert trajectory.ending is Ending.ANSWER and trajectory.observations()[0].failed


def test_a_broken_tool_is_tried_again_and_then_masks_the_trajectory(policy: Policy) -> None:
    flaky = Lookup([InfraFault("down"), ToolResult(text="up again")])
    assert _play(policy, [SEARCH, ANSWER], Quiz({"search": flaky})).ending is Ending.ANSWER
    dead = Lookup([InfraFault("down")])
    trajectory = _play(policy, [SEARCH, ANSWER], Quiz({"search": dead}))
    assert trajectory.infra_failed and len(dead.seen) == 2


def test_a_tool_that_hangs_is_a_fault_of_the_world() -> None:
    with pytest.raises(InfraFault, match=r"no answer in 0\.05 s"):
        asyncio.run(call_tool(Lookup([30.0]), "q", None, deadline_s=0.05))


def test_the_tools_image_is_what_the_next_call_works_on(policy: Policy) -> None:
    picture = Image.new("RGB", (56, 56), (1, 2, 3))
    tool = Lookup([ToolResult(text="done", images=[picture])])
    trajectory = _play(policy, [SEARCH, SEARCH, ANSWER], Quiz({"search": tool}))
    assert tool.seen == [None, picture]
    pads = (trajectory.token_ids == policy.chat.image_token_id).sum()
    assert pads == sum(image.tokens for image in trajectory.images) == 8


def test_a_stepwise_trajectory_is_one_turn(policy: Policy) -> None:
    trajectory = _play(policy, [SEARCH], Quiz({}, stepwise=True))
    assert trajectory.ending is Ending.STEP and len(trajectory.turns) == 1


def test_a_prompt_without_room_is_named_with_the_remedy(policy: Policy) -> None:
    with pytest.raises(ValueError, match=r"quiz/0.*rollout\.max_tokens = 5"):
        _play(policy, [ANSWER], Quiz({}), Limits(max_turns=1, max_turn_tokens=1, max_tokens=5))


def test_a_group_holds_one_prompts_samples_each_with_a_random_stream_of_its_own(policy: Policy) -> None:
    quiz = Quiz({})
    script = Script(policy, [ANSWER])
    agents = {"quiz": Agent(policy, script, quiz, LIMITS, SamplingSettings())}
    prompts = [quiz.train_prompt(0), quiz.train_prompt(1)]
    groups = asyncio.run(collect(prompts, agents, {"quiz": quiz}, group_size=4, seed=[3]))
    assert [[t.sample for t in group.trajectories] for group in groups] == [[0, 1, 2, 3]] * 2
    assert [t.rewards["accuracy"] for t in groups[1].trajectories] == [0.0, 1.0, 2.0, 3.0]
    assert len(set(script.seeds)) == 8


def test_a_crash_in_one_episode_ends_the_collection(policy: Policy) -> None:
    quiz = Quiz({"search": Lookup([KeyError("bug")])})
    agents = {"quiz": Agent(policy, Script(policy, [SEARCH]), quiz, LIMITS, SamplingSettings())}
    with pytest.raises(ExceptionGroup):
        asyncio.run(collect([quiz.train_prompt(0)], agents, {"quiz": quiz}, group_size=2, seed=[0]))


def test_a_replayed_episode_looks_like_a_live_one(policy: Policy) -> None:
    live = _play(policy, [SEARCH, ANSWER], Quiz({"search": Lookup([ToolResult(text="it is x")])}))
    turns = [Turn(role=turn.role, text=turn.text, images=turn.images) for turn in live.turns]
    again = replay(policy, live.prompt, turns, LIMITS.max_tokens)
    assert again.token_ids.tolist() == live.token_ids.tolist()
    assert again.policy_mask.tolist() == live.policy_mask.tolist()


def test_the_teacher_repeats_its_episodes_in_another_order(policy: Policy, mini: Mini) -> None:
    teacher = Teacher(policy, mini.mixture(), seed=0, slip_rate=0.0, distinct=6, max_tokens=192)
    epochs = [[teacher.episode(12 * epoch + k).prompt.uid for k in range(12)] for epoch in range(3)]
    assert len({frozenset(epoch) for epoch in epochs}) == 1 and len(set(epochs[0])) == 12
    assert epochs[0] != epochs[1] != epochs[2]
    assert [uid.split("/")[0] for uid in epochs[0]] == ["mini_coding", "mini_search"] * 6
