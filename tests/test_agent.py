from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from arft_fast.observe.timeline import Timeline
from arft_fast.policy.images import EncodedImage
from arft_fast.policy.model import Policy, load_policy
from arft_fast.policy.parallel import Ranks
from arft_fast.policy.update import GrpoLoss, Optimizer, StepReport, grpo_update
from arft_fast.protocol import Action
from arft_fast.rollout.agent import Agent, Limits, SamplingSettings, replay
from arft_fast.rollout.engine import EngineError, Generation, Sampling
from arft_fast.rollout.teacher import Teacher
from arft_fast.tasks.task import Task
from arft_fast.tools.executor import ToolExecutor
from arft_fast.tools.tool import InfraFault, StatefulTool, Tool, ToolResult
from arft_fast.trajectory import Ending, Prompt, Trajectory, Turn

from .conftest import Mini

SEARCH = "<think> a </think>\n<search> q </search>"
ANSWER = "<think> b </think>\n<answer> x </answer>"
LIMITS = Limits(max_turns=3, max_turn_tokens=40, max_tokens=300, tool_deadline_s=0.5)
FOREVER_S = 3600.0


@dataclass
class Script:
    """An engine that says its lines; a line that is an exception is raised, a number is waited for. Takes notes."""

    policy: Policy
    lines: Sequence[str | Exception | float]
    finish: str = "stop"
    queued_s: float = 0.0
    seeds: list[int] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    said: int = 0
    cancelled: int = 0

    async def generate(
        self, token_ids: Sequence[int], images: Sequence[EncodedImage], sampling: Sampling, *, group: str = ""
    ) -> Generation:
        line = self.lines[self.said % len(self.lines)]
        self.said += 1
        self.seeds.append(sampling.seed)
        self.groups.append(group)
        if isinstance(line, Exception):
            raise line
        if isinstance(line, float):
            try:
                await asyncio.sleep(line)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
            line = ANSWER
        ids = self.policy.tokenizer.encode(line)[: sampling.max_tokens]
        return Generation(
            token_ids=ids,
            logprobs=[-0.5] * len(ids),
            finish="length" if self.finish == "length" else "stop",
            cached_tokens=0,
            prefilled_tokens=len(token_ids),
            weight_version=7,
            seconds=0.1,
            queued_s=self.queued_s,
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
    cancelled: int = 0

    async def start(self) -> str:
        return self.name

    async def call(self, argument: str, image: Image.Image | None = None) -> ToolResult:
        result = self.results[min(len(self.seen), len(self.results) - 1)]
        self.seen.append(image)
        if isinstance(result, Exception):
            raise result
        if isinstance(result, float):
            try:
                await asyncio.sleep(result)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
            return ToolResult(text="late")
        return result

    async def close(self) -> None: ...


@dataclass
class Quiz:
    """A task with one tool."""

    tools: Mapping[str, Tool | StatefulTool]
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


PROMPT = Quiz({}).train_prompt(0)


@pytest.fixture(scope="module")
def policy(tiny_folder: Path) -> Policy:
    """Loaded once: no test here changes its weights."""
    return load_policy(tiny_folder, device=torch.device("cpu"), dtype=torch.float32)


def _play(
    policy: Policy, lines: Sequence[str], task: Task, limits: Limits = LIMITS, finish: str = "stop"
) -> Trajectory:
    tools = ToolExecutor(attempts=limits.tool_attempts, deadline_s=limits.tool_deadline_s, backoff_s=0.0)
    agent = Agent(policy, Script(policy, lines, finish), task, limits, SamplingSettings(), tools=tools)
    return asyncio.run(agent.play(task.train_prompt(0), 0, [0]))


def _agent(policy: Policy, engine: Script, task: Task, **options: Any) -> Agent:
    return Agent(policy, engine, task, replace(LIMITS, **options), SamplingSettings())


def _noise(seed: int, size: int = 56) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


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
    assert trajectory.ending is Ending.INFRA_FAULT and len(dead.seen) == 2
    assert trajectory.fault == "tool 'search' failed 2 times, at last: down"


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


def test_an_agents_own_executor_keeps_its_limits(policy: Policy) -> None:
    tool = Lookup([FOREVER_S])
    agent = _agent(policy, Script(policy, [SEARCH]), Quiz({"search": tool}), tool_deadline_s=0.02, tool_attempts=1)
    trajectory = asyncio.run(agent.play(PROMPT, 0, [0]))
    assert trajectory.fault == "tool 'search' failed once: no answer in 0.02 s" and tool.cancelled == 1


def test_a_fault_is_one_printable_line(policy: Policy) -> None:
    loud = Lookup([InfraFault("down\n\x1b[31m <b>" + "x" * 1000)])
    fault = _play(policy, [SEARCH], Quiz({"search": loud})).fault
    assert fault is not None and fault.isprintable() and "down [31m <b>xxx" in fault and len(fault) == 300


@pytest.mark.parametrize(
    ("lines", "results", "waits_for", "turns"),
    [
        ([SEARCH, FOREVER_S], [ToolResult(text="so far")], "the engine", 2),
        ([SEARCH, ANSWER], [FOREVER_S], "tool 'search'", 1),
    ],
)
def test_a_deadline_keeps_what_was_written_and_says_what_it_waited_for(
    policy: Policy, lines: list[str | float], results: list[ToolResult | float], waits_for: str, turns: int
) -> None:
    engine, tool = Script(policy, lines), Lookup(results)
    agent = _agent(policy, engine, Quiz({"search": tool}), trajectory_timeout_s=0.3, tool_deadline_s=FOREVER_S)
    trajectory = asyncio.run(agent.play(PROMPT, 0, [0]))
    assert trajectory.ending is Ending.DEADLINE and trajectory.infra_failed and trajectory.weight_version == 7
    assert trajectory.fault == f"trajectory deadline passed, waiting for {waits_for}"
    assert len(trajectory.turns) == turns and engine.cancelled + tool.cancelled == 1
    said = policy.tokenizer.encode(SEARCH)
    assert trajectory.token_ids[trajectory.policy_mask].tolist() == said
    assert len(trajectory.token_ids) == len(trajectory.policy_mask) == len(trajectory.logprobs)


def test_an_episode_that_ends_in_time_is_not_touched_by_its_deadline(policy: Policy) -> None:
    agent = _agent(policy, Script(policy, [0.01]), Quiz({}), trajectory_timeout_s=5.0)
    assert asyncio.run(agent.play(PROMPT, 0, [0])).ending is Ending.ANSWER


def test_an_engines_own_timeout_is_not_a_deadline(policy: Policy) -> None:
    agent = _agent(policy, Script(policy, [TimeoutError("socket")]), Quiz({}))
    with pytest.raises(TimeoutError, match="socket"):
        asyncio.run(agent.play(PROMPT, 0, [0]))


async def _too_late(agent: Agent) -> Trajectory:
    now = asyncio.get_running_loop().time()
    return await agent.play(PROMPT, 0, [0], ends_at=now - 1.0)


def test_a_step_that_is_over_asks_nothing_of_the_engine(policy: Policy) -> None:
    engine = Script(policy, [ANSWER])
    trajectory = asyncio.run(_too_late(_agent(policy, engine, Quiz({}))))
    assert trajectory.ending is Ending.DEADLINE and engine.said == 0
    assert trajectory.fault == "step deadline passed, waiting for its start"
    assert len(trajectory.token_ids) == len(trajectory.policy_mask) == len(trajectory.logprobs) == 0
    assert trajectory.weight_version == 0 and trajectory.images == []


@dataclass
class State(Lookup):
    """An operation on a state, which closes as told."""

    closing: Exception | float | None = None
    closed: int = 0

    async def close(self) -> None:
        try:
            if isinstance(self.closing, Exception):
                raise self.closing
            await asyncio.sleep(self.closing or 0)
        finally:
            self.closed += 1


@dataclass
class Stateful:
    """A stateful tool whose states behave as told."""

    results: Sequence[ToolResult | Exception | float] = (ToolResult(text="found"),)
    closing: Exception | float | None = None
    name: str = "memory"
    states: list[State] = field(default_factory=list)

    def for_episode(self) -> Mapping[str, Tool]:
        self.states.append(State(self.results, closing=self.closing))
        return {"search": self.states[-1]}

    async def start(self) -> str:
        return self.name

    async def close(self) -> None: ...


def test_every_episode_has_a_state_of_its_own_and_closes_it(policy: Policy) -> None:
    tool = Stateful()
    agent = _agent(policy, Script(policy, [SEARCH]), Quiz({"memory": tool}))

    async def run() -> list[Trajectory]:
        return await asyncio.gather(*(agent.play(PROMPT, sample, [sample]) for sample in range(2)))

    assert [len(trajectory.observations()) for trajectory in asyncio.run(run())] == [2, 2]
    assert [(len(state.seen), state.closed) for state in tool.states] == [(2, 1)] * 2


@pytest.mark.parametrize(
    ("closing", "cause"),
    [
        (InfraFault("disk full"), "InfraFault('disk full')"),
        (OSError("disk full"), "OSError('disk full')"),
        (FOREVER_S, "TimeoutError()"),
    ],
)
def test_a_state_that_cannot_be_closed_masks_the_trajectory(
    policy: Policy, closing: Exception | float, cause: str
) -> None:
    quiz = Quiz({"memory": Stateful(closing=closing)})
    trajectory = _play(policy, [SEARCH, ANSWER], quiz, replace(LIMITS, tool_deadline_s=0.05, trajectory_timeout_s=3))
    assert trajectory.ending is Ending.INFRA_FAULT
    assert trajectory.fault == f"the episode's tools were not closed: {cause}"
    assert len(trajectory.turns) == 3 and trajectory.policy_mask.any()


def test_what_ended_an_episode_is_told_also_where_its_state_cannot_be_closed(policy: Policy) -> None:
    broken = InfraFault("disk full")
    call = _play(policy, [SEARCH], Quiz({"memory": Stateful([InfraFault("no such row")], closing=broken)}))
    assert call.fault == "tool 'search' failed 2 times, at last: no such row"
    slow = Stateful([FOREVER_S], closing=broken)
    agent = _agent(policy, Script(policy, [SEARCH]), Quiz({"memory": slow}), trajectory_timeout_s=0.1)
    late = asyncio.run(agent.play(PROMPT, 0, [0]))
    assert late.ending is Ending.DEADLINE and late.fault == "trajectory deadline passed, waiting for tool 'search'"
    agent = _agent(policy, Script(policy, [EngineError("gone")]), Quiz({"memory": Stateful(closing=broken)}))
    with pytest.raises(EngineError, match="gone") as caught:
        asyncio.run(agent.play(PROMPT, 0, [0]))
    assert caught.value.__notes__ == ["the episode's tools were not closed: InfraFault('disk full')"]
    assert [state.closed for state in slow.states] == [1]


def test_a_deadline_bounds_the_closing_of_a_state(policy: Policy) -> None:
    tool = Stateful(closing=FOREVER_S)
    limits = {"trajectory_timeout_s": 0.1, "tool_deadline_s": FOREVER_S}
    agent = _agent(policy, Script(policy, [ANSWER]), Quiz({"memory": tool}), **limits)
    trajectory = asyncio.run(agent.play(PROMPT, 0, [0]))
    assert trajectory.fault == "trajectory deadline passed, waiting for its tools to close"


@pytest.mark.parametrize("closing", [0.05, InfraFault("disk full")])
def test_a_cancelled_episode_closes_its_state_first_and_stays_cancelled(
    policy: Policy, closing: Exception | float
) -> None:
    tool = Stateful([FOREVER_S], closing=closing)
    agent = _agent(policy, Script(policy, [SEARCH]), Quiz({"memory": tool}), tool_deadline_s=FOREVER_S)

    async def run() -> tuple[bool, int]:
        playing = asyncio.ensure_future(agent.play(PROMPT, 0, [0]))
        while not (tool.states and tool.states[0].seen):
            await asyncio.sleep(0.001)
        playing.cancel()
        await asyncio.wait({playing})
        return playing.cancelled(), tool.states[0].closed

    assert asyncio.run(run()) == (True, 1)


def _update(policy: Policy, trajectories: list[Trajectory], advantages: list[float]) -> StepReport:
    ranks = Ranks(rank=0, world=1, device=torch.device("cpu"))
    optimizer = Optimizer(policy.trainable_parameters(), learning_rate=0.0, total_steps=1, ranks=ranks)
    report, _ = grpo_update(policy, None, optimizer, trajectories, torch.tensor(advantages), GrpoLoss(), ranks)
    return report


def test_the_update_leaves_out_what_a_deadline_ended(policy: Policy) -> None:
    empty = asyncio.run(_too_late(_agent(policy, Script(policy, [ANSWER]), Quiz({}))))
    agent = _agent(policy, Script(policy, [SEARCH]), Quiz({"search": Lookup([FOREVER_S])}), trajectory_timeout_s=0.05)
    cut = asyncio.run(agent.play(empty.prompt, 1, [0]))
    sound = asyncio.run(_agent(policy, Script(policy, [ANSWER]), Quiz({})).play(empty.prompt, 2, [0]))
    alone = _update(policy, [sound], [0.7])
    assert _update(policy, [empty, cut, sound], [0.4, 0.5, 0.7]) == alone and alone.grad_norm > 0
    assert _update(policy, [replace(cut, ending=Ending.ANSWER), sound], [0.5, 0.7]) != alone  # the mask it is


def test_an_observations_image_that_does_not_fit_is_left_out_with_its_tokens(policy: Policy) -> None:
    quiz = Quiz({"search": Lookup([ToolResult(text="see", images=[_noise(0)] * 80)])})
    trajectory = _play(policy, [SEARCH, ANSWER], quiz)
    assert trajectory.ending is Ending.MAX_TOKENS and trajectory.images == []
    assert not (trajectory.token_ids == policy.chat.image_token_id).any() and trajectory.policy_mask[-1]


def test_the_samples_of_a_prompt_share_a_name_that_no_other_prompt_or_step_has(policy: Policy) -> None:
    engine = Script(policy, [SEARCH, ANSWER])
    agent = _agent(policy, engine, Quiz({}))

    async def names(index: int, *seed: int) -> set[str]:
        engine.groups.clear()
        await agent.play(Quiz({}).train_prompt(index), seed[-1], seed)
        return set(engine.groups)

    async def run() -> None:
        first = await names(0, 3, 1, 99, 0)
        assert len(first) == 1 and first == await names(0, 3, 1, 99, 1)
        assert first != await names(0, 3, 2, 99, 0) and first != await names(1, 3, 1, 98, 0)

    asyncio.run(run())


def test_the_timeline_tells_queueing_from_generating(policy: Policy) -> None:
    timeline = Timeline()
    engine = Script(policy, [0.05], queued_s=0.02)
    agent = Agent(policy, engine, Quiz({}), LIMITS, SamplingSettings(), timeline=timeline)
    asyncio.run(agent.play(PROMPT, 2, [0]))
    queue, generate = timeline.take()
    assert (queue.kind, generate.kind, queue.track, generate.track) == ("queue", "generate", "quiz/0#2", "quiz/0#2")
    assert queue.seconds == pytest.approx(0.02) and queue.end == generate.start and generate.seconds >= 0.03


def test_a_turn_that_is_cancelled_is_on_the_timeline(policy: Policy) -> None:
    timeline = Timeline()
    limits = replace(LIMITS, trajectory_timeout_s=0.05)
    agent = Agent(policy, Script(policy, [FOREVER_S]), Quiz({}), limits, SamplingSettings(), timeline=timeline)
    asyncio.run(agent.play(PROMPT, 0, [0]))
    (span,) = timeline.take()
    assert span.kind == "generate" and 0 < span.seconds < 5.0


@dataclass
class Watched:
    """An image processor that notes which threads it ran in."""

    processor: Any
    threads: list[int] = field(default_factory=list)

    @property
    def merge_size(self) -> int:
        return self.processor.merge_size

    def __call__(self, **arguments: Any) -> Any:
        self.threads.append(threading.get_ident())
        return self.processor(**arguments)


@pytest.fixture
def watched(policy: Policy) -> Iterator[Watched]:
    processor = policy.images.processor
    policy.images.processor = Watched(processor)
    yield policy.images.processor
    policy.images.processor = processor


def test_a_prompts_image_is_prepared_once_for_its_group_and_off_the_loops_thread(
    policy: Policy, watched: Watched
) -> None:
    quiz, picture = Quiz({}), _noise(1)
    part = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "why?"}]}
    prompt = Prompt(uid="quiz/7", task="quiz", messages=[part], images=[picture])
    agent = _agent(policy, Script(policy, [ANSWER]), quiz)

    async def run() -> list[Trajectory]:
        return await asyncio.gather(*(agent.play(prompt, sample, [sample]) for sample in range(8)))

    trajectories = asyncio.run(run())
    assert len(watched.threads) == 1 and watched.threads[0] != threading.get_ident()
    assert len({id(image) for trajectory in trajectories for image in trajectory.images}) == 1
    policy.images.encode(_noise(2))  # unprepared: at once, and here
    assert watched.threads[1:] == [threading.get_ident()]


