"""The append-only record of a trajectory's token ids: sampled ids stay as sampled, nothing is ever re-tokenised."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from arft_fast.policy.images import EncodedImage


class Ledger:
    """Ids, policy mask and log-probs that grow together; an image enters with its placeholders or not at all."""

    def __init__(self, *, image_token_id: int, max_tokens: int) -> None:
        self.token_ids: list[int] = []
        self.images: list[EncodedImage] = []
        self._mask: list[bool] = []
        self._logprobs: list[float] = []
        self._image_token_id = image_token_id
        self._max_tokens = max_tokens

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def room(self) -> int:
        """Tokens that may still be added."""
        return self._max_tokens - len(self)

    def add_context(self, token_ids: Sequence[int], images: Sequence[EncodedImage] = ()) -> bool:
        """Append what the policy reads but did not write. False, and nothing is appended, when it does not fit.

        Raises:
            ValueError: the ids do not hold one placeholder for each feature of ``images``.
        """
        placeholders = sum(token == self._image_token_id for token in token_ids)
        features = sum(image.tokens for image in images)
        if placeholders != features:
            raise ValueError(f"token_ids: {placeholders} image placeholders for {features} image features")
        if len(token_ids) > self.room:
            return False
        self.token_ids += token_ids
        self.images += images
        self._mask += [False] * len(token_ids)
        self._logprobs += [0.0] * len(token_ids)
        return True

    def add_sampled(self, token_ids: Sequence[int], logprobs: Sequence[float]) -> None:
        """Append what the policy wrote."""
        assert len(token_ids) == len(logprobs) <= self.room, "a turn is sampled within the room that is left"
        self.token_ids += token_ids
        self._mask += [True] * len(token_ids)
        self._logprobs += logprobs

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Token ids [T] int64, policy mask [T] bool, log-probs [T] float32."""
        return (
            np.array(self.token_ids, dtype=np.int64),
            np.array(self._mask, dtype=bool),
            np.array(self._logprobs, dtype=np.float32),
        )
