"""Images as the model reads them: each distinct image is preprocessed once for the engine, all turns and the update."""

from __future__ import annotations

import asyncio
import hashlib
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

T = TypeVar("T")


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
    """The model's own image processor with a small cache by content.

    An image that was handed in is not drawn on afterwards: as long as it lives, its content is looked at once.
    """

    def __init__(self, processor: Any, *, capacity: int = 512) -> None:
        self.processor = processor
        self._capacity = capacity
        self._cache: OrderedDict[str, EncodedImage] = OrderedDict()
        self._keys: dict[int, str] = {}
        """Content keys by the identity of images that are alive."""
        self._coming: dict[Hashable, asyncio.Future[Any]] = {}
        """What threads are working on: a content key by an image's identity, an encoded image by its content key."""

    def encode(self, image: Image) -> EncodedImage:
        """The encoded form of an RGB image; computed here and now unless it was prepared or encoded before."""
        key = self._keys.get(id(image)) or self._name(image, _content_key(image))
        return self._keep(self._cache.get(key) or self._process(image, key))

    async def prepare(self, images: Sequence[Image]) -> None:
        """Encode in threads what is not known yet, equal images once: ``encode`` then answers at once."""
        for image in images:
            if (key := self._keys.get(id(image))) is None:
                key = await self._aside(id(image), partial(self._name, image), _content_key, image)
            if key not in self._cache:
                await self._aside(key, self._keep, self._process, image, key)

    async def _aside(self, name: Hashable, keep: Callable[[T], object], work: Callable[..., T], *arguments: Any) -> T:
        """``work(*arguments)`` in a thread, for all who ask for ``name`` until it is done and its result kept."""
        if (coming := self._coming.get(name)) is None:
            coming = self._coming[name] = asyncio.get_running_loop().run_in_executor(None, work, *arguments)

            def arrive(done: asyncio.Future[T]) -> None:  # in one go: who does not find it coming finds it kept
                del self._coming[name]
                if not done.cancelled() and done.exception() is None:
                    keep(done.result())

            coming.add_done_callback(arrive)
        return await asyncio.shield(coming)  # a thread cannot be stopped, and others may wait for it

    def _name(self, image: Image, key: str) -> str:
        if id(image) not in self._keys:
            self._keys[id(image)] = key
            # Whichever thread lets go of the image last takes its name away: a single operation of a dict.
            weakref.finalize(image, self._keys.pop, id(image), None).atexit = False
        return key

    def _keep(self, encoded: EncodedImage) -> EncodedImage:
        """Put it last in line for being dropped."""
        self._cache[encoded.key] = encoded
        self._cache.move_to_end(encoded.key)
        if len(self._cache) > self._capacity:
            self._cache.popitem(last=False)
        return encoded

    def _process(self, image: Image, key: str) -> EncodedImage:
        # NumPy and no torch: a worker thread that computes with torch would get an OpenMP team of its own.
        batch = self.processor(images=[image], return_tensors="np")
        t, h, w = (int(v) for v in batch["image_grid_thw"][0])
        return EncodedImage(
            pixel_values=torch.from_numpy(np.asarray(batch["pixel_values"], dtype=np.float32)),
            grid_thw=(t, h, w),
            tokens=t * h * w // self.processor.merge_size**2,
            key=key,
            image=image,
        )


def _content_key(image: Image) -> str:
    return hashlib.sha256(f"{image.mode}{image.size}".encode() + image.tobytes()).hexdigest()
