from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import pytest
from PIL import Image

from arft_fast.observe.timeline import Span, Timeline
from arft_fast.tools import executor as executor_module
from arft_fast.tools.executor import ToolExecutor
from arft_fast.tools.tool import InfraFault, ToolResult

T = TypeVar("T")
Step = Callable[[], Awaitable[ToolResult]]


@dataclass
class Scripted:
    """A tool that does the next of its steps at each call, the last one over and over."""

    steps: list[ToolResult | BaseException | Step]
    name: str = "search"
    calls: int = 0
    running: int = 0
    most_running: int = 0
    cancelled: int = 0
    threads: set[int] = field(default_factory=set)

    async def start(self) -> str:
        return self.name

    async def call(self, argument: str, image: Image.Image | None = None) -> ToolResult:
        step = self.steps[min(self.calls, len(self.steps) - 1)]
        self.calls += 1
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            if isinstance(step, BaseException):
                raise step
            return step if isinstance(step, ToolResult) else await step()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    async def close(self) -> None: ...


FOUND = ToolResult(text="found")


async def _hang() -> ToolResult:
    await asyncio.Event().wait()
    raise AssertionError("nobody sets it")


def _after(seconds: float, result: ToolResult | Exception = FOUND) -> Step:
    async def step() -> ToolResult:
        await asyncio.sleep(seconds)
        if isinstance(result, Exception):
            raise result
        return result

    return step


def _quick(**options: Any) -> ToolExecutor:
    return ToolExecutor(**{"backoff_s": 0.0, "deadline_s": 5.0, **options})


def _picture(shade: int) -> Image.Image:
    return Image.new("RGB", (300, 300), (shade, 0, 0))


async def _many(executor: ToolExecutor, tool: Scripted, *arguments: str) -> list[ToolResult | BaseException]:
    calls = [executor.call(tool, argument, None, track=f"t#{i}") for i, argument in enumerate(arguments)]
    return await asyncio.gather(*calls, return_exceptions=True)


def _run(executor: ToolExecutor, tool: Scripted, *arguments: str) -> list[ToolResult | BaseException]:
    return asyncio.run(_many(executor, tool, *arguments))


async def _only_this_task() -> bool:
    await asyncio.sleep(0)
    return asyncio.all_tasks() == {asyncio.current_task()}


def test_a_result_comes_with_the_wall_time_of_its_call() -> None:
    (result,) = _run(_quick(), Scripted([_after(0.03)]), "q")
    assert isinstance(result, ToolResult) and result.text == "found" and 0.03 <= result.seconds < 5.0


@pytest.mark.parametrize("fault", [InfraFault("down"), KeyError("bug"), TimeoutError("socket")])
def test_a_fault_is_tried_again(fault: Exception) -> None:
    tool = Scripted([fault, FOUND])
    (result,) = _run(_quick(), tool, "q")
    assert isinstance(result, ToolResult) and tool.calls == 2


def test_a_fault_of_the_models_own_making_is_a_result_and_not_tried_again() -> None:
    tool = Scripted([ToolResult(error="no word")])
    (result,) = _run(_quick(attempts=3), tool, "q")
    assert isinstance(result, ToolResult) and result.error == "no word" and tool.calls == 1


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (InfraFault("down"), "down"),
        (KeyError("bug"), "KeyError: 'bug'"),
        (TimeoutError("socket"), "TimeoutError: socket"),
        (asyncio.CancelledError(), "the tool cancelled its own call"),
    ],
)
def test_the_last_fault_names_tool_and_cause(fault: BaseException, told: str) -> None:
    tool = Scripted([fault])
    (error,) = _run(_quick(attempts=3), tool, "q")
    assert isinstance(error, InfraFault) and str(error) == f"tool 'search' failed 3 times, at last: {told}"
    assert tool.calls == 3 and error.__cause__ is not None


def test_every_try_has_its_own_deadline_and_is_really_ended() -> None:
    tool = Scripted([_hang])
    (error,) = _run(_quick(deadline_s=0.03), tool, "q")
    assert str(error) == "tool 'search' failed 2 times, at last: no answer in 0.03 s"
    assert tool.cancelled == tool.calls == 2


