"""Slips of an imperfect teacher: what cold start imitates for a few steps, so that GRPO has something to remove."""

from __future__ import annotations

from random import Random


def slip_format(text: str, rng: Random, rate: float) -> str:
    """``text`` with its format spoiled with probability ``rate``: the thought is left out, open, or said twice.

    The action itself stays whole, so the episode goes on and only the format reward is lost.
    """
    if rng.random() >= rate:
        return text
    end = text.find("</think>") + len("</think>")
    thought, rest = text[:end], text[end:].lstrip()
    kind = rng.randrange(3)
    if kind == 0:
        return rest
    return thought.removesuffix("</think>") + rest if kind == 1 else thought + thought + rest
