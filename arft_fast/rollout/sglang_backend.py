"""Where SGLang runs: inside this process (``sglang_process``) or behind URLs (``sglang_servers``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from arft_fast.policy.images import EncodedImage


@dataclass(frozen=True, kw_only=True)
class SglangRequest:
    """One turn in SGLang's terms (sglang 0.5.18 and later)."""

    rid: str
    """Unique: what ``abort`` takes."""
    input_ids: list[int]
    """One un-expanded placeholder an image."""
    expanded_ids: list[int]
    """What SGLang must make of ``input_ids``; its reply is compared with this."""
    images: Sequence[EncodedImage]
    sampling_params: dict[str, Any]
    group: str
    """Requests of a group belong on one replica."""
    cache_salt: str
    """Differs for each weight version: keys and values of older weights can never be hit."""


class SglangBackend(Protocol):
    """Carries requests and weights. Knows nothing of turns, groups' leaders or what a reply must look like."""

    async def generate(self, request: SglangRequest) -> dict[str, Any]:
        """SGLang's reply: ``output_ids``, ``meta_info`` and ``prompt_token_ids``, log-probs asked for.

        Raises:
            EngineDied: the process or server is gone.
            EngineError: it refused the request; the text holds its reason.
        """
        ...

    async def abort(self, rid: str) -> None:
        """End a request that nobody waits for any more. Unknown ids are no error."""
        ...

    async def sleep(self) -> None:
        """Give memory back; nothing runs."""
        ...

    async def load_weights(self, version: int) -> None:
        """Wake, take the policy's weights as ``version``, drop every cache; nothing runs.

        Raises:
            WeightUpdateError: some weight was refused, or a cache could not be flushed.
            EngineDied: the process or server is gone.
        """
        ...

    async def close(self) -> None:
        """Release everything that this object started, and nothing else."""
        ...