def test_the_wait_before_another_try_is_jittered_over_a_window_that_doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def note(seconds: float) -> None:
        waits.append(seconds)

    executor = ToolExecutor(attempts=5, backoff_s=0.5, deadline_s=3.0)
    monkeypatch.setattr(executor_module.asyncio, "sleep", note)
    for i in range(60):
        _run(executor, Scripted([InfraFault("down")]), str(i))
    by_try = np.array(waits).reshape(60, 4)
    windows = np.array([0.5, 1.0, 2.0, 3.0])  # the last one is cut to the deadline
    assert (by_try <= windows).all() and (by_try.max(0) > 0.8 * windows).all() and (by_try.min(0) < 0.2 * windows).all()


def test_identical_calls_in_flight_are_carried_out_once() -> None:
    tool = Scripted([_after(0.02)])
    results = _run(_quick(), tool, "q", "q", "q", "other")
    assert [isinstance(result, ToolResult) for result in results] == [True] * 4 and tool.calls == 2


def test_nothing_is_remembered_of_a_call_that_is_over() -> None:
    tool, executor = Scripted([_after(0.0)]), _quick()

    async def run() -> None:
        for _ in range(3):
            await _many(executor, tool, "q", "q")

    asyncio.run(run())
    assert tool.calls == 3 and not executor._flights


def test_another_tool_is_another_call_even_under_the_same_name() -> None:
    tools, executor = [Scripted([_after(0.01)]), Scripted([_after(0.01)])], _quick()

    async def run() -> None:
        await asyncio.gather(*(executor.call(tool, "q", None, track="t") for tool in tools))

    asyncio.run(run())
    assert [tool.calls for tool in tools] == [1, 1]


def test_images_are_identical_by_content() -> None:
    tool, executor = Scripted([_after(0.2)]), _quick()
    pictures = [_picture(1), _picture(1), _picture(2), _picture(1).resize((100, 900)), None]

    async def run() -> None:
        await asyncio.gather(*(executor.call(tool, "q", picture, track="t") for picture in pictures))

    asyncio.run(run())
    assert tool.calls == 4


def test_an_image_is_hashed_off_the_loops_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    tool, digest = Scripted([FOUND]), executor_module._digest

    def watched(image: Image.Image) -> bytes:
        tool.threads.add(threading.get_ident())
        return digest(image)

    monkeypatch.setattr(executor_module, "_digest", watched)
    asyncio.run(_quick().call(tool, "q", _picture(1), track="t"))
    assert len(tool.threads) == 1 and threading.get_ident() not in tool.threads


def test_a_fault_is_shared_with_those_in_flight_and_not_remembered() -> None:
    tool, executor = Scripted([_after(0.01, InfraFault("down")), FOUND]), _quick(attempts=1)

    async def run() -> tuple[list[ToolResult | BaseException], list[ToolResult | BaseException]]:
        return await _many(executor, tool, "q", "q"), await _many(executor, tool, "q")

    first, later = asyncio.run(run())
    assert all(isinstance(error, InfraFault) for error in first) and tool.calls == 2
    assert isinstance(later[0], ToolResult)


def test_who_gives_up_leaves_the_call_to_those_who_wait() -> None:
    tool, executor = Scripted([_after(0.05)]), _quick()

    async def run() -> list[ToolResult | BaseException]:
        calls = [asyncio.ensure_future(executor.call(tool, "q", None, track="t")) for _ in range(3)]
        await asyncio.sleep(0.01)
        calls[0].cancel()  # the one that began it
        return await asyncio.gather(*calls, return_exceptions=True)

    first, *others = asyncio.run(run())
    assert isinstance(first, asyncio.CancelledError) and all(isinstance(result, ToolResult) for result in others)
    assert tool.calls == 1 and tool.cancelled == 0


def test_the_last_one_to_give_up_ends_the_call_and_leaves_no_task() -> None:
    tool, executor = Scripted([_hang]), _quick()

    async def run() -> bool:
        calls = [asyncio.ensure_future(executor.call(tool, "q", None, track="t")) for _ in range(3)]
        await asyncio.sleep(0.01)
        for call in calls:
            assert tool.cancelled == 0
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
        return await _only_this_task()

    assert asyncio.run(run()) and tool.cancelled == tool.calls == 1 and tool.running == 0


def test_a_call_that_is_ending_is_not_joined() -> None:
    async def slow_end() -> ToolResult:
        try:
            return await _hang()
        finally:
            await asyncio.sleep(0.05)

    tool, executor = Scripted([slow_end, FOUND]), _quick()

    async def run() -> ToolResult:
        first = asyncio.ensure_future(executor.call(tool, "q", None, track="t"))
        await asyncio.sleep(0.01)
        first.cancel()
        await asyncio.sleep(0.01)
        result = await executor.call(tool, "q", None, track="t")
        assert not first.done()
        await asyncio.gather(first, return_exceptions=True)
        return result

    assert asyncio.run(run()).text == "found" and tool.calls == 2


