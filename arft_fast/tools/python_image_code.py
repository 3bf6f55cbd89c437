"""The code tool: Python that the model wrote, on the episode's image, in a sandbox.

The code reads ``path_to_input_image.jpg`` and writes ``path_to_output_image.jpg`` in its working directory
(arXiv 2505.14246, section 3; the file names are those of its prompts). What it prints comes back as text.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from arft_fast.tools.images import ImageRejected, decode_image, encode_jpeg
from arft_fast.tools.sandbox import Sandbox
from arft_fast.tools.tool import ToolResult

if TYPE_CHECKING:
    from PIL.Image import Image

INPUT_NAME = "path_to_input_image.jpg"
OUTPUT_NAME = "path_to_output_image.jpg"
MAX_OUTPUT_PIXELS = 4_000_000
MAX_ASPECT_RATIO = 100
"""Longest side over shortest. Qwen2-VL's image processor raises above 200: a trajectory must not die of it."""
ERROR_LIMIT = 300
"""Characters of an error line."""

_FENCE = "```"


class PythonImageCode:
    """Runs the first ```` ```python ```` block of the argument. Owns ``sandbox``: ``close`` closes it.

    Args:
        sandbox: where the code runs; one may serve many tools, calls take turns.
        text_limit: characters of standard output that are kept.
    """

    name = "code"

    def __init__(self, sandbox: Sandbox, *, text_limit: int = 1000) -> None:
        if text_limit < 0:
            raise ValueError(f"text_limit must not be negative, got {text_limit}")
        self._sandbox = sandbox
        self._text_limit = text_limit

    async def call(self, argument: str, image: Image | None = None) -> ToolResult:
        """Run the code; ``images`` holds the one image that it wrote, as RGB pixels decoded here.

        Without ``image`` there is no input file. ``error`` is one line for: no code block, an exception (its last
        line), the deadline, no output image, or one that is corrupt, animated, too large or too thin.

        Raises:
            InfraFault: the sandbox failed.
        """
        started = time.perf_counter()
        text, images, error = "", [], None
        code = first_python_block(argument)
        if code is None:
            error = "no ```python block"
        else:
            files = {} if image is None else {INPUT_NAME: await asyncio.to_thread(encode_jpeg, image)}
            result = await self._sandbox.run(code, files, [OUTPUT_NAME])
            text, error = _printable(result.stdout)[: self._text_limit], result.error
            if error is None:
                try:
                    images = [await asyncio.to_thread(_output_image, result.files.get(OUTPUT_NAME))]
                except ImageRejected as rejected:
                    error = str(rejected)
        return ToolResult(text=text, images=images, error=_one_line(error), seconds=time.perf_counter() - started)

    async def start(self) -> str:
        """Start the sandbox; the line names its active layers.

        Raises:
            InfraFault: the sandbox cannot start here.
        """
        await self._sandbox.start()
        return f"{self.name}: sandbox with {', '.join(self._sandbox.layers)}"

    async def close(self) -> None:
        await self._sandbox.close()


def first_python_block(text: str) -> str | None:
    """What stands between the first ```` ```python ```` line and the next ```` ``` ````; None without such a block.

    Linear in ``text``, whatever it holds.
    """
    _, fence, rest = text.partition(_FENCE + "python")
    if not fence:
        return None
    info, newline, body = rest.partition("\n")
    code, end, _ = body.partition(_FENCE)
    return code if newline and end and not info.strip() else None


def _output_image(data: bytes | None) -> Image:
    if data is None:
        raise ImageRejected(f"no image was written to '{OUTPUT_NAME}'")
    image = decode_image(data, max_pixels=MAX_OUTPUT_PIXELS)
    width, height = image.size
    if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
        narrow = f"one side over {MAX_ASPECT_RATIO} times the other; make it less narrow"
        raise ImageRejected(f"image is {width}x{height}, {narrow}")
    return image


def _printable(text: str) -> str:
    """Without control characters: terminal escapes say nothing to a model and harm a reader's screen."""
    return "".join(character for character in text if character.isprintable() or character in "\n\t")


def _one_line(error: str | None) -> str | None:
    return None if error is None else _printable(" ".join(error.split()))[:ERROR_LIMIT]
