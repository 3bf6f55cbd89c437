"""An engine that computes nothing: it says what a script tells it, in the time that a cost model gives, in real time.

Requests are batched continuously, as TransformersEngine and SGLang do it: a step samples one token for every running
request, and requests that arrived before it began are let in. The engine keeps a clock of its own, as one in a process
of its own would: a step begins where the one before it ended, however late the event loop looks, and a request that
arrives meanwhile waits for the next one. So a busy event loop delays trajectories, and never the engine.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from arft_fast.observe.timeline import Timeline
from arft_fast.policy.images import EncodedImage
from arft_fast.rollout.engine import EngineBusy, Generation, Sampling

LOGPROB = -1.0
"""Of every id that the engine says."""


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """The time of one step; see ``seconds``."""

    step_s: float
    sequence_s: float
    """For each running sequence."""
    prefill_s: float
    """For each token that is computed before sampling."""

    def seconds(self, running: int, prefilled: int) -> float:
        """Of a step that samples for ``running`` sequences and lets ``prefilled`` new tokens in."""
        return self.step_s + self.sequence_s * running + self.prefill_s * prefilled

    def scaled(self, factor: float) -> StepCost:
        """A machine that takes ``factor`` times as long."""
        return StepCost(
            step_s=factor * self.step_s, sequence_s=factor * self.sequence_s, prefill_s=factor * self.prefill_s
        )


@dataclass(eq=False)
class _Request:
    prefixes: list[int]
    """A name for each prefix of what was sent."""
    line: Sequence[int]
    done: asyncio.Future[None]
    arrived: float = field(default_factory=time.perf_counter)
    started: float = 0.0
    cached: int = 0
    said: int = 0


class ScriptedEngine:
    """See the module's text; text only. A prefix that was computed once is never computed again."""

    def __init__(self, lines: Mapping[int, Sequence[int]], cost: StepCost, timeline: Timeline, *, slots: int) -> None:
        """Args:
        lines: what is said, by the seed of the turn's sampling.
        timeline: gets a span of kind ``engine`` for each step, with ``running`` and ``prefilled``.
        slots: sequences that run together; further requests wait.
        """
        self._lines, self._cost, self._slots = lines, cost, slots
        self._timeline = timeline
        self._waiting: deque[_Request] = deque()
        self._running: list[_Request] = []
        self._known: set[int] = set()
        self._clock = 0.0
        self._loop_task: asyncio.Task[None] | None = None
        self._version = 0

    async def generate(
        self, token_ids: Sequence[int], images: Sequence[EncodedImage], sampling: Sampling, *, group: str = ""
    ) -> Generation:
        """The line of ``sampling.seed``; see ``Engine``. Shared prefixes are found by content, not by ``group``.

        Raises:
            ValueError: there are images, no line for the seed, or it is longer than ``sampling.max_tokens``.
        """
        line = self._lines.get(sampling.seed)
        if images or not line or len(line) > sampling.max_tokens:
            raise ValueError(
                f"generate: {len(images)} images, a line of {len(line or ())} ids for seed {sampling.seed} and room "
                f"for {sampling.max_tokens}; script a line for every turn, within its budget and without images"
            )
        request = _Request(list(prefix_names(token_ids)), line, asyncio.get_running_loop().create_future())
        self._waiting.append(request)
        if self._loop_task is None or self._loop_task.done():
            self._loop_task = asyncio.create_task(self._serve(), name="scripted engine")
        await request.done
        self._known.update(prefix_names(line, behind=request.prefixes[-1]))
        return Generation(
            token_ids=list(line),
            logprobs=[LOGPROB] * len(line),
            finish="stop",
            cached_tokens=request.cached,
            prefilled_tokens=len(request.prefixes) - request.cached,
            weight_version=self._version,
            seconds=time.perf_counter() - request.arrived,
            queued_s=max(0.0, request.started - request.arrived),
        )

    async def _serve(self) -> None:
        """Step by step, until nothing is left to do."""
        while self._waiting or self._running:
            if not self._running:
                self._clock = max(self._clock, self._waiting[0].arrived)
            prefilled = self._admit()
            if not self._running:
                continue  # all that waited were cancelled
            end = self._clock + self._cost.seconds(len(self._running), prefilled)
            await asyncio.sleep(end - time.perf_counter())
            detail = {"running": len(self._running), "prefilled": prefilled}
            self._timeline.add("engine", "engine", self._clock, end, **detail)
            self._clock = end
            for request in self._running:
                request.said += 1
                if request.said == len(request.line) and not request.done.done():
                    request.done.set_result(None)
            self._running = [request for request in self._running if not request.done.done()]

    def _admit(self) -> int:
        """Let in what arrived before this step; returns how many tokens have to be computed for it."""
        prefilled = 0
        while self._waiting and self._waiting[0].arrived <= self._clock and len(self._running) < self._slots:
            request = self._waiting.popleft()
            if request.done.done():  # its trajectory was cancelled
                continue
            request.started = self._clock
            request.cached = sum(1 for _ in itertools.takewhile(self._known.__contains__, request.prefixes))
            prefilled += len(request.prefixes) - request.cached
            self._known.update(request.prefixes)
            self._running.append(request)
        return prefilled

    async def sleep(self) -> None:
        """Nothing to give back. See ``Engine``."""
        if self._waiting or self._running:
            raise EngineBusy(f"{len(self._waiting) + len(self._running)} requests are still being generated")

    async def load_weights(self, version: int) -> None:
        """Forget what older weights computed. See ``Engine``."""
        await self.sleep()
        self._version = version
        self._known.clear()

    async def close(self) -> None:
        if self._loop_task is not None:
            self._loop_task.cancel()
            await asyncio.gather(self._loop_task, return_exceptions=True)
        for request in (*self._waiting, *self._running):
            request.done.cancel()


def prefix_names(token_ids: Iterable[int], *, behind: int = 0) -> Iterator[int]:
    """One number for each prefix, the shortest first: equal prefixes have equal numbers, others do not in practice.

    Args:
        behind: the number of what stands before ``token_ids``, where that is known already.
    """
    name = behind
    for token in token_ids:
        name = hash((name, token))
        yield name
