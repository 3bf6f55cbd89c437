"""One thread for all tensor work of a run, so that the event loop is always free for tools, timers and signals.

One, because OpenMP keeps a team of workers for each thread that computes, and two teams would fight for the cores.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


class ComputeThread:
    """``await compute(function, ...)`` runs it on the thread; calls run one after the other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="compute", initializer=self._enter)

    def _enter(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # the current device is a thread's own

    async def __call__(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, lambda: function(*args, **kwargs))

    def close(self) -> None:
        self._executor.shutdown(wait=True)
