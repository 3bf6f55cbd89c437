"""The row kernels of the native libraries (``csrc/policy_rows.cpp``, ``.cu``); ``rows.py`` states what they compute.

CPU: float32 and float64, with the threads of ``torch.get_num_threads()``; the result does not depend on their number.
CUDA: float32, bfloat16 or float16 logits; the gradient in their dtype, or a narrower one for float32 logits.
"""

from __future__ import annotations

import ctypes
from dataclasses import asdict
from functools import cache

import torch
from torch import Tensor

from . import native
from .rows import KLS, SAMPLER_CORRECTIONS, SURROGATES, RowObjective, Transform, Vectors

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_ISAS = ("portable", "avx2", "avx512")
_FORCED_ISA = -1  # arft_isa: the best one; tests force others
_POINTER, _INT64, _INT32, _DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_double


class _Transform(ctypes.Structure):
    """``arft_transform``."""

    _fields_ = tuple((name, _DOUBLE) for name in ("temperature", "softcap", "logit_scale"))


class _RowObjective(ctypes.Structure):
    """``arft_row_objective``."""

    _fields_ = (
        *((name, _INT32) for name in ("surrogate", "kl", "kl_correction", "sampler")),
        *((name, _DOUBLE) for name in ("ratio_low", "ratio_high", "delta", "dual_clip")),
        *((name, _DOUBLE) for name in ("sapo_positive", "sapo_negative", "beta", "entropy_coef")),
        *((name, _DOUBLE) for name in ("sampler_low", "sampler_high")),
    )


class _Rows(ctypes.Structure):
    """``arft_rows``."""

    _fields_ = (
        *((name, _INT64) for name in ("rows", "vocabulary")),
        *((name, _POINTER) for name in ("logits", "gradient")),
        *((name, _INT64) for name in ("logits_stride", "gradient_stride")),
        *((name, _INT32) for name in ("logits_dtype", "gradient_dtype")),
        *((name, _POINTER) for name in ("token_ids", "bias", "advantage", "scale")),
        *((name, _POINTER) for name in ("old_logprobs", "ref_logprobs", "sampler_logprobs", "entropy_weight")),
        *((name, _POINTER) for name in ("logprobs", "entropy", "coefficient")),
    )


@cache
def available(device: torch.device) -> bool:
    """Whether a native library for tensors on ``device`` is built (and, for CUDA, torch finds a GPU)."""
    if device.type == "cuda":
        return native.cuda_library_path() is not None and torch.cuda.is_available()
    return device.type == "cpu" and native.available()


def isa() -> str:
    """The instruction set that the CPU kernels run in here: ``"portable"``, ``"avx2"`` or ``"avx512"``."""
    return _ISAS[native._library().arft_cpu_isa()]


def score(
    logits: Tensor,
    token_ids: Tensor,
    bias: Tensor | None,
    transform: Transform,
    logprobs: Tensor,
    entropy: Tensor,
) -> None:
    """Write ``logprobs`` [C] and ``entropy`` [C] of ``logits`` [C, V]."""
    rows = _rows(logits, token_ids, bias, None)
    _vectors(rows, logits, logprobs=logprobs, entropy=entropy)
    _call(rows, logits, transform, None)


def policy(
    logits: Tensor,
    token_ids: Tensor,
    bias: Tensor | None,
    transform: Transform,
    objective: RowObjective,
    vectors: Vectors,
    logprobs: Tensor,
    entropy: Tensor,
    coefficient: Tensor,
    gradient: Tensor,
) -> None:
    """Write ``logprobs``, ``entropy``, ``coefficient`` [C] and ``gradient`` [C, V], which may lie over ``logits``."""
    rows = _rows(logits, token_ids, bias, gradient)
    _vectors(rows, logits, logprobs=logprobs, entropy=entropy, coefficient=coefficient)
    _vectors(rows, logits, advantage=vectors.advantage, scale=vectors.scale)
    given = {"old_logprobs": vectors.old, "ref_logprobs": vectors.ref, "sampler_logprobs": vectors.sampler}
    _vectors(rows, logits, **{name: value for name, value in given.items() if value is not None})
    assert objective.sampler == "none" or vectors.sampler is not None, "the sampler correction needs vectors.sampler"
    _call(rows, logits, transform, objective)


