"""Which implementation runs: ``"triton"``, ``"native"`` or ``"reference"``."""

from __future__ import annotations

from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from . import checks, native_rows, triton_rows

Impl = Literal["auto", "triton", "native", "reference"]
Chosen = Literal["triton", "native", "reference"]
IMPLS: tuple[Impl, ...] = ("auto", "triton", "native", "reference")
_ROWS: dict[str, ModuleType] = {"triton": triton_rows, "native": native_rows}


def head_impl(hidden: Tensor, impl: Impl = "auto") -> Chosen:
    """Which implementation ``linear_logprob`` and ``policy_loss`` use for these hidden states.

    ``"auto"``: Triton on a CUDA device, the native library on a CPU; the other of the two where the first is missing,
    and the reference where both are.

    Raises:
        ValueError: ``impl`` is unknown.
        RuntimeError: ``impl`` names a back end that cannot run on this device, or is not installed or built.
    """
    checks.choice("impl", impl, IMPLS)
    return _resolve(str(hidden.device.type), impl)


@torch.compiler.assume_constant_result
def _resolve(device: str, impl: Impl) -> Chosen:
    if impl == "auto":
        order: tuple[Chosen, ...] = ("triton", "native") if device == "cuda" else ("native",)
        return next((name for name in order if _ROWS[name].available(torch.device(device))), "reference")
    if impl != "reference" and not _ROWS[impl].available(torch.device(device)):
        raise RuntimeError(f"impl: {impl!r} cannot run on {device} here ({_missing(impl)}); pass 'auto' or 'reference'")
    return impl


def _missing(impl: str) -> str:
    if impl == "triton":
        return "it needs a CUDA device and the triton package, or TRITON_INTERPRET=1 set before triton is imported"
    return "the native library for this device is not built: `pip install .` builds it, for CUDA where nvcc is found"


def row_kernels(chosen: Chosen) -> ModuleType:
    """The module that holds the row kernels (the functions of ``rows.py``) of a back end."""
    return _ROWS[chosen]
