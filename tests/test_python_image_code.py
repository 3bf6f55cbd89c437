"""The code tool: an image and text in, an image and text out, and every failure of the code as one line."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from arft_fast.tools.bounds import ERROR_LIMIT
from arft_fast.tools.images import decode_image, encode_jpeg
from arft_fast.tools.python_image_code import FAITHFUL_ERROR, PythonImageCode, first_python_block
from arft_fast.tools.sandbox import Sandbox
from arft_fast.tools.tool import InfraFault, ToolResult

Call = Callable[..., ToolResult]

OPEN = "from PIL import Image\nimage = Image.open('path_to_input_image.jpg')\n"
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize((160, 120))


def fenced(code: str) -> str:
    return f"```python\n{code}\n```"


def saves(expression: str) -> str:
    return fenced(f"{OPEN}({expression}).save('path_to_output_image.jpg', format='PNG')")


@pytest.fixture(scope="module")
def call() -> Iterator[Call]:
    with asyncio.Runner() as runner:
        tool = PythonImageCode(Sandbox(workers=1, timeout_s=1.0), text_limit=100)

        def run(argument: str, image: Image.Image | None = PICTURE) -> ToolResult:
            return runner.run(tool.call(argument, image))

        yield run
        runner.run(tool.close())


def test_the_code_sees_the_image_and_its_output_comes_back(call: Call) -> None:
    result = call(saves("image.rotate(90, expand=True)"))
    assert result.error is None
    (image,) = result.images
    expected = decode_image(encode_jpeg(PICTURE)).rotate(90, expand=True)
    assert (image.mode, image.size) == ("RGB", (120, 160))
    assert image.tobytes() == expected.tobytes()


def test_printed_text_comes_back_without_control_characters(call: Call) -> None:
    result = call(fenced(OPEN + "print('\\x1b[31mred\\x00\\n', image.size)\nimage.save('path_to_output_image.jpg')"))
    assert result.text == "[31mred\n (160, 120)\n"
    assert len(result.images) == 1


def test_printed_text_is_bounded(call: Call) -> None:
    assert call(fenced("print('x' * 10_000)")).text == "x" * 100


def test_a_failure_keeps_the_printed_text_and_the_traceback(call: Call) -> None:
    result = call(fenced("print('so far')\n1 / 0"))
    assert (result.error, list(result.images)) == ("ZeroDivisionError: division by zero", [])
    printed, _, traceback = result.text.partition("\nstderr:\n")
    assert printed == "so far"
    assert traceback.endswith('  File "<code>", line 2, in <module>\nZeroDivisionError: division by zero')


def test_standard_error_comes_back_without_a_failure_too(call: Call) -> None:
    result = call(
        fenced(OPEN + "import sys; print('careful', file=sys.stderr)\nimage.save('path_to_output_image.jpg')")
    )
    assert (result.text, result.error, len(result.images)) == ("stderr:\ncareful", None, 1)


def test_of_standard_error_the_end_is_kept(call: Call) -> None:
    result = call(fenced("import sys; sys.stderr.write('a' * 500 + 'b\\x1b' * 80 + '\\n'); print('out')"))
    assert result.text == "out\nstderr:\n" + "a" * 20 + "b" * 80


def test_each_call_works_on_the_image_before_it(call: Call) -> None:
    first = call(saves("image.crop((0, 0, 60, 40))")).images[0]
    second = call(saves("image.rotate(90, expand=True)"), first).images[0]
    assert (first.size, second.size) == ((60, 40), (40, 60))
    assert second.tobytes() == decode_image(encode_jpeg(first)).rotate(90, expand=True).tobytes()


def test_of_the_written_file_only_pixels_come_back(call: Call) -> None:
    code = OPEN + "image.save('path_to_output_image.jpg', comment=b'gold answer', icc_profile=b'profile')"
    (image,) = call(fenced(code)).images
    assert image.info == {} and not hasattr(image, "filename")


def test_a_pickle_is_no_image(call: Call) -> None:
    code = "import pickle\npickle.dump(print, open('path_to_output_image.jpg', 'wb'))"
    assert call(fenced(code)).error == "not a readable PNG, JPEG, WEBP, BMP image"


def test_a_faithful_tool_tells_neither_the_reason_nor_what_was_printed() -> None:
    async def use() -> list[ToolResult]:
        tool = PythonImageCode(Sandbox(workers=1), faithful=True)
        try:
            return [
                await tool.call(argument, PICTURE)
                for argument in (
                    fenced("print('x'); 1 / 0"),
                    "no code",
                    fenced(f"print('x')\n{OPEN}image.save('x.png')"),
                )
            ] + [await tool.call(saves("image"), PICTURE)]
        finally:
            await tool.close()

    *failures, success = asyncio.run(use())
    assert [(each.text, each.error, len(each.images)) for each in failures] == [("", FAITHFUL_ERROR, 0)] * 3
    assert (success.text, success.error, len(success.images)) == ("", None, 1)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("pass", "no image was written to 'path_to_output_image.jpg'"),
        ("open('path_to_output_image.jpg', 'w').write('no image')", "not a readable PNG, JPEG, WEBP, BMP image"),
        ("open('path_to_output_image.jpg', 'w')", "image is empty (0 bytes)"),
        ("import os; os.mkdir('path_to_output_image.jpg')", "path_to_output_image.jpg is not a regular file"),
        ("x = [0] * 10 ** 10", "MemoryError"),
        ("import os; os._exit(9)", "exited with status 9"),
        ("while True: pass", "timed out after 1 s"),
        ("import nowhere", "ModuleNotFoundError: No module named 'nowhere'"),
    ],
)
def test_a_failure_of_the_code_is_named(call: Call, code: str, error: str) -> None:
    result = call(fenced(code))
    assert (result.error, list(result.images)) == (error, [])


@pytest.mark.parametrize(
    ("expression", "error"),
    [
        ("Image.new('L', (2001, 2000))", "image is 2001x2000, more than 4000000 pixels; make it smaller"),
        ("image.resize((1010, 10))", "image is 1010x10, one side over 100 times the other; make it less narrow"),
        ("Image.new('L', (60_000, 60_000))", "MemoryError"),
    ],
)
def test_an_output_image_of_an_unusable_size_is_refused(call: Call, expression: str, error: str) -> None:
    result = call(saves(expression))
    assert (result.error, list(result.images)) == (error, [])


def test_an_animated_output_is_refused(call: Call) -> None:
    frames = "image.save('path_to_output_image.jpg', format='PNG', save_all=True, append_images=[image.rotate(9)])"
    assert call(fenced(OPEN + frames)).error == "PNG image has several frames; write a single still image"


def test_the_error_is_one_bounded_line(call: Call) -> None:
    error = call(fenced("raise ValueError('a\\nb\\x1b' + 'x' * 5000)")).error
    assert error is not None
    assert error.startswith("ValueError: a bxxx") and len(error) == ERROR_LIMIT


def test_without_an_image_there_is_no_input_file(call: Call) -> None:
    assert call(saves("image"), None).error == (
        "FileNotFoundError: [Errno 2] No such file or directory: 'path_to_input_image.jpg'"
    )
    assert (
        call(
            fenced("from PIL import Image\nImage.new('RGB', (3, 2)).save('path_to_output_image.jpg', 'PNG')"), None
        ).error
        is None
    )


def test_an_image_of_any_mode_can_be_given(call: Call) -> None:
    assert call(saves("image"), Image.new("RGBA", (5, 4))).images[0].size == (5, 4)


@pytest.mark.parametrize(
    "argument", ["", "print(1)", "```\nprint(1)\n```", "```python print(1)```", "```python\nprint(1)"]
)
def test_an_argument_without_a_block_is_the_models_error(call: Call, argument: str) -> None:
    result = call(argument)
    assert (result.error, result.text, list(result.images)) == ("no ```python block", "", [])


def test_the_first_block_counts() -> None:
    assert first_python_block("words\n```python\nfirst\n```\nmore ```python\nsecond\n```") == "first\n"


def test_trailing_space_and_carriage_return_after_the_fence_do_not_matter() -> None:
    assert first_python_block("```python \r\nx = 1\r\n```") == "x = 1\r\n"


@given(st.lists(st.sampled_from(["```", "python", "```python\n", "\n", "x", " "]), max_size=30).map("".join))
def test_any_argument_has_a_block_without_a_fence_or_none(argument: str) -> None:
    code = first_python_block(argument)
    assert code is None or ("```" not in code and f"{code}```" in argument)


def test_the_time_of_the_call_is_reported(call: Call) -> None:
    assert 0.2 < call(fenced("import time; time.sleep(0.2)")).seconds < 1.0


def test_a_closed_tool_is_an_infra_fault() -> None:
    async def use() -> None:
        tool = PythonImageCode(Sandbox(workers=1))
        await tool.close()
        await tool.call(fenced("pass"))

    with pytest.raises(InfraFault, match="the sandbox is closed"):
        asyncio.run(use())


def test_a_bad_setting_is_named() -> None:
    with pytest.raises(ValueError, match="text_limit"):
        PythonImageCode(Sandbox(), text_limit=-1)
