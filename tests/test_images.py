"""Images from outside are checked before they are decoded."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from arft_fast.tools.images import ImageRejected, decode_image, encode_jpeg


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def noise(width: int = 23, height: int = 17) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds almost nothing."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(("format", "options"), [("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True})])
def test_lossless_formats_keep_every_pixel(format: str, options: dict[str, object]) -> None:
    image = noise()
    assert decode_image(encoded(image, format, **options)).tobytes() == image.tobytes()


def test_a_jpeg_round_trip_stays_close() -> None:
    image = Image.linear_gradient("L").convert("RGB")
    back = decode_image(encode_jpeg(image))
    assert back.size == image.size
    assert np.abs(np.asarray(back, dtype=int) - np.asarray(image, dtype=int)).max() <= 4


def test_thin_coloured_lines_survive_jpeg() -> None:
    image = Image.new("RGB", (64, 64), "white")
    for x in range(0, 64, 4):
        image.paste((255, 0, 0), (x, 0, x + 1, 64))
    kept = np.asarray(decode_image(encode_jpeg(image)), dtype=int)[:, ::4]
    assert np.abs(kept - [255, 0, 0]).mean() < 12, "chroma was subsampled"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
def test_every_png_mode_becomes_rgb(mode: str) -> None:
    image = decode_image(encoded(Image.new(mode, (5, 4)), "PNG"))
    assert (image.mode, image.size) == ("RGB", (5, 4))


@pytest.mark.parametrize("size", [(4001, 4000), (30_000, 30_000), (2_000_000_000, 2)])
def test_a_bomb_is_refused_by_its_header(size: tuple[int, int]) -> None:
    with pytest.raises(ImageRejected, match="16000000 pixels"):
        decode_image(png_header(*size))


def test_the_pixel_budget_is_inclusive() -> None:
    data = encoded(noise(20, 10), "PNG")
    assert decode_image(data, max_pixels=200).size == (20, 10)
    with pytest.raises(ImageRejected, match="20x10, more than 199 pixels"):
        decode_image(data, max_pixels=199)


@pytest.mark.parametrize("format", ["GIF", "TIFF", "PPM", "ICO"])
def test_formats_off_the_list_are_refused(format: str) -> None:
    with pytest.raises(ImageRejected, match="not a readable PNG, JPEG, WEBP, BMP image"):
        decode_image(encoded(noise(32, 32), format))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP"])
def test_truncated_data_is_refused(format: str) -> None:
    data = encoded(noise(64, 64), format)
    with pytest.raises(ImageRejected):
        decode_image(data[: len(data) * 2 // 3])


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_an_animation_is_refused(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    with pytest.raises(ImageRejected, match="several frames"):
        decode_image(encoded(frames[0], format, save_all=True, append_images=frames[1:]))


def test_empty_data_is_refused() -> None:
    with pytest.raises(ImageRejected, match="0 bytes"):
        decode_image(b"")


def test_exif_does_not_turn_the_image() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to show"
    image = decode_image(encoded(noise(20, 10), "JPEG", exif=exif))
    assert image.size == (20, 10)


def test_metadata_is_dropped_both_ways() -> None:
    data = encoded(noise(), "JPEG", comment=b"gold answer", exif=Image.Exif(), icc_profile=b"profile")
    image = decode_image(data)
    assert image.info == {}
    with Image.open(io.BytesIO(data)) as carrier:
        assert b"gold answer" not in encode_jpeg(carrier)


def test_quality_out_of_range_is_named() -> None:
    with pytest.raises(ValueError, match=r"quality must be in 1\.\.95, got 100"):
        encode_jpeg(noise(), quality=100)


@settings(max_examples=150, deadline=None)
@given(
    format=st.sampled_from(["PNG", "JPEG", "WEBP", "BMP"]),
    flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=8),
    tail=st.binary(max_size=16),
)
def test_corrupt_bytes_decode_or_are_rejected_and_nothing_else(
    format: str, flips: list[tuple[int, int]], tail: bytes
) -> None:
    data = bytearray(encoded(noise(), format)) + tail
    for position, value in flips:
        data[position % len(data)] = value
    try:
        image = decode_image(bytes(data), max_pixels=1_000_000)
    except ImageRejected as rejected:
        assert "\n" not in str(rejected)
    else:
        assert image.mode == "RGB" and image.width * image.height <= 1_000_000
