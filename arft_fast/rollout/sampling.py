"""Sampling from logits, row by row: a row's result depends on its own logits, settings and random number only.

And when a turn is over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from arft_fast.rollout.engine import Sampling


def sample(logits: Tensor, settings: Sequence[Sampling], uniforms: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Draw one id a row by inverting the cumulative distribution at ``uniforms``.

    Args:
        logits: [B, V] float32; -inf where an id is forbidden.
        settings: B sampling settings.
        uniforms: B numbers in [0, 1).

    Returns:
        ids [B] int64 and their log-probs [B] under the full distribution at the sampling temperature (at 1 for greedy
        rows): truncation by top-k or top-p changes what is drawn, not the log-prob that training compares with.
    """
    greedy = torch.tensor([s.temperature == 0 for s in settings], device=logits.device)
    temperature = torch.tensor([s.temperature or 1.0 for s in settings], device=logits.device)
    logprobs = torch.log_softmax(logits / temperature[:, None], dim=-1)
    probabilities = logprobs.exp()
    for row, s in enumerate(settings):
        if s.temperature and (s.top_k or s.top_p < 1):
            probabilities[row] = _truncate(probabilities[row], s.top_k, s.top_p)
    # Double precision: over 152k ids a float32 running sum loses the tail.
    cumulative = probabilities.double().cumsum(dim=-1)
    drawn = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)[:, None] * cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, drawn, right=True).squeeze(-1)
    ids = torch.where(greedy, logits.argmax(dim=-1), ids.clamp_(max=logits.shape[-1] - 1))
    return ids, logprobs.gather(-1, ids[:, None]).squeeze(-1)


class StopStrings:
    """Finds stop strings in what is being sampled, at little cost a token."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._text: dict[int, str] = {}

    def closes(self, sampled: Sequence[int], stop: Sequence[str]) -> bool:
        """Whether the text now ends in one of ``stop``, perhaps with more text behind it in the same token."""
        last = sampled[-1]
        if last not in self._text:
            self._text[last] = self._tokenizer.decode([last])
        if not any(string[-1] in self._text[last] for string in stop):
            return False
        tail = self._tokenizer.decode(sampled[-16:])
        return any(string in tail for string in stop)


def _truncate(probabilities: Tensor, top_k: int, top_p: float) -> Tensor:
    ordered, order = probabilities.sort(descending=True, stable=True)
    keep = ordered.cumsum(dim=-1) - ordered < top_p  # the first id is always kept
    if top_k:
        keep[top_k:] = False
    kept = torch.zeros_like(probabilities)
    kept[order[keep]] = ordered[keep]
    return kept
