"""What an engine is: token ids in, token ids out, with the log-probs of what was sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from arft_fast.policy.images import EncodedImage


class EngineError(RuntimeError):
    """The engine cannot go on. The text names what failed and what to do; nothing is retried above the engine."""


class EngineDied(EngineError):
    """A process or a server of the engine is gone."""


class PromptMismatch(EngineError):
    """The engine computed other ids than it was sent: what it sampled belongs to another prompt."""


class WeightUpdateError(EngineError):
    """New weights did not arrive whole, or what older ones computed could not be dropped."""


class EngineBusy(EngineError):
    """Requests were still running when none may be; the text names them."""


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
    """Wall time from the call to the result, ``queued_s`` included."""
    queued_s: float = 0.0
    """Wall time before anything was computed for the request, as far as the engine knows it."""


class Engine(Protocol):
    """Generates turns. Calls may overlap freely; each is one turn of one trajectory.

    A step goes: ``generate`` many times, ``sleep``, the update, ``load_weights``. Cancelling a call frees what it held.
    """

    async def generate(
        self, token_ids: Sequence[int], images: Sequence[EncodedImage], sampling: Sampling, *, group: str = ""
    ) -> Generation:
        """Continue ``token_ids`` (images expanded, one placeholder id per merged patch) by one turn.

        Args:
            group: calls with the same name share a prompt: an engine lets the first one lead, so that the prompt is
                computed once, and keeps all of them where its cache is.

        Raises:
            EngineError: see its subclasses.
        """
        ...

    async def sleep(self) -> None:
        """The update is next: give back the memory that it could use. Nothing may be running.

        Raises:
            EngineBusy: something is.
        """
        ...

    async def load_weights(self, version: int) -> None:
        """Wake, take the policy's current weights and forget everything that was computed with older ones.

        Raises:
            EngineError: see its subclasses.
        """
        ...

    async def close(self) -> None:
        """Release everything, what runs included. Processes that the engine did not start are left alone."""
        ...
