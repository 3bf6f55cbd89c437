"""What the fake computes: prompts as SGLang expands them, samples, with weights and kept embeddings of its own."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from arft_fast.policy.batch import rope_positions
from arft_fast.policy.images import EncodedImage, ImageEncoder
from arft_fast.policy.model import Policy
from arft_fast.policy.vision import embed, image_features


def shallow(policy: Policy) -> Policy:
    """The same policy with one text layer: as good for what is tested here, and three times as fast."""
    text = policy.model.model.language_model
    text.layers = text.layers[:1]
    config = policy.model.config.get_text_config()
    config.num_hidden_layers, config.layer_types = 1, config.layer_types[:1]
    return policy


class Refused(ValueError):
    """SGLang's ValueError of a bad request: 400 over HTTP."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    ids: list[int]
    keys: list[Any]
    """What the radix cache compares: an image's placeholders are its hash."""
    images: list[EncodedImage]
    hashes: list[str]


class FakeModel:
    """A copy of a policy, made now. ``vision_cache``: see ``FakeSglang``."""

    def __init__(self, source: Policy, vision_cache: bool) -> None:
        self.policy = replace(source.frozen_copy(), images=ImageEncoder(source.images.processor))
        self._vision_cache = vision_cache
        self._features: dict[str, Tensor] = {}
        self._random = torch.Generator().manual_seed(0)

    def prompt(self, order: Mapping[str, Any], retokenises: bool) -> Prompt:
        """What SGLang makes of a request; it tokenises the text anew when it miscounts placeholders or is told to."""
        ids, chat = list(order["input_ids"]), self.policy.chat
        images, processed = self._images(order.get("image_data") or [])
        count = ids.count(chat.image_token_id)
        miscounts = count != (sum(image.tokens for image in images) if processed else len(images))
        if miscounts or retokenises:  # SGLang logs a warning, no more
            ids = self.policy.tokenizer.encode(self.policy.tokenizer.decode(ids), add_special_tokens=False)
        hashes = order.get("mm_hashes") or []
        if len(hashes) != len(images):
            hashes = [f"{hash_feature(image.pixel_values):x}" for image in images]
        expanded: list[int] = []
        keys: list[Any] = []
        left = list(zip(images, hashes, strict=True))
        for token in ids:
            run = 1
            if token == chat.image_token_id and left and not processed:
                image, name = left.pop(0)
                run = image.tokens
            elif token == chat.image_token_id and left:
                image, name = left[0]
                if keys.count(name) + 1 == image.tokens:
                    left.pop(0)
            is_image = token == chat.image_token_id
            expanded += [token] * run
            keys += [name if is_image and images else token] * run
        return Prompt(ids=expanded, keys=keys, images=images, hashes=list(hashes))

    def _images(self, data: Sequence[Any]) -> tuple[list[EncodedImage], bool]:
        """Images of a request, and whether they came preprocessed (then as one dict for all of them)."""
        if data and isinstance(data[0], Mapping):
            if len(data) != 1 or data[0]["format"] != "processor_output":
                raise Refused("preprocessed images come as one dict of format processor_output")
            grids = [tuple(int(v) for v in grid) for grid in data[0]["image_grid_thw"]]
            merge = self.policy.images.processor.merge_size**2
            parts = data[0]["pixel_values"].split([t * h * w for t, h, w in grids])
            return [
                EncodedImage(pixel_values=part, grid_thw=(t, h, w), tokens=t * h * w // merge, key=str(part.sum()))
                for part, (t, h, w) in zip(parts, grids, strict=True)
            ], True
        images = []
        for url in data:
            kind, _, content = url.partition(",")
            if kind != "data:image/png;base64":
                raise Refused(f"cannot load image {url[:40]}")
            images.append(self.policy.images.encode(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB")))
        return images, False

    def image_features(self, image: EncodedImage, name: str) -> Tensor:
        if name in self._features:
            return self._features[name]
        with torch.no_grad():
            features = image_features(self.policy.model, [image])[image.key]
        if self._vision_cache:
            self._features[name] = features
        return features

    @torch.no_grad()
    def sample(
        self, prompt: Prompt, features: list[Tensor], sampled: list[int], params: Mapping[str, Any]
    ) -> tuple[float, int, None]:
        ids = np.asarray(prompt.ids + sampled, dtype=np.int64)
        positions = rope_positions(self.policy.model, ids, prompt.images)
        inputs = embed(self.policy.model, torch.from_numpy(ids)[None], features)
        hidden = self.policy.language_model(**inputs, position_ids=positions[:, None], use_cache=False)
        logits = self.policy.head(hidden.last_hidden_state[0, -1]).float()
        for token, value in (params.get("logit_bias") or {}).items():
            logits[int(token)] += value
        temperature = params.get("temperature", 1.0)
        logprobs = torch.log_softmax(logits / (temperature or 1.0), -1)
        weights = logprobs.exp()
        if temperature == 0:
            return float(logprobs.max()), int(logprobs.argmax()), None
        if params.get("top_k", -1) > 0:
            weights[weights < weights.topk(params["top_k"]).values[-1]] = 0
        token = int(torch.multinomial(weights, 1, generator=self._random))
        return float(logprobs[token]), token, None

    def finish(self, sampled: list[int], params: Mapping[str, Any]) -> dict[str, Any]:
        if sampled[-1] in (params.get("stop_token_ids") or []):
            return {"type": "stop", "matched": sampled[-1]}
        text = self.policy.tokenizer.decode(sampled[-16:])
        if stop := next((stop for stop in params.get("stop") or [] if stop in text), None):
            return {"type": "stop", "matched": stop}
        return {"type": "length", "length": len(sampled)}

    @torch.no_grad()
    def load(self, named: Sequence[tuple[str, Tensor]]) -> None:
        """Take weights by checkpoint names.

        Raises:
            KeyError: a name is another one, such as those of transformers 5 (model.visual.*).
        """
        own = self.policy.model.state_dict()
        for name, tensor in named:
            ours = f"model.{name}" if name.startswith("visual.") else name.replace("model.", "model.language_model.", 1)
            own[ours].copy_(tensor)


def hash_feature(feature: Tensor) -> int:
    """By content, as SGLang's: what it finds in its caches must not depend on who computed it."""
    return int.from_bytes(sha256(feature.numpy().tobytes()).digest()[:8])
