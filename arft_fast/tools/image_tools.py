"""Ready image tools: typed functions over Pillow, for a policy that calls tools by name instead of writing code.

Boxes are ``[x1, y1, x2, y2]``: left, top, right and bottom on a scale of 0 to 1000 over the image's width and height,
as MAT-Coding states them (arXiv 2505.14246). The same box means the same part at every resolution, so it survives a
policy's own resizing of its input. Edges are rounded outwards: a box never loses a pixel that it touches.

Every tool works on the current image and answers with the new one and its size. A result of more than
``bounds.MAX_OUTPUT_PIXELS`` is scaled down to that, keeping its aspect, and never built larger first; one that is too
thin, and a number out of its range, is the model's error.
"""

from __future__ import annotations

from math import ceil, cos, floor, radians, sin, sqrt
from typing import Literal

from PIL import Image, ImageEnhance, ImageFilter

from arft_fast.tools.bounds import MAX_OUTPUT_PIXELS
from arft_fast.tools.function_tool import FunctionTool, function_tool

Box = tuple[float, float, float, float]

_MAX_ENLARGEMENT = 8.0
_QUARTER_TURNS = {  # Pillow counts counter-clockwise
    90.0: Image.Transpose.ROTATE_270,
    180.0: Image.Transpose.ROTATE_180,
    270.0: Image.Transpose.ROTATE_90,
}
_SIDES = ("x1 (left)", "y1 (top)", "x2 (right)", "y2 (bottom)")


def crop(image: Image.Image, box: Box) -> tuple[str, Image.Image]:
    """Cut a part out of the current image.

    Args:
        box: [x1, y1, x2, y2]: left, top, right, bottom, each from 0 to 1000 of the image's width or height
    """
    return _answer(_cut(image, box))


def zoom(image: Image.Image, box: Box, factor: float = 2.0) -> tuple[str, Image.Image]:
    """Cut a part out of the current image and enlarge it, to read small text or see small things.

    Args:
        box: [x1, y1, x2, y2]: left, top, right, bottom, each from 0 to 1000 of the image's width or height
        factor: how many times wider and higher the part becomes, from 1 to 8
    """
    _in_range("factor", factor, 1, _MAX_ENLARGEMENT)
    return _answer(_enlarge(_cut(image, box), factor))


def upscale(image: Image.Image, factor: float = 2.0) -> tuple[str, Image.Image]:
    """Enlarge the whole current image.

    Args:
        factor: how many times wider and higher it becomes, from 1 to 8
    """
    _in_range("factor", factor, 1, _MAX_ENLARGEMENT)
    return _answer(_enlarge(_plain(image), factor))


def rotate(image: Image.Image, degrees: float) -> tuple[str, Image.Image]:
    """Turn the current image clockwise; it grows so that no corner is lost, and new corners are black.

    Args:
        degrees: how far clockwise, from -360 to 360; 90, 180 and 270 lose nothing
    """
    _in_range("degrees", degrees, -360, 360)
    pixels, turn = _plain(image), degrees % 360
    if turn == 0:
        return _answer(pixels)
    if turn in _QUARTER_TURNS:
        return _answer(pixels.transpose(_QUARTER_TURNS[turn]))
    pixels = _scaled(pixels, min(1.0, _largest_turned(*pixels.size, turn)))
    return _answer(pixels.rotate(-turn, resample=Image.Resampling.BICUBIC, expand=True))


def brightness(image: Image.Image, factor: float) -> tuple[str, Image.Image]:
    """Make the current image brighter or darker.

    Args:
        factor: above 1 brightens a dark image, below 1 darkens an overexposed one; from 0.05 to 20
    """
    _in_range("factor", factor, 0.05, 20)
    return _answer(ImageEnhance.Brightness(_plain(image)).enhance(factor))


def contrast(image: Image.Image, factor: float) -> tuple[str, Image.Image]:
    """Raise or lower the contrast of the current image.

    Args:
        factor: above 1 raises it, below 1 lowers it; from 0.05 to 20
    """
    _in_range("factor", factor, 0.05, 20)
    return _answer(ImageEnhance.Contrast(_plain(image)).enhance(factor))