def test_equal_images_are_prepared_once_and_others_not_mistaken_for_them(policy: Policy, watched: Watched) -> None:
    async def run() -> None:
        await asyncio.gather(*(policy.images.prepare([_noise(3), _noise(4)]) for _ in range(4)))

    alive = len(policy.images._keys)
    asyncio.run(run())
    assert len(watched.threads) == 2
    assert policy.images.encode(_noise(3)) is policy.images.encode(_noise(3)) is not policy.images.encode(_noise(4))
    assert len(watched.threads) == 2
    assert len(policy.images._keys) == alive + 2 and not policy.images._coming  # of the ten pictures two are alive


def test_a_prepared_image_has_the_processors_own_values(policy: Policy) -> None:
    picture = _noise(5, 90)
    asyncio.run(policy.images.prepare([picture]))
    encoded, truth = policy.images.encode(picture), policy.images.processor(images=[picture], return_tensors="pt")
    assert encoded.pixel_values.dtype == torch.float32 and torch.equal(encoded.pixel_values, truth["pixel_values"])
    assert list(encoded.grid_thw) == truth["image_grid_thw"][0].tolist() and encoded.image is picture


def test_who_stops_waiting_for_an_image_leaves_it_to_the_others(policy: Policy, watched: Watched) -> None:
    async def run() -> None:
        picture = _noise(6, 560)
        impatient, patient = (asyncio.ensure_future(policy.images.prepare([picture])) for _ in range(2))
        await asyncio.sleep(0)
        impatient.cancel()
        await patient
        assert impatient.cancelled() and policy.images.encode(picture).image is picture

    asyncio.run(run())
    assert len(watched.threads) == 1


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
