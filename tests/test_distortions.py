"""Labels spoil an image, their code repairs it, and a bad repair is noticed."""

from __future__ import annotations

import asyncio
import io
from random import Random

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from arft_fast.tasks.distortions import (
    PUBLISHED_SHARES,
    crop_lines,
    cut,
    deal,
    distort,
    parse_shares,
    psnr_db,
    repair_block,
    side_by_side,
    why_not_repaired,
)
from arft_fast.tools.python_image_code import PythonImageCode
from arft_fast.tools.sandbox import Sandbox

pytest.importorskip("cv2")


def _page(width: int = 201, height: int = 133) -> Image.Image:
    """Letters and colour on paper, of odd width and height."""
    image = Image.new("RGB", (width, height), (250, 248, 240))
    pen = ImageDraw.Draw(image)
    pen.rectangle((10, 60, 90, 120), fill=(200, 40, 30))
    pen.ellipse((100, 50, 190, 125), fill=(30, 90, 180))
    for row in range(2):
        pen.text((10, 8 + 22 * row), f"LINE {row} OF TEXT", fill=(20, 20, 30), font=ImageFont.load_default(18))
    return image


def _run(blocks_and_images: list[tuple[str, Image.Image]]) -> list[Image.Image]:
    async def run() -> list[Image.Image]:
        tool = PythonImageCode(Sandbox(workers=1))
        try:
            results = [await tool.call(block, image) for block, image in blocks_and_images]
        finally:
            await tool.close()
        assert [result.error for result in results] == [None] * len(results)
        return [result.images[0] for result in results]

    return asyncio.run(run())


def test_the_code_of_every_combination_repairs_what_its_labels_spoiled() -> None:
    page = _page()
    combinations = [labels for labels in PUBLISHED_SHARES if labels not in (("crop",), ("none",))]
    spoiled = [distort(page, labels, Random(k)) for k, labels in enumerate(combinations)]
    repaired = _run([(repair_block(lines), image) for image, lines in spoiled])
    for labels, (image, _), result in zip(combinations, spoiled, repaired, strict=True):
        assert why_not_repaired(labels, image, page, result) is None, labels


def test_code_that_does_nothing_repairs_nothing() -> None:
    page = _page()
    combinations = [labels for labels in PUBLISHED_SHARES if labels not in (("crop",), ("none",))]
    spoiled = [distort(page, labels, Random(k))[0] for k, labels in enumerate(combinations)]
    untouched = _run([(repair_block([]), image) for image in spoiled])
    for labels, image, result in zip(combinations, spoiled, untouched, strict=True):
        assert why_not_repaired(labels, image, page, result) is not None, labels


@pytest.mark.parametrize("label", ["rotation90", "rotation180"])
def test_a_rotation_is_undone_to_the_pixel(label: str) -> None:
    page = _page()
    turned, lines = distort(page, [label], Random(0))
    png = io.BytesIO()
    turned.save(png, format="PNG")
    code = repair_block(lines).removeprefix("```python\n").removesuffix("```").replace(".jpg", ".png")

    async def run() -> bytes:
        sandbox = Sandbox(workers=1)
        try:
            result = await sandbox.run(code, {"path_to_input_image.png": png.getvalue()}, ["path_to_output_image.png"])
        finally:
            await sandbox.close()
        return result.files["path_to_output_image.png"]

    repaired = Image.open(io.BytesIO(asyncio.run(run())))
    assert repaired.tobytes() == page.tobytes()
    assert turned.tobytes() != page.tobytes()


def test_a_rotation_is_clockwise() -> None:
    image = Image.new("RGB", (3, 2))
    image.putpixel((0, 0), (255, 0, 0))
    turned, _ = distort(image, ["rotation90"], Random(0))
    assert turned.size == (2, 3) and turned.getpixel((1, 0)) == (255, 0, 0)


def test_a_rotation_off_by_one_pixel_is_not_exact() -> None:
    page = _page()
    turned, lines = distort(page, ["rotation180"], Random(0))
    [shifted] = _run([(repair_block([*lines, "import numpy as np", "img = np.roll(img, 1, axis=1)"]), turned)])
    assert "dB are needed" in str(why_not_repaired(["rotation180"], turned, page, shifted))


