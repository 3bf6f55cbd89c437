"""A typed function as a tool: how it runs, what it may return, and whose fault a failure is."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from typing import Any

import pytest
from PIL import Image

from arft_fast.tools.bounds import ERROR_LIMIT, MAX_OUTPUT_PIXELS
from arft_fast.tools.function_tool import FunctionTool, function_tool
from arft_fast.tools.tool import InfraFault, ToolResult


def call(tool: FunctionTool, argument: object, image: Image.Image | None = None) -> ToolResult:
    return asyncio.run(tool.call(argument if isinstance(argument, str) else json.dumps(argument), image))


def raises(error: BaseException) -> FunctionTool:
    def broken() -> str:
        """Break."""
        raise error

    return function_tool(broken)


def test_the_current_image_is_passed_and_is_no_part_of_the_schema() -> None:
    def width(image: Image.Image) -> str:
        """Width."""
        return str(image.width)

    tool: Any = function_tool(width)
    assert tool.schemas[0]["function"]["parameters"]["properties"] == {}
    assert call(tool, {}, Image.new("RGB", (7, 5))).text == "7"
    assert call(tool, {}).error == "there is no image to work on"


def test_a_function_that_can_do_without_an_image_gets_none() -> None:
    def has(image: Image.Image | None) -> str:
        """Look."""
        return str(image is not None)

    assert call(function_tool(has), {}).text == "False"
    assert call(function_tool(has), {}, Image.new("RGB", (7, 5))).text == "True"


def test_a_function_cannot_change_the_image_of_other_samples() -> None:
    def spoil(image: Image.Image) -> Image.Image:
        """Spoil."""
        image.putpixel((0, 0), (9, 9, 9))
        return image

    shared = Image.new("RGB", (2, 2))
    (changed,) = call(function_tool(spoil), {}, shared).images
    assert (changed.getpixel((0, 0)), shared.getpixel((0, 0))) == ((9, 9, 9), (0, 0, 0))


def a_picture() -> Image.Image:
    picture = Image.new("RGBA", (3, 2))
    picture.info["comment"] = "gold answer"
    return picture


@pytest.mark.parametrize(
    ("value", "text", "images"),
    [
        ("a\x1b" * 40 + "\n", "a" * 40, 0),
        (a_picture(), "", 1),
        (("seen", a_picture()), "seen", 1),
        (ToolResult(text="b" * 99, images=[a_picture(), a_picture()], error="no\nway"), "b" * 40, 2),
    ],
    ids=["text", "image", "both", "result"],
)
def test_every_form_of_result_is_taken_bounded_and_cleaned(value: object, text: str, images: int) -> None:
    def give() -> object:
        """Give."""
        return value

    result = call(function_tool(give, text_limit=40), {})
    assert result.text == text
    assert [(image.mode, image.info) for image in result.images] == [("RGB", {})] * images
    assert result.error == ("no way" if images == 2 else None)


def test_an_image_that_is_too_large_is_an_observation() -> None:
    def big() -> Image.Image:
        """Big."""
        return Image.new("L", (MAX_OUTPUT_PIXELS, 2))

    assert call(function_tool(big), {}).error == "image is 4000000x2, more than 4000000 pixels; make it smaller"


def test_a_value_error_is_the_models_and_bounded() -> None:
    result = call(raises(ValueError("too\nfar" + "x" * 10_000)), {})
    assert result.error is not None
    assert result.error.startswith("too farxxx") and len(result.error) == ERROR_LIMIT


@pytest.mark.parametrize("error", [KeyError("x"), OSError("disk"), SystemExit(1), TimeoutError(), StopIteration()])
def test_another_exception_is_a_fault_with_its_cause(error: BaseException) -> None:
    with pytest.raises(InfraFault, match=f"broken broke: {type(error).__name__}") as caught:
        call(raises(error), {})
    assert caught.value.__cause__ is error


def test_an_infra_fault_passes_unchanged() -> None:
    fault = InfraFault("down")
    with pytest.raises(InfraFault) as caught:
        call(raises(fault), {})
    assert caught.value is fault


def test_another_type_of_result_is_a_fault() -> None:
    def number() -> int:
        """Number."""
        return 3

    with pytest.raises(InfraFault, match="returned int; return str, Image"):
        call(function_tool(number), {})


def test_an_async_function_is_awaited_on_the_loop() -> None:
    async def where() -> str:
        """Where."""
        await asyncio.sleep(0)
        return str(threading.current_thread() is threading.main_thread())

    assert call(function_tool(where), {}).text == "True"


def test_a_synchronous_function_does_not_block_the_loop() -> None:
    def slow() -> str:
        """Wait."""
        time.sleep(0.3)
        return "done"

    async def count() -> tuple[ToolResult, int]:
        calling = asyncio.ensure_future(function_tool(slow).call("{}"))
        ticks = 0
        while not calling.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return calling.result(), ticks

    result, ticks = asyncio.run(count())
    assert result.text == "done" and result.seconds >= 0.3
    assert ticks >= 5


def test_an_async_function_is_cancelled_at_its_deadline() -> None:
    ended = []

    async def hang() -> str:
        """Hang."""
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)
        return ""

    with pytest.raises(InfraFault, match=r"hang took longer than deadline_s = 0\.05"):
        call(function_tool(hang, deadline_s=0.05), {})
    assert ended


def test_a_hung_thread_keeps_its_place_until_it_ends() -> None:
    gate = threading.Event()

    def wait(first: bool) -> str:
        """Wait."""
        return str(gate.wait(20)) if first else "free"

    async def use() -> str:
        tool = function_tool(wait, deadline_s=0.1, threads=1)
        with pytest.raises(InfraFault, match=r"wait took longer than deadline_s = 0\.1; its thread goes on"):
            await tool.call('{"first": true}')
        with pytest.raises(InfraFault, match=r"all 1 run earlier calls"):
            await tool.call('{"first": false}')
        gate.set()
        for _ in range(100):
            await asyncio.sleep(0.05)
            try:
                return (await tool.call('{"first": false}')).text
            except InfraFault:
                continue
        return "never"

    assert asyncio.run(use()) == "free"


def test_a_cancelled_call_gives_its_thread_back_when_the_function_ends() -> None:
    gate = threading.Event()

    def wait() -> str:
        """Wait."""
        gate.wait(20)
        return "done"

    async def use() -> str:
        tool = function_tool(wait, threads=1)
        calling = asyncio.ensure_future(tool.call("{}"))
        await asyncio.sleep(0.05)
        calling.cancel()
        await asyncio.wait({calling})
        assert calling.cancelled()
        gate.set()
        return (await tool.call("{}")).text

    assert asyncio.run(use()) == "done"


def test_a_loop_that_ends_before_the_function_is_no_error(recwarn: pytest.WarningsRecorder) -> None:
    gate, ended = threading.Event(), threading.Event()

    def wait() -> str:
        """Wait."""
        gate.wait(20)
        ended.set()
        return ""

    with pytest.raises(InfraFault):
        call(function_tool(wait, deadline_s=0.05), {})
    gate.set()
    assert ended.wait(5)
    time.sleep(0.05)
    assert not recwarn.list  # pytest reports an exception that ends a thread as a warning


def greet() -> str:
    """Greet."""
    return "hello"


def test_a_bad_setting_is_named() -> None:
    with pytest.raises(ValueError, match="deadline_s must be positive, got 0"):
        function_tool(greet, deadline_s=0)
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        function_tool(greet, threads=0)
    with pytest.raises(ValueError, match="text_limit must not be negative, got -1"):
        function_tool(greet, text_limit=-1)
