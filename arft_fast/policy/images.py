"""Images as the model reads them: each distinct image is preprocessed once for the engine, all turns and the update."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedImage:
    """One image after the processor."""

    pixel_values: Tensor
    """[patches, C * temporal_patch * patch * patch] float32, on the CPU."""
    grid_thw: tuple[int, int, int]
    """Patches in time, height and width."""
    tokens: int
    """Placeholder ids it takes in the text: patches after the spatial merge."""
    key: str
    """SHA-256 of size and pixels: equal images share their features and their cache entries."""
    image: Image | None = None
    """What it was made of: an engine behind a network is sent this."""


class ImageEncoder:
    """The model's own image processor with a small cache by content."""

    def __init__(self, processor: Any, *, capacity: int = 512) -> None:
        self.processor = processor
        self._capacity = capacity
        self._cache: OrderedDict[str, EncodedImage] = OrderedDict()

    def encode(self, image: Image) -> EncodedImage:
        """The encoded form of an RGB image."""
        key = hashlib.sha256(f"{image.mode}{image.size}".encode() + image.tobytes()).hexdigest()
        if (known := self._cache.get(key)) is not None:
            self._cache.move_to_end(key)
            return known
        batch = self.processor(images=[image], return_tensors="pt")
        t, h, w = (int(v) for v in batch["image_grid_thw"][0])
        encoded = EncodedImage(
            pixel_values=batch["pixel_values"].to(torch.float32),
            grid_thw=(t, h, w),
            tokens=t * h * w // self.processor.merge_size**2,
            key=key,
            image=image,
        )
        self._cache[key] = encoded
        if len(self._cache) > self._capacity:
            self._cache.popitem(last=False)
        return encoded
