"""What an engine is: token ids in, token ids out, with the log-probs of what was sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from arft_fast.policy.images import EncodedImage


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one turn is sampled."""

    max_tokens: int
    temperature: float = 1.0
    """0 takes the most likely token."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens that holds this probability."""
    stop: tuple[str, ...] = ()
    """Stop behind any of these strings; the text keeps it."""
    seed: int = 0
    """The turn's own random stream: what is sampled does not depend on what else is being generated."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One generated turn."""

    token_ids: list[int]
    logprobs: list[float]
    """Log-prob of each id under the policy at the sampling temperature, before top-k and top-p."""
    finish: Literal["stop", "length"]
    cached_tokens: int
    """Tokens of the request whose keys and values were taken from the cache."""
    prefilled_tokens: int
    """Tokens of the request that had to be computed."""
    weight_version: int
    seconds: float


class Engine(Protocol):
    """Generates turns. Calls may overlap freely; each is one turn of one trajectory."""

    async def generate(
        self, token_ids: Sequence[int], images: Sequence[EncodedImage], sampling: Sampling
    ) -> Generation:
        """Continue ``token_ids`` (images expanded, one placeholder id per merged patch) by one turn."""
        ...

    def load_weights(self, version: int) -> None:
        """Take the policy's current weights and forget everything that was computed with older ones."""
        ...

    async def close(self) -> None: ...
