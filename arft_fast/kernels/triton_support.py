"""Whether Triton kernels can run: Triton itself is optional, and imported only when a kernel is first needed."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch


@cache
def installed() -> bool:
    """Whether the ``triton`` package is there."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1, set before ``triton`` is first imported)."""
    if not installed():
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def available(device: torch.device) -> bool:
    """Whether a Triton kernel runs on tensors of ``device``: a CUDA device, or a CPU under the interpreter."""
    return installed() and (device.type == "cuda" or (device.type == "cpu" and interpreted()))


def require() -> None:
    """Say what is missing where Triton is.

    Raises:
        RuntimeError: ``triton`` is not installed.
    """
    if not installed():
        raise RuntimeError("the triton package is not installed; pip install triton, or pass impl='native'")
