"""The ready image tools: what each does to the pixels, and what a bad box or number gets for an answer."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from arft_fast.tools.bounds import MAX_ASPECT_RATIO, MAX_OUTPUT_PIXELS
from arft_fast.tools.image_tools import image_tools, pixel_box
from arft_fast.tools.tool import ToolResult

TOOLS = {tool.name: tool for tool in image_tools()}
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize((160, 120))


def call(name: str, arguments: dict[str, object], image: Image.Image | None = PICTURE) -> ToolResult:
    tools = {tool.name: tool for tool in image_tools()}  # new ones: a tool belongs to its event loop
    return asyncio.run(tools[name].call(json.dumps(arguments), image))


def done(name: str, image: Image.Image = PICTURE, **arguments: object) -> Image.Image:
    result = call(name, arguments, image)
    assert result.error is None
    (output,) = result.images
    assert result.text == f"The image is now {output.width}x{output.height} pixels."
    return output


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), dtype=float)


def distance(one: Image.Image, other: Image.Image) -> float:
    return float(np.abs(array(one) - array(other)).mean())


def test_every_tool_describes_itself_and_all_of_its_parameters() -> None:
    assert list(TOOLS) == ["crop", "zoom", "upscale", "rotate", "brightness", "contrast", "sharpen", "denoise"]
    for tool in TOOLS.values():
        function: dict = json.loads(json.dumps(tool.schemas[0]))["function"]
        assert len(function["description"]) > 20
        assert all("description" in each for each in function["parameters"]["properties"].values())
        assert "image" not in function["parameters"]["properties"]


def test_a_crop_is_the_part_that_the_box_names() -> None:
    output = done("crop", box=[250, 500, 750, 1000])
    assert output.tobytes() == PICTURE.crop((40, 60, 120, 120)).tobytes()


@given(
    box=st.tuples(*[st.floats(0, 1000)] * 4).filter(lambda b: b[0] < b[2] and b[1] < b[3]),
    width=st.integers(1, 3000),
    height=st.integers(1, 3000),
)
def test_a_box_keeps_every_pixel_that_it_touches_and_no_other(
    box: tuple[float, float, float, float], width: int, height: int
) -> None:
    left, top, right, bottom = pixel_box(box, width, height)
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    assert left <= box[0] * width / 1000 < left + 1 and right - 1 < box[2] * width / 1000 <= right
    assert top <= box[1] * height / 1000 < top + 1 and bottom - 1 < box[3] * height / 1000 <= bottom


@pytest.mark.parametrize(
    ("box", "error"),
    [
        ([0, 0, 1001, 10], "box: x2 (right) is 1001; give 0 to 1000 of the image's width or height"),
        ([0, -1, 10, 10], "box: y1 (top) is -1; give 0 to 1000 of the image's width or height"),
        ([500, 0, 500, 10], "box: x1 (left) is 500, x2 (right) is 500; x1 must be less than x2"),
        ([0, 20, 10, 10], "box: y1 (top) is 20, y2 (bottom) is 10; y1 must be less than y2"),
        ([0, 0, 10], "box must be a list of 4: a number, a number, a number, a number, got a list of 3"),
        ("0,0,1,1", "box must be a list of 4: a number, a number, a number, a number, got the text '0,0,1,1'"),
        ([0, 0, 1e-300, 1000], "image is 1x120, one side over 100 times the other; make it less narrow"),
    ],
)
@pytest.mark.parametrize("name", ["crop", "zoom"])
def test_a_bad_box_is_named(name: str, box: object, error: str) -> None:
    result = call(name, {"box": box, **({"factor": 1} if name == "zoom" else {})})
    assert (result.error, list(result.images)) == (error, [])


@pytest.mark.parametrize(
    ("name", "arguments", "error"),
    [
        ("zoom", {"box": [0, 0, 9, 9], "factor": 9}, "factor is 9; give 1 to 8"),
        ("upscale", {"factor": 0.5}, "factor is 0.5; give 1 to 8"),
        ("rotate", {"degrees": 361}, "degrees is 361; give -360 to 360"),
        ("brightness", {"factor": 0}, "factor is 0; give 0.05 to 20"),
        ("contrast", {"factor": -1}, "factor is -1; give 0.05 to 20"),
        ("sharpen", {"radius": 100}, "radius is 100; give 0.5 to 20"),
        ("denoise", {"strength": 4}, "strength is 4; give 1 to 3"),
        ("denoise", {"method": "mean"}, "method must be one of 'median', 'gaussian', got the text 'mean'"),
    ],
)
def test_a_number_out_of_range_is_named(name: str, arguments: dict[str, object], error: str) -> None:
    result = call(name, arguments)
    assert (result.error, list(result.images)) == (error, [])


@pytest.mark.parametrize("name", list(TOOLS))
def test_without_an_image_every_tool_says_so(name: str) -> None:
    box, factor = {"box": [0, 0, 9, 9]}, {"factor": 2}
    needed: dict[str, dict] = {
        "crop": box,
        "zoom": box,
        "rotate": {"degrees": 1},
        "brightness": factor,
        "contrast": factor,
    }
    assert call(name, needed.get(name, {}), None).error == "there is no image to work on"


def test_zoom_and_upscale_enlarge() -> None:
    assert done("zoom", box=[0, 0, 500, 500], factor=3).size == (240, 180)
    assert done("upscale", factor=1.5).size == (240, 180)


@pytest.mark.parametrize(("degrees", "turns"), [(90, 3), (180, 2), (270, 1), (-90, 1), (360, 0), (0, 0)])
def test_a_quarter_turn_is_clockwise_and_exact(degrees: int, turns: int) -> None:
    assert np.array_equal(array(done("rotate", degrees=degrees)), np.rot90(array(PICTURE), turns))


def test_any_other_turn_keeps_the_corners_and_goes_clockwise() -> None:
    flag = Image.new("RGB", (200, 100))
    flag.paste((255, 0, 0), (0, 0, 20, 20))  # the upper left corner
    output = array(done("rotate", flag, degrees=30))
    rows, columns = np.nonzero(output[..., 0] > 128)
    assert output.shape[:2] == pytest.approx((187, 223), abs=2)
    assert 380 < len(rows) < 420
    assert columns.mean() > 40 and rows.mean() < 30, "turned clockwise, the upper left corner moves right"


def test_brightness_and_contrast_scale_values() -> None:
    grey = Image.new("RGB", (8, 8), (40, 80, 100))
    assert done("brightness", grey, factor=2).getpixel((0, 0)) == (80, 160, 200)
    assert array(done("contrast", factor=2)).std() > array(PICTURE).std() > array(done("contrast", factor=0.5)).std()


@pytest.mark.parametrize(("method", "strength"), [("median", 1), ("median", 3), ("gaussian", 1)])
def test_denoising_brings_a_noisy_image_nearer_to_the_clean_one(method: str, strength: int) -> None:
    clean = Image.linear_gradient("L").convert("RGB")
    values, rng = array(clean), np.random.default_rng(0)
    if method == "median":
        values[rng.random(values.shape[:2]) < 0.1] = 255
    else:
        values += rng.normal(0, 20, values.shape)
    noisy = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    after = done("denoise", noisy, method=method, strength=strength)
    assert distance(after, clean) < 0.5 * distance(noisy, clean)


def test_sharpening_brings_a_blurred_edge_nearer_to_the_clean_one() -> None:
    clean = Image.new("RGB", (60, 60), (60, 60, 60))
    clean.paste((180, 180, 180), (30, 0, 60, 60))
    blurred = clean.filter(ImageFilter.GaussianBlur(2))
    assert distance(done("sharpen", blurred), clean) < 0.9 * distance(blurred, clean)


@pytest.mark.parametrize(
    ("name", "size", "arguments", "aspect"),
    [
        ("upscale", (1000, 700), {"factor": 8}, 10 / 7),
        ("zoom", (1000, 700), {"box": [0, 0, 1000, 1000], "factor": 8}, 10 / 7),
        ("rotate", (2000, 1999), {"degrees": 45}, 1.0),
        ("rotate", (3000, 2000), {"degrees": 90}, 2 / 3),
        ("crop", (3000, 2000), {"box": [0, 0, 1000, 900]}, 3000 / 1800),
        ("brightness", (3001, 1999), {"factor": 2}, 3001 / 1999),
    ],
)
def test_a_large_result_is_scaled_down_and_keeps_its_aspect(
    name: str, size: tuple[int, int], arguments: dict[str, object], aspect: float
) -> None:
    output = done(name, Image.new("RGB", size), **arguments)
    assert 0.98 * MAX_OUTPUT_PIXELS <= output.width * output.height <= MAX_OUTPUT_PIXELS
    assert output.width / output.height == pytest.approx(aspect, rel=2e-3)


@pytest.mark.parametrize(("size", "degrees"), [((1900, 1900), 17), ((1907, 2054), 17), ((19_000, 200), 45)])
def test_no_turn_rounds_beyond_the_largest_size(size: tuple[int, int], degrees: int) -> None:
    output = done("rotate", Image.new("L", size), degrees=degrees)
    assert 0.98 * MAX_OUTPUT_PIXELS <= output.width * output.height <= MAX_OUTPUT_PIXELS


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_an_image_of_any_mode_is_taken(mode: str) -> None:
    for name in ("upscale", "sharpen", "denoise"):
        assert done(name, PICTURE.convert(mode)).mode == "RGB"


def test_an_image_that_is_too_thin_is_refused() -> None:
    error = call("brightness", {"factor": 2}, Image.new("RGB", (MAX_ASPECT_RATIO + 1, 1))).error
    assert error == "image is 101x1, one side over 100 times the other; make it less narrow"
