"""Which request sits in which slot of the cache, and whose computed prefix it takes over."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from arft_fast.policy.images import EncodedImage
from arft_fast.rollout.engine import Generation, Sampling
from arft_fast.rollout.kv_cache import SlotCache


@dataclass(eq=False)
class Request:
    """One turn being generated."""

    token_ids: np.ndarray
    images: Sequence[EncodedImage]
    sampling: Sampling
    done: asyncio.Future[Generation]
    keys: np.ndarray
    """[T] int64: what each token is, an image's placeholders by its content; see ``policy.prefix_tree.merge_keys``."""
    positions: Tensor
    """[3, T]"""
    started: float = field(default_factory=time.perf_counter)
    admitted: float = 0.0
    """When it got its slot."""
    cached: int = 0
    sampled: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    random: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.sampling.seed)


@dataclass(eq=False)
class Slot:
    """One row of the cache."""

    index: int
    keys: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """[length] what is cached, as in ``Request``."""
    hidden: Tensor | None = None
    """Last hidden state [D] of what is cached, until something is decoded behind it: a prompt's samples start here."""
    request: Request | None = None
    next_position: int = 0
    used: int = 0


class Slots:
    """All slots and the requests that wait for one."""

    def __init__(self, count: int, cache: SlotCache) -> None:
        self.all = [Slot(index) for index in range(count)]
        self._cache = cache
        self._waiting: deque[Request] = deque()
        self.put_off = False
        """Whether a waiting request's prefix was being computed when it was last looked at."""
        self._clock = 0

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs. Requests that were cancelled give up their slots here."""
        for slot in self.all:
            if slot.request is not None and slot.request.done.done():
                slot.request = None
        return bool(self._waiting) or any(slot.request for slot in self.all)

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    def wait(self, request: Request) -> None:
        """Queue a request for the next round."""
        self._waiting.append(request)

    def requests(self) -> list[Request]:
        """All that wait or run."""
        return [*self._waiting, *(slot.request for slot in self.all if slot.request is not None)]

    def forget(self) -> None:
        """Empty everything: what is cached, what runs and what waits."""
        self._waiting.clear()
        for slot in self.all:
            slot.request, slot.keys, slot.hidden = None, slot.keys[:0], None

    def admit(self) -> list[Slot]:
        """Give waiting requests a slot each, with the longest prefix that any slot holds copied or continued in place.

        A request whose prefix is just being computed by another one waits a round: that is how G samples of one prompt
        cost one prefill.
        """
        admitted: list[Slot] = []
        put_off: list[Request] = []
        while self._waiting:
            free = [slot for slot in self.all if slot.request is None]
            if not free:
                break
            request = self._waiting.popleft()
            if request.done.done():
                continue
            shared = {slot.index: _common_prefix(slot.keys, request.keys) for slot in self.all}
            best = max(self.all, key=lambda slot: (shared[slot.index], slot.request is None, -slot.index))
            length = shared[best.index]
            coming = (_common_prefix(slot.request.keys, request.keys) for slot in admitted if slot.request)
            if max(coming, default=0) > length:
                put_off.append(request)
                continue
            if length == len(request.keys) and best.hidden is None:
                length -= 1  # the last token is computed again for its hidden state
            continues = best.request is None and length == len(best.keys)
            slot = best if continues else min(free, key=lambda slot: (len(slot.keys) > 0, slot.used, slot.index))
            if slot is not best:
                self._cache.copy_prefix(best.index, slot.index, length)
            slot.hidden = best.hidden if length == len(request.keys) else None
            slot.keys = request.keys[:length]
            slot.request, request.cached, request.admitted = request, length, time.perf_counter()
            slot.next_position = int(request.positions[:, -1].max()) + 1
            self._clock += 1
            slot.used = self._clock
            admitted.append(slot)
        self._waiting.extendleft(reversed(put_off))
        self.put_off = bool(put_off)
        return admitted


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the longest common prefix."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n
