"""Pictures of task ``mini_coding``: drawn with Pillow, spoiled by MAT-Coding's labels, repaired by a line of code each.

``distort`` spoils, ``REPAIRS`` undoes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont

SIDE = 84  # 6 x 6 patches of 14: nine merged image tokens
COLOURS = {
    "red": (200, 30, 30),
    "green": (25, 140, 45),
    "blue": (35, 55, 190),
    "yellow": (215, 190, 25),
    "purple": (130, 40, 150),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "cross")
DIGITS = tuple("12345")
WORDS = ("SALE", "OPEN", "EXIT", "TAXI", "CAFE", "BANK")

SINGLE_LABELS = ("rotation90", "rotation180", "dark", "overexposure", "blur", "noise", "crop", "none")
PAIR_LABELS = tuple(
    (turn, other) for turn in ("rotation90", "rotation180") for other in ("dark", "overexposure", "blur", "noise")
)
# The line of code that the teacher writes for a label, and the same made in process (a test compares the pixels).
REPAIRS: Mapping[str, tuple[str, Callable[[Image.Image], Image.Image]]] = {
    "rotation90": ("img = img.rotate(90, expand=True)", lambda img: img.rotate(90, expand=True)),
    "rotation180": ("img = img.rotate(180, expand=True)", lambda img: img.rotate(180, expand=True)),
    "dark": ("img = ImageEnhance.Brightness(img).enhance(3.5)", lambda img: ImageEnhance.Brightness(img).enhance(3.5)),
    "overexposure": (
        "img = ImageEnhance.Brightness(img).enhance(0.7)",
        lambda img: ImageEnhance.Brightness(img).enhance(0.7),
    ),
    "blur": ("img = img.filter(ImageFilter.SHARPEN)", lambda img: img.filter(ImageFilter.SHARPEN)),
    "noise": ("img = img.filter(ImageFilter.MedianFilter(3))", lambda img: img.filter(ImageFilter.MedianFilter(3))),
}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """What is drawn: the three things a question can ask for."""

    colour: str
    shape: str
    digit: str


def random_figure(rng: Random) -> Figure:
    return Figure(colour=rng.choice(tuple(COLOURS)), shape=rng.choice(SHAPES), digit=rng.choice(DIGITS))


def draw_sign(figure: Figure, rng: Random) -> Image.Image:
    """A sign, SIDE x SIDE: a word on a dark band on top (which way is up), the shape below, the digit beside it."""
    image, pen = _canvas(rng)
    pen.rectangle((0, 0, SIDE, rng.randint(21, 24)), fill=(40, 40, 60))
    pen.text((rng.randint(6, 18), rng.randint(-1, 1)), rng.choice(WORDS), fill=(250, 250, 250), font=_font(18))
    _draw_figure(pen, figure, (rng.randint(6, 12), rng.randint(30, 36)), rng.randint(40, 46))
    return image


def draw_quarters(figures: Sequence[Figure], rng: Random) -> Image.Image:
    """Four small figures, one a quarter: which one is meant stands in the question's box."""
    image, pen = _canvas(rng)
    half = SIDE // 2
    for k, figure in enumerate(figures):
        left, top = (k % 2) * half, (k // 2) * half
        _draw_figure(pen, figure, (left + rng.randint(2, 5), top + rng.randint(5, 9)), rng.randint(24, 27))
    return image


def quarter_box(k: int) -> tuple[int, int, int, int]:
    """Box of quarter ``k`` as MAT-Coding writes it: x1, y1, x2, y2 in 0..1000."""
    left, top = (k % 2) * 500, (k // 2) * 500
    return left, top, left + 500, top + 500


def distort(image: Image.Image, labels: Sequence[str], rng: Random) -> Image.Image:
    """Spoil ``image`` by each of ``labels`` in reverse order, so that repairs in order undo them."""
    for label in reversed(labels):
        match label:
            case "rotation90":  # clockwise, as in MAT-Coding
                image = image.transpose(Image.Transpose.ROTATE_270)
            case "rotation180":
                image = image.transpose(Image.Transpose.ROTATE_180)
            case "dark":
                image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.25, 0.32))
            case "overexposure":
                image = ImageEnhance.Brightness(image).enhance(rng.uniform(2.2, 2.6))
            case "blur":
                image = image.filter(ImageFilter.GaussianBlur(rng.uniform(2.4, 3.0)))
            case "noise":
                noise = np.random.default_rng(rng.getrandbits(32)).normal(
                    0, rng.uniform(70, 90), (*image.size[::-1], 3)
                )
                image = Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))
            case "crop" | "none":
                pass
            case _:
                raise ValueError(f"label: unknown {label!r}; use one of {SINGLE_LABELS}")
    return image


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)  # Pillow unpacks it anew at every call


def _canvas(rng: Random) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    shade = rng.randint(205, 245)
    image = Image.new("RGB", (SIDE, SIDE), tuple(shade + rng.randint(-8, 8) for _ in range(3)))
    return image, ImageDraw.Draw(image)


def _draw_figure(pen: ImageDraw.ImageDraw, figure: Figure, corner: tuple[int, int], size: int) -> None:
    """Shape in the left 60 %, digit to its right, both in the figure's colour."""
    x, y = corner
    colour = tuple(COLOURS[figure.colour])
    right, bottom = x + size, y + size
    match figure.shape:
        case "circle":
            pen.ellipse((x, y, right, bottom), fill=colour)
        case "square":
            pen.rectangle((x, y, right, bottom), fill=colour)
        case "triangle":
            pen.polygon([(x, bottom), (right, bottom), ((x + right) // 2, y)], fill=colour)
        case "cross":
            third = size // 3
            pen.rectangle((x + third, y, right - third, bottom), fill=colour)
            pen.rectangle((x, y + third, right, bottom - third), fill=colour)
    pen.text((right + 2, y + size // 8), figure.digit, fill=(20, 20, 20), font=_font(max(14, size // 2 + 8)))
