"""What a tool may put before a model: text without control characters, images of a size that a policy can take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from arft_fast.tools.images import ImageRejected

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_OUTPUT_PIXELS = 4_000_000
MAX_ASPECT_RATIO = 100
"""Longest side over shortest. Qwen2-VL's image processor raises above 200: a trajectory must not die of it."""
ERROR_LIMIT = 300
"""Characters of an error line."""


def check_size(width: int, height: int) -> None:
    """Refuse an image of ``width`` x ``height`` pixels that no policy should be given.

    Raises:
        ImageRejected: it is empty, too large or too thin.
    """
    size = f"image is {width}x{height}"
    if min(width, height) < 1:
        raise ImageRejected(f"{size}, without a pixel; make it larger")
    if width * height > MAX_OUTPUT_PIXELS:
        raise ImageRejected(f"{size}, more than {MAX_OUTPUT_PIXELS} pixels; make it smaller")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ImageRejected(f"{size}, one side over {MAX_ASPECT_RATIO} times the other; make it less narrow")


def clean_image(image: Image) -> Image:
    """A copy of ``image`` as RGB pixels and nothing else: no metadata, no open file.

    Raises:
        ImageRejected: see ``check_size``.
    """
    check_size(*image.size)
    pixels = image.convert("RGB")
    pixels.info.clear()
    return pixels


def clean_images(images: Sequence[Image], limit: int) -> list[Image]:
    """``clean_image`` of each.

    Raises:
        ImageRejected: there are more than ``limit``, or one is refused.
    """
    if len(images) > limit:
        raise ImageRejected(f"{len(images)} images, more than {limit}; give fewer")
    return [clean_image(image) for image in images]


def printable(text: str) -> str:
    """Without control characters: terminal escapes say nothing to a model and harm a reader's screen."""
    return "".join(character for character in text if character.isprintable() or character in "\n\t")


def error_line(error: str) -> str:
    """``error`` as one bounded line that can be printed."""
    return printable(" ".join(error[: 8 * ERROR_LIMIT].split()))[:ERROR_LIMIT]