def sharpen(image: Image.Image, radius: float = 2.0, percent: int = 150) -> tuple[str, Image.Image]:
    """Sharpen a blurred image by an unsharp mask.

    Args:
        radius: width of the blur in pixels, from 0.5 to 20
        percent: how strongly, from 1 to 500
    """
    _in_range("radius", radius, 0.5, 20)
    _in_range("percent", percent, 1, 500)
    return _answer(_plain(image).filter(ImageFilter.UnsharpMask(radius, percent, threshold=0)))


def denoise(
    image: Image.Image, method: Literal["median", "gaussian"] = "median", strength: int = 1
) -> tuple[str, Image.Image]:
    """Remove noise from the current image.

    Args:
        method: median removes single wrong pixels and keeps edges; gaussian smooths everything
        strength: 1, 2 or 3; more removes more noise and more detail
    """
    _in_range("strength", strength, 1, 3)
    filters = {
        "median": ImageFilter.MedianFilter(2 * strength + 1),
        "gaussian": ImageFilter.GaussianBlur(float(strength)),
    }
    return _answer(_plain(image).filter(filters[method]))


IMAGE_FUNCTIONS = (crop, zoom, upscale, rotate, brightness, contrast, sharpen, denoise)


def image_tools(*, deadline_s: float = 30.0, threads: int = 4) -> list[FunctionTool]:
    """The functions of this module as stateless tools; the numbers are those of ``function_tool``, for each."""
    return [function_tool(function, deadline_s=deadline_s, threads=threads) for function in IMAGE_FUNCTIONS]


def pixel_box(box: Box, width: int, height: int) -> tuple[int, int, int, int]:
    """``box`` (0..1000) in pixels of an image of ``width`` x ``height``: left, top, and right, bottom just outside.

    Raises:
        ValueError: a side lies outside of 0..1000, or the box is empty or the wrong way round.
    """
    for side, value in zip(_SIDES, box, strict=True):
        if not 0 <= value <= 1000:
            raise ValueError(f"box: {side} is {value:g}; give 0 to 1000 of the image's width or height")
    left, top, right, bottom = box
    if left >= right:
        raise ValueError(f"box: x1 (left) is {left:g}, x2 (right) is {right:g}; x1 must be less than x2")
    if top >= bottom:
        raise ValueError(f"box: y1 (top) is {top:g}, y2 (bottom) is {bottom:g}; y1 must be less than y2")
    return (
        floor(left * width / 1000),
        floor(top * height / 1000),
        ceil(right * width / 1000),
        ceil(bottom * height / 1000),
    )


def _cut(image: Image.Image, box: Box) -> Image.Image:
    return _plain(image.crop(pixel_box(box, *image.size)))


def _enlarge(image: Image.Image, factor: float) -> Image.Image:
    return _scaled(image, min(factor, sqrt(MAX_OUTPUT_PIXELS / (image.width * image.height))))


def _largest_turned(width: int, height: int, degrees: float) -> float:
    """The factor on both sides by which an image, turned after it, has at most ``MAX_OUTPUT_PIXELS``.

    Turned, the image is ``across`` x ``along`` pixels, and Pillow's rounding adds up to 2 to either side: the factor f
    solves ``(f across + 2) (f along + 2) = MAX_OUTPUT_PIXELS``.
    """
    cosine, sine = abs(cos(radians(degrees))), abs(sin(radians(degrees)))
    across, along = width * cosine + height * sine, width * sine + height * cosine
    half, area = across + along, across * along
    return (sqrt(half**2 + area * (MAX_OUTPUT_PIXELS - 4)) - half) / area


def _plain(image: Image.Image) -> Image.Image:
    """RGB, and no larger than a result may be."""
    return _scaled(image.convert("RGB"), min(1.0, sqrt(MAX_OUTPUT_PIXELS / (image.width * image.height))))


def _scaled(image: Image.Image, factor: float) -> Image.Image:
    if factor == 1:
        return image
    size = max(1, floor(image.width * factor)), max(1, floor(image.height * factor))
    return image.resize(size, Image.Resampling.LANCZOS)


def _answer(image: Image.Image) -> tuple[str, Image.Image]:
    return f"The image is now {image.width}x{image.height} pixels.", image


def _in_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} is {value:g}; give {low:g} to {high:g}")