def test_the_wrong_way_round_is_noticed_by_its_size() -> None:
    page = _page()
    turned, _ = distort(page, ["rotation90"], Random(0))
    assert why_not_repaired(["rotation90"], turned, page, turned) == ("the repair is 133x201, the original 201x133")


@pytest.mark.parametrize("label", ["dark", "blur"])
def test_a_label_that_leaves_no_mark_is_not_repaired(label: str) -> None:
    black = Image.new("RGB", (64, 48))
    spoiled, lines = distort(black, [label], Random(0))
    assert why_not_repaired([label], spoiled, black, _run([(repair_block(lines), spoiled)])[0]) is not None


def test_a_crop_is_what_its_box_holds() -> None:
    page, box = _page(), (40, 430, 460, 930)
    [cropped] = _run([(repair_block(crop_lines(box)), page)])
    assert why_not_repaired(["crop"], page, cut(page, box), cropped) is None
    other = cut(page, (45, 430, 465, 930))
    assert other.size == cropped.size and why_not_repaired(["crop"], page, other, cropped) is not None


@pytest.mark.parametrize("seed", range(8))
def test_an_image_beside_another_is_in_its_box(seed: int) -> None:
    page, other = _page(), Image.new("RGB", (50, 70), (0, 255, 0))
    both, box = side_by_side(page, other, Random(seed))
    assert cut(both, box).tobytes() == page.tobytes()
    assert both.width * both.height == 2 * page.width * page.height


def test_the_same_seed_spoils_alike_and_another_does_not() -> None:
    labels = ("rotation90", "noise")
    first, again, other = (distort(_page(), labels, Random(seed)) for seed in (1, 1, 2))
    assert first[0].tobytes() == again[0].tobytes() and first[1] == again[1]
    assert first[0].tobytes() != other[0].tobytes()


def test_labels_come_off_in_the_order_in_which_they_are_named() -> None:
    _, lines = distort(_page(), ("rotation180", "blur"), Random(0))
    assert [line.split("(")[0] for line in lines] == [
        "img = cv2.rotate",
        "soft = cv2.GaussianBlur",
        "img = cv2.addWeighted",
    ]


def test_a_white_page_and_black_ink_both_suffer_from_overexposure() -> None:
    image = Image.fromarray(np.array([[[0, 0, 0], [255, 255, 255]]], dtype=np.uint8))
    spoiled, _ = distort(image, ["overexposure"], Random(0))
    black, white = np.asarray(spoiled)[0, :, 0]
    assert 50 <= black <= 77 and white == 255


def test_every_published_double_has_a_rotation() -> None:
    doubles = [labels for labels in PUBLISHED_SHARES if len(labels) == 2]
    assert len(doubles) == 8 and all(labels[0].startswith("rotation") for labels in doubles)


def test_the_published_shares_of_1200_are_the_published_counts() -> None:
    dealt = deal(PUBLISHED_SHARES, 1200)
    assert {labels: dealt.count(labels) for labels in PUBLISHED_SHARES} == {
        labels: 100 if len(labels) == 1 else 50 for labels in PUBLISHED_SHARES
    }


@pytest.mark.parametrize("count", [1, 7, 23, 100])
def test_shares_that_do_not_divide_are_dealt_in_full(count: int) -> None:
    dealt = deal(PUBLISHED_SHARES, count)
    assert len(dealt) == count
    assert all(abs(dealt.count(labels) - count * share / 24) < 1 for labels, share in PUBLISHED_SHARES.items())


def test_shares_are_read_as_written() -> None:
    assert parse_shares("dark=2, rotation90+blur=.5") == {("dark",): 2.0, ("rotation90", "blur"): 0.5}


@pytest.mark.parametrize(
    "text", ["darkness=1", "dark+blur=1", "dark=0", "dark=-1", "dark", "dark=nan", "=1", "dark=1,dark=2"]
)
def test_shares_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="shares holds"):
        parse_shares(text)


def test_an_unknown_label_is_refused() -> None:
    with pytest.raises(ValueError, match="labels holds 'sepia'"):
        distort(_page(), ["sepia"], Random(0))


def test_equal_images_have_no_noise_between_them() -> None:
    black, grey = (Image.new("RGB", (2, 2), (value,) * 3) for value in (0, 51))
    assert psnr_db(black, black) == float("inf")
    assert psnr_db(black, grey) == pytest.approx(13.979, abs=1e-3)  # 20 log10 5