def gradients(
    logits: Tensor,
    token_ids: Tensor,
    bias: Tensor | None,
    transform: Transform,
    coefficient: Tensor,
    entropy_weight: Tensor | None,
    gradient: Tensor,
) -> None:
    """Write ``gradient`` [C, V], which may lie over ``logits``, for given ``coefficient``, ``entropy_weight`` [C]."""
    rows = _rows(logits, token_ids, bias, gradient)
    _vectors(rows, logits, coefficient=coefficient)
    if entropy_weight is not None:
        _vectors(rows, logits, entropy_weight=entropy_weight)
    _call(rows, logits, transform, None)


def _statistics(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _rows(logits: Tensor, token_ids: Tensor, bias: Tensor | None, gradient: Tensor | None) -> _Rows:
    rows, vocabulary = logits.shape
    assert logits.dtype in _DTYPES, f"no kernel for {logits.dtype}"
    assert vocabulary == 1 or logits.stride(1) == 1, "a row of logits must be contiguous"
    assert token_ids.dtype == torch.int64 and token_ids.shape == (rows,) and token_ids.is_contiguous()
    assert token_ids.device == logits.device
    out = _Rows(
        rows=rows,
        vocabulary=vocabulary,
        logits=logits.data_ptr(),
        logits_stride=logits.stride(0),
        logits_dtype=_DTYPES[logits.dtype],
        token_ids=token_ids.data_ptr(),
    )
    if bias is not None:
        assert bias.dtype == _statistics(logits) and bias.shape == (vocabulary,) and bias.is_contiguous()
        assert bias.device == logits.device
        out.bias = bias.data_ptr()
    if gradient is not None:
        assert gradient.shape == logits.shape and gradient.device == logits.device
        assert vocabulary == 1 or gradient.stride(1) == 1, "a row of the gradient must be contiguous"
        assert gradient.dtype in _DTYPES, f"no kernel for {gradient.dtype}"
        pitches = [tensor.stride(0) * tensor.element_size() for tensor in (logits, gradient)]
        over = gradient.data_ptr() == logits.data_ptr() and rows > 1
        assert not over or pitches[0] == pitches[1], "a gradient over the logits needs the same row starts"
        assert gradient.element_size() <= logits.element_size(), "the gradient may not be wider than the logits"
        out.gradient = gradient.data_ptr()
        out.gradient_stride = gradient.stride(0)
        out.gradient_dtype = _DTYPES[gradient.dtype]
    return out


def _vectors(rows: _Rows, logits: Tensor, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        assert tensor.dtype == _statistics(logits), f"{name}: {tensor.dtype} beside {logits.dtype} logits"
        assert tensor.shape == logits.shape[:1] and tensor.is_contiguous() and tensor.device == logits.device, name
        setattr(rows, name, tensor.data_ptr())


def _call(rows: _Rows, logits: Tensor, transform: Transform, objective: RowObjective | None) -> None:
    """Run the kernel on the device of ``logits``.

    Raises:
        RuntimeError: the library is missing or stale, refuses the arguments (a caller's invariant is broken), or CUDA
            refuses the launch.
    """
    chosen = None if objective is None else ctypes.byref(_row_objective(objective))
    structs = ctypes.byref(rows), ctypes.byref(_Transform(*transform)), chosen
    if logits.is_cuda:
        library = native._cuda_library()
        stream = torch.cuda.current_stream(logits.device).cuda_stream
        status = library.arft_cuda_policy_rows(*structs, logits.device.index, stream)
        detail = f" ({library.arft_cuda_last_error().decode()})" if status == native.CUDA_ERROR else ""
    else:
        assert logits.device.type == "cpu", f"no native kernel for {logits.device}"
        status = native._library().arft_policy_rows(*structs, torch.get_num_threads(), _FORCED_ISA)
        detail = ""
    if status != 0:
        raise RuntimeError(f"arft_policy_rows: {native.error(status)}{detail}")


def _row_objective(objective: RowObjective) -> _RowObjective:
    numbers = {
        "surrogate": SURROGATES.index(objective.surrogate),
        "kl": KLS.index(objective.kl),
        "sampler": SAMPLER_CORRECTIONS.index(objective.sampler),
    }
    return _RowObjective(**(asdict(objective) | numbers))
