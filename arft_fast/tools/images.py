"""Images from outside: checked before a pixel is decoded.

What a model's code wrote, or what came from a network, is untrusted. ``decode_image`` looks at the header only, refuses
what is not one plain still picture of a bounded size, and then decodes. Decisions that a reader should know:

- EXIF is ignored: the pixels come back as stored, an orientation tag does not turn them. Qwen2.5-VL's own processor
  sees stored pixels too, so coordinates mean the same on both sides.
- More than one frame (APNG, animated WebP, multi-picture JPEG) is refused: which frame was meant is unknown.
- An alpha channel is dropped, not blended.
- The returned image carries pixels only: no EXIF, profile, comment or file handle.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image, UnidentifiedImageError


class ImageRejected(ValueError):
    """The bytes are not an image that we take. The message is one line and may be shown to a model."""


def decode_image(
    data: bytes, *, max_pixels: int = 16_000_000, formats: Sequence[str] = ("PNG", "JPEG", "WEBP", "BMP")
) -> Image.Image:
    """Decode one still image to an RGB ``PIL.Image.Image`` that owns its pixels.

    Args:
        data: the whole encoded file.
        max_pixels: largest width x height, checked on the header, before memory for pixels is taken.
        formats: Pillow format names that may be tried; no other decoder sees the bytes.

    Raises:
        ImageRejected: unknown format, too many pixels, more than one frame, truncated or corrupt data.
    """
    if not data:
        raise ImageRejected("image is empty (0 bytes)")
    try:
        with Image.open(io.BytesIO(data), formats=tuple(formats)) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageRejected(f"image is {width}x{height}, more than {max_pixels} pixels; make it smaller")
            if getattr(image, "n_frames", 1) != 1:
                raise ImageRejected(f"{image.format} image has several frames; write a single still image")
            pixels = image.convert("RGB")
    except ImageRejected:
        raise
    except UnidentifiedImageError as error:
        raise ImageRejected(f"not a readable {', '.join(formats)} image") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageRejected(f"image has more than {max_pixels} pixels; make it smaller") from error
    except MemoryError:
        raise  # ours, not the image's: max_pixels bounds what a decode may take
    except Exception as error:  # decoders meet corrupt data with OSError, SyntaxError, struct.error, KeyError, ...
        raise ImageRejected(f"image is truncated or corrupt ({' '.join(str(error).split())[:120]})") from error
    pixels.info.clear()
    return pixels


def encode_jpeg(image: Image.Image, quality: int = 95) -> bytes:
    """JPEG bytes of ``image`` (as RGB), full colour resolution (4:4:4), without metadata.

    Args:
        image: any Pillow mode; alpha is dropped.
        quality: 1..95, as Pillow counts; chroma is not subsampled, so thin coloured lines and text survive.
    """
    if not 1 <= quality <= 95:
        raise ValueError(f"quality must be in 1..95, got {quality}")
    buffer = io.BytesIO()
    pixels = image.convert("RGB")
    pixels.info.clear()  # convert copies EXIF, profile and comment, and save would write the comment
    pixels.save(buffer, format="JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()