def test_a_call_that_just_ended_is_not_joined() -> None:
    over = asyncio.Event()

    async def wake() -> ToolResult:
        over.set()  # who waits for it goes on before anything that follows from this task's end
        return FOUND

    tool, executor = Scripted([wake]), _quick()

    async def run() -> None:
        async def follow() -> None:
            await over.wait()
            await executor.call(tool, "q", None, track="t")

        await asyncio.gather(follow(), executor.call(tool, "q", None, track="t"))

    asyncio.run(run())
    assert tool.calls == 2 and not executor._flights


def test_a_tool_that_answers_its_end_with_a_fault_is_not_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    async def stubborn() -> ToolResult:
        try:
            return await _hang()
        except asyncio.CancelledError as error:
            raise InfraFault("killed") from error

    tool, executor = Scripted([stubborn]), _quick(attempts=5)

    async def run() -> bool:
        call = asyncio.ensure_future(executor.call(tool, "q", None, track="t"))
        await asyncio.sleep(0.01)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        assert call.cancelled()
        return await _only_this_task()

    assert asyncio.run(run()) and tool.calls == 1
    gc.collect()
    assert caplog.records == []  # of a task's exception that nobody asked for


def test_a_tool_that_does_not_end_is_reported_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor_module, "_CANCEL_GRACE_S", 0.02)
    free = asyncio.Event()

    async def deaf() -> ToolResult:
        while not free.is_set():
            try:
                await free.wait()
            except asyncio.CancelledError:
                continue
        return FOUND

    async def run() -> None:
        call = asyncio.ensure_future(_quick().call(Scripted([deaf]), "q", None, track="t"))
        await asyncio.sleep(0.01)
        call.cancel()
        with pytest.warns(UserWarning, match=r"tool 'search': a call goes on 0\.02 s after its end"):
            await asyncio.gather(call, return_exceptions=True)
        assert call.cancelled()
        free.set()

    asyncio.run(run())


@pytest.mark.parametrize(("concurrency", "most"), [(2, 2), ({"search": 3}, 3), ({"code": 1}, 6), (0, 6)])
def test_calls_take_turns_where_a_bound_is_set(concurrency: Any, most: int) -> None:
    tool = Scripted([_after(0.02)])
    results = _run(_quick(concurrency=concurrency), tool, *"abcdef")
    assert tool.most_running == most and all(isinstance(result, ToolResult) for result in results)


def test_waiting_for_a_turn_does_not_count_for_the_deadline() -> None:
    tool = Scripted([_after(0.1)])
    results = _run(_quick(concurrency=1, deadline_s=0.4, attempts=1), tool, *"abcde")
    assert all(isinstance(result, ToolResult) for result in results)


def _spans(tool: Scripted, *arguments: str, **options: Any) -> list[Span]:
    timeline = Timeline()
    _run(_quick(timeline=timeline, **options), tool, *arguments)
    return timeline.take()


def test_every_call_is_a_span_of_its_trajectory() -> None:
    first, second = _spans(Scripted([_after(0.02)]), "q", "q")
    assert (first.kind, first.track, second.track) == ("tool", "t#0", "t#1") and first.seconds >= 0.02
    assert first.detail == {"tool": "search", "shared": False, "attempts": 1, "failed": False}
    assert second.detail == {"tool": "search", "shared": True, "attempts": 1, "failed": False}


def test_the_span_of_a_fault_counts_its_tries() -> None:
    (span,) = _spans(Scripted([InfraFault("down")]), "q", attempts=3)
    assert span.detail == {"tool": "search", "shared": False, "attempts": 3, "failed": True}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"attempts": 0}, "attempts is 0"),
        ({"deadline_s": 0}, "deadline_s is 0"),
        ({"backoff_s": -1}, "backoff_s -1"),
        ({"concurrency": -1}, "concurrency is -1"),
        ({"concurrency": {"code": -2}}, "concurrency is {'code': -2}"),
    ],
)
def test_a_setting_out_of_range_is_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ToolExecutor(**options)


def test_what_another_try_cannot_help_is_not_tried_again() -> None:
    class Refused(InfraFault):
        permanent = True

    tool = Scripted([Refused("no namespaces here")])
    (fault,) = _run(_quick(attempts=3), tool, "q")
    assert isinstance(fault, InfraFault) and "no namespaces here" in str(fault)
    assert tool.calls == 1
