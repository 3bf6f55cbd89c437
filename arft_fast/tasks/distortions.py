"""Photographs spoiled by MAT-Coding's labels, and the OpenCV code that undoes it.

The authors of arXiv 2505.14246 name the labels and say that rotations are clockwise, the blur is Gaussian with varied
kernels, the noise Gaussian with varied deviation, and that labels are composed; the figures were never published. Ours,
drawn evenly from ranges, on pixel values v of 0..255:

    rotation90, rotation180   clockwise, no pixel changed
    dark                      g v, g in 0.20..0.40
    overexposure              255 (l + (1 - l) (v / 255)^p), l in 0.20..0.30, p in 0.45..0.65: black turns grey too, and
                              nothing is clipped, so that a white page can be repaired
    blur                      Gaussian of an odd kernel k in 7..15 pixels, deviation 0.15 k + 0.35 (OpenCV's rule)
    noise                     Gaussian, deviation 20..45 on each channel of each pixel, then clipped
    crop                      the image stays; the question holds a box (see ``synthesize``)
    none                      the image stays

The code that undoes a label knows its figures where a viewer could estimate them (dark, overexposure, blur, noise).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from math import inf, log10
from random import Random

import numpy as np
from PIL import Image, ImageFilter

from arft_fast.tools.images import decode_image, encode_jpeg
from arft_fast.tools.python_image_code import INPUT_NAME, OUTPUT_NAME

_ROTATIONS = ("rotation90", "rotation180")
_SPOILED = ("dark", "overexposure", "blur", "noise")
PUBLISHED_SHARES: Mapping[tuple[str, ...], float] = {
    **{(label,): 2.0 for label in (*_ROTATIONS, *_SPOILED, "crop", "none")},
    **{(rotation, label): 1.0 for rotation in _ROTATIONS for label in _SPOILED},
}
"""Label combinations and their shares as counted in the published file: 8 singles of 100, 8 doubles of 50."""

MIN_GAIN_DB: Mapping[str, float] = {"dark": 3.0, "overexposure": 3.0, "blur": 0.2, "noise": 1.0}
"""How much closer to the original (PSNR) a repair has to be than the spoiled image. An image on which it is not hardly
shows the label: a black one that was darkened, a smooth one that was blurred."""
JPEG_LEEWAY_DB = 3.0
"""A rotation or a crop is exact: it may lose what the files of the code tool lose, give or take this."""

Box = tuple[int, int, int, int]
"""x1, y1, x2, y2 in 0..1000 of width and height, as MAT-Coding writes boxes."""


def parse_shares(text: str) -> Mapping[tuple[str, ...], float]:
    """``dark=2,rotation90+dark=1`` as shares; the published ones for an empty text.

    Raises:
        ValueError: a combination is not one of MAT-Coding's or stands twice, or a share is not a number above 0.
    """
    shares = dict[tuple[str, ...], float]()
    for part in filter(None, text.split(",")):
        name, _, number = part.partition("=")
        labels = tuple(name.strip().split("+"))
        if labels not in PUBLISHED_SHARES:
            known = ", ".join("+".join(labels) for labels in PUBLISHED_SHARES)
            raise ValueError(f"shares holds {name.strip()!r}; give some of {known}")
        if not number.strip().replace(".", "", 1).isdecimal() or float(number) <= 0:
            raise ValueError(f"shares holds {part.strip()!r}; write a number above 0 behind =")
        if labels in shares:
            raise ValueError(f"shares holds {name.strip()!r} twice; name it once")
        shares[labels] = float(number)
    return shares or PUBLISHED_SHARES


def deal(shares: Mapping[tuple[str, ...], float], count: int) -> list[tuple[str, ...]]:
    """``count`` combinations, each as often as ``shares`` say, as near as whole numbers allow (largest remainders)."""
    total = sum(shares.values())
    exact = {labels: count * share / total for labels, share in shares.items()}
    counts = {labels: int(value) for labels, value in exact.items()}
    for labels in sorted(exact, key=lambda key: counts[key] - exact[key])[: count - sum(counts.values())]:
        counts[labels] += 1
    return [labels for labels, number in counts.items() for _ in range(number)]


def distort(image: Image.Image, labels: Sequence[str], rng: Random) -> tuple[Image.Image, list[str]]:
    """RGB ``image`` spoiled by ``labels``, and the lines of code that repair ``img``, an OpenCV image.

    Labels apply last to first, so that repairs apply first to last. ``crop`` and ``none`` change nothing here.

    Raises:
        ValueError: a label is unknown.
    """
    lines: list[str] = []
    for label in reversed(labels):
        if label in _DISTORTIONS:
            image, undo = _DISTORTIONS[label](image, rng)
            lines = [*undo, *lines]
        elif label not in ("crop", "none"):
            raise ValueError(f"labels holds {label!r}; give some of {', '.join([*_DISTORTIONS, 'crop', 'none'])}")
    return image, lines


def crop_lines(box: Box) -> list[str]:
    """The lines of code that cut ``box`` out of ``img``, an OpenCV image."""
    return [
        "height, width = img.shape[:2]",
        f"x1, y1, x2, y2 = {list(box)}",
        "img = img[y1 * height // 1000 : y2 * height // 1000, x1 * width // 1000 : x2 * width // 1000]",
    ]


def cut(image: Image.Image, box: Box) -> Image.Image:
    """The pixels of ``box``, as ``crop_lines`` cuts them."""
    x1, y1, x2, y2 = box
    width, height = image.size
    return image.crop((x1 * width // 1000, y1 * height // 1000, x2 * width // 1000, y2 * height // 1000))


def side_by_side(image: Image.Image, other: Image.Image, rng: Random) -> tuple[Image.Image, Box]:
    """``image`` with ``other``, made as large, on one of its four sides; the box of ``image``."""
    width, height = image.size
    upright, first = rng.random() < 0.5, rng.random() < 0.5
    both = Image.new("RGB", (width, 2 * height) if upright else (2 * width, height))
    places = [(0, 0), (0, height) if upright else (width, 0)]
    own, others = places if first else reversed(places)
    both.paste(image, own)
    both.paste(other.resize(image.size, Image.Resampling.BICUBIC), others)
    low, high = (0, 500) if first else (500, 1000)
    return both, (0, low, 1000, high) if upright else (low, 0, high, 1000)


def repair_block(lines: Sequence[str]) -> str:
    """The ```python block around ``lines``: reads the tool's input file, writes its output file."""
    imports = ["import cv2", *(["import numpy as np"] if any("np." in line for line in lines) else [])]
    body = [f"img = cv2.imread('{INPUT_NAME}')", *lines, f"cv2.imwrite('{OUTPUT_NAME}', img)"]
    return "```python\n" + "\n".join([*imports, *body]) + "\n```"


def why_not_repaired(
    labels: Sequence[str], spoiled: Image.Image, clean: Image.Image, repaired: Image.Image
) -> str | None:
    """What is wrong with ``repaired``, an image that the code tool returned for ``spoiled``; None if it will do.

    ``clean`` is what a perfect repair gives. With one of ``MIN_GAIN_DB`` in ``labels``, ``repaired`` has to be closer
    to it than ``spoiled`` turned upright, as it is and as code that does nothing would leave it (JPEG alone takes some
    noise away); otherwise it has to be as close as two JPEG files allow (``JPEG_LEEWAY_DB``).
    """
    if repaired.size != clean.size:
        return f"the repair is {repaired.width}x{repaired.height}, the original {clean.width}x{clean.height}"
    reached = psnr_db(repaired, clean)
    gains = [MIN_GAIN_DB[label] for label in labels if label in MIN_GAIN_DB]
    if gains:
        idle = _upright(spoiled, labels)
        before, what = max(psnr_db(image, clean) for image in (idle, _through_tool_files(idle))), "the spoiled image"
        if before == inf:
            return f"{' and '.join(labels)} cannot be seen in it"
        needed = before + max(gains)
    else:
        before, what = psnr_db(_through_tool_files(clean), clean), "the original as JPEG"
        needed = before - JPEG_LEEWAY_DB
    if reached >= needed:
        return None
    return f"PSNR of the repair is {reached:.1f} dB, of {what} {before:.1f} dB; at least {needed:.1f} dB are needed"


def psnr_db(one: Image.Image, other: Image.Image) -> float:
    """Peak signal-to-noise ratio of two RGB images of one size, in dB; infinite for equal ones."""
    difference = np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    error = float(np.mean(np.square(difference)))
    return 10 * log10(255**2 / error) if error else inf


def _rotate90(image: Image.Image, rng: Random) -> tuple[Image.Image, list[str]]:
    turned = image.transpose(Image.Transpose.ROTATE_270)  # Pillow counts counter-clockwise
    return turned, ["img = cv2.rotate(img, cv2.ROTATE_90_COUNTERCLOCKWISE)"]


def _rotate180(image: Image.Image, rng: Random) -> tuple[Image.Image, list[str]]:
    return image.transpose(Image.Transpose.ROTATE_180), ["img = cv2.rotate(img, cv2.ROTATE_180)"]


def _darken(image: Image.Image, rng: Random) -> tuple[Image.Image, list[str]]:
    gain = rng.uniform(0.20, 0.40)
    return _by_table(image, np.arange(256) * gain), [f"img = cv2.convertScaleAbs(img, alpha={1 / gain:.2f})"]


def _overexpose(image: Image.Image, rng: Random) -> tuple[Image.Image, list[str]]:
    lift, power = round(rng.uniform(0.20, 0.30), 2), round(rng.uniform(0.45, 0.65), 2)
    undo = [
        f"values = np.clip((np.arange(256) / 255 - {lift}) / {round(1 - lift, 2)}, 0, 1) ** {1 / power:.2f}",
        "img = cv2.LUT(img, np.round(255 * values).astype(np.uint8))",
    ]
    return _by_table(image, 255 * (lift + (1 - lift) * (np.arange(256) / 255) ** power)), undo


def _blur(image: Image.Image, rng: Random) -> tuple[Image.Image, list[str]]:
    kernel = rng.randrange(7, 16, 2)
    undo = [
        f"soft = cv2.GaussianBlur(img, ({kernel}, {kernel}), 0)",
        "img = cv2.addWeighted(img, 2, soft, -1, 0)",  # raises every frequency, none above what it was
    ]
    return image.filter(ImageFilter.GaussianBlur(0.15 * kernel + 0.35)), undo


def _add_noise(image: Image.Image, rng: Random) -> tuple[Image.Image, list[str]]:
    shape = (image.height, image.width, 3)
    deviation = rng.uniform(20, 45)
    noise = np.random.default_rng(rng.getrandbits(64)).normal(0, deviation, shape)
    pixels = np.clip(np.rint(np.asarray(image) + noise), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels), [f"img = cv2.bilateralFilter(img, 7, {3 * deviation:.0f}, 2)"]  # keeps thin letters


_DISTORTIONS: Mapping[str, Callable[[Image.Image, Random], tuple[Image.Image, list[str]]]] = {
    "rotation90": _rotate90,
    "rotation180": _rotate180,
    "dark": _darken,
    "overexposure": _overexpose,
    "blur": _blur,
    "noise": _add_noise,
}


def _by_table(image: Image.Image, values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(values).astype(np.uint8)[np.asarray(image)])


def _upright(image: Image.Image, labels: Sequence[str]) -> Image.Image:
    if "rotation90" in labels:
        return image.transpose(Image.Transpose.ROTATE_90)
    return image.transpose(Image.Transpose.ROTATE_180) if "rotation180" in labels else image


def _through_tool_files(image: Image.Image) -> Image.Image:
    """``image`` after the file that the code reads and the one that ``cv2.imwrite`` leaves."""
    written = io.BytesIO()
    decode_image(encode_jpeg(image)).save(written, format="JPEG", quality=95, subsampling="4:2:0")
    return decode_image(written.getvalue())
