"""From messages to token ids: the prompt by the model's own chat template, later turns by the template's own glue.

A rollout never renders a conversation twice: sampled ids are kept as they were sampled, and an observation is encoded
alone between the pieces that the template puts around a user turn. The pieces are read off the template by rendering a
probe, so that they are right for any template whose turns do not depend on each other; a test compares the ledger's
text with the template's rendering of the whole conversation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL.Image import Image

from arft_fast.policy.images import EncodedImage, ImageEncoder

_PROBE = "\x01probe{}\x01"


class ChatTemplate:
    """Renders prompts and observations as ids with images expanded to one placeholder per merged patch."""

    def __init__(self, tokenizer: Any, images: ImageEncoder, image_token: str = "<|image_pad|>") -> None:
        self._tokenizer = tokenizer
        self._images = images
        self._image_token = image_token
        self.image_token_id: int = tokenizer.convert_tokens_to_ids(image_token)
        self.end_of_turn_id: int = tokenizer.convert_tokens_to_ids("<|im_end|>")
        self._open, self._image, self._close = self._glue()

    def _glue(self) -> tuple[str, str, str]:
        """Text between an assistant turn and a user turn, of an image, and between a user turn and the next sample."""
        asked, said, seen = (_PROBE.format(k) for k in range(3))
        observation = [{"type": "image"}, {"type": "text", "text": seen}]
        messages: list[Mapping[str, Any]] = [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": said},
            {"role": "user", "content": observation},
        ]
        text = self._render(messages)
        between, close = text.split(said)[1].split(seen)
        start = between.index("<|vision_start|>")
        return between[:start], between[start:], close

    def _render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        text: str = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return text

    def prompt(
        self, messages: Sequence[Mapping[str, Any]], images: Sequence[Image]
    ) -> tuple[list[int], list[EncodedImage]]:
        """Ids of the prompt up to where the policy starts to write, and its encoded images.

        Raises:
            ValueError: the messages hold another number of image parts than there are images.
        """
        pieces = self._render(messages).split(self._image_token)
        if len(pieces) - 1 != len(images):
            raise ValueError(
                f"images: the messages hold {len(pieces) - 1} image placeholders but {len(images)} images were given; "
                f"give one image per image part and keep {self._image_token!r} out of the text"
            )
        encoded = [self._images.encode(image) for image in images]
        text = pieces[0]
        for piece, image in zip(pieces[1:], encoded, strict=True):
            text += self._image_token * image.tokens + piece
        return self._tokenizer.encode(text, add_special_tokens=False), encoded

    def observation(
        self, text: str, images: Sequence[Image], *, turn_is_closed: bool
    ) -> tuple[list[int], list[EncodedImage]]:
        """Ids from the end of the policy's turn to the start of its next one, and the observation's encoded images.

        Args:
            text: untrusted; special tokens inside it are encoded as plain text and never become one.
            turn_is_closed: the policy sampled its end-of-turn token itself, so the glue leaves it out.
        """
        encoded = [self._images.encode(image) for image in images]
        opening = self._open
        for image in encoded:
            opening += self._image.replace(self._image_token, self._image_token * image.tokens)
        ids = self._tokenizer.encode(opening, add_special_tokens=False)
        if turn_is_closed and ids[0] == self.end_of_turn_id:
            ids = ids[1:]
        return ids + self.plain(text) + self._tokenizer.encode(self._close, add_special_tokens=False), encoded

    def plain(self, text: str) -> list[int]:
        """Ids of untrusted text: no special token comes out of it, whatever it spells."""
        backend = self._tokenizer.backend_tokenizer
        backend.encode_special_tokens = True
        try:
            return list(backend.encode(text, add_special_tokens=False).ids)
        finally:
            backend.encode_special_tokens = False
