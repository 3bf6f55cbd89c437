"""The row kernels of ``rows.py`` in Triton: what is launched, and how large. The kernel is in ``triton_rows_kernel``.

Nothing here waits for the device. Arguments are the caller's invariants: they are asserted, not explained.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import triton_support
from .rows import RowObjective, Transform, Vectors


class Tile(NamedTuple):
    """How a program works on a row: its warps, and what one of its threads loads of a tile."""

    warps: int
    rounds: int
    """Loads of a thread."""
    vector: int
    """Logits in a load."""


TILES = {2: Tile(32, 2, 8), 4: Tile(32, 4, 4), 8: Tile(8, 4, 2)}
"""By bytes of a logit; a load is 16 bytes. Plain numbers instead of a search at run time, which would let results vary.

32 warps fill a multiprocessor: as few rows as possible are under way, so that as much as possible of a row (594 KiB for
152,064 float32 logits) is still in the L2 cache for the second pass. Their 64 registers a thread are enough for 16
logits; float64 needs more registers and so fewer warps."""

UNALIGNED_ROUNDS = 8
"""Loads of a thread where rows do not start on 16 bytes and logits are loaded one by one."""

ALIGNMENT = 16
"""Triton counts a pointer of so many bytes, or a length or stride of so many elements, as aligned."""


def available(device: torch.device) -> bool:
    """Whether these kernels run on tensors of ``device``: a CUDA device, or a CPU under Triton's interpreter."""
    return triton_support.available(device)


class Numbers(NamedTuple):
    """The numbers of a transform and an objective; arguments of the kernel, so that a new value compiles nothing.

    Python floats reach a device as float32, whatever the dtype of the statistics.
    """

    squeeze: float
    """z = tanh(squeeze (x + bias)) under a softcap."""
    k: float
    """y = k z."""
    slope: float
    """dy/dx = slope dz/dx, with dz/dx in units of its value at 0."""
    ratio_low: float
    ratio_high: float
    delta: float
    dual_clip: float
    sapo_positive: float
    sapo_negative: float
    beta: float
    entropy_coef: float
    sampler_low: float
    sampler_high: float


def score(
    logits: Tensor, token_ids: Tensor, bias: Tensor | None, transform: Transform, logprobs: Tensor, entropy: Tensor
) -> None:
    """Write ``logprobs`` [C] and ``entropy`` [C] of ``logits`` [C, V]; see ``rows.py``."""
    _launch(logits, token_ids, bias, transform, "score", logprobs=logprobs, entropy=entropy)


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
    """Write ``logprobs``, ``entropy``, ``coefficient`` [C] and ``gradient`` [C, V]; see ``rows.py``."""
    assert objective.sampler == "none" or vectors.sampler is not None, "see rows.py"
    _launch(
        *(logits, token_ids, bias, transform, "policy"),
        objective=objective,
        vectors=vectors if objective.beta > 0 else vectors._replace(ref=None),
        logprobs=logprobs,
        entropy=entropy,
        coefficient=coefficient,
        gradient=gradient,
    )


def gradients(
    logits: Tensor,
    token_ids: Tensor,
    bias: Tensor | None,
    transform: Transform,
    coefficient: Tensor,
    entropy_weight: Tensor | None,
    gradient: Tensor,
) -> None:
    """Write ``gradient`` [C, V] for ``coefficient`` = d loss / d logp and ``entropy_weight`` = d loss / d H [C]."""
    _launch(
        *(logits, token_ids, bias, transform, "gradients"),
        coefficient=coefficient,
        entropy_weight=entropy_weight,
        gradient=gradient,
    )


@cache
def _kernel() -> Any:
    triton_support.require()
    from .triton_rows_kernel import rows_kernel

    return rows_kernel


def _launch(
    logits: Tensor,
    token_ids: Tensor,
    bias: Tensor | None,
    transform: Transform,
    mode: str,
    *,
    objective: RowObjective | None = None,
    vectors: Vectors | None = None,
    logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    coefficient: Tensor | None = None,
    entropy_weight: Tensor | None = None,
    gradient: Tensor | None = None,
) -> None:
    C, V = logits.shape
    if C == 0:
        return
    objective = objective or RowObjective()
    per_row = [v for v in (logprobs, entropy, coefficient, entropy_weight, *(vectors or ())) if v is not None]
    statistics = torch.promote_types(logits.dtype, torch.float32)
    assert all(v.shape == (C,) and v.is_contiguous() and v.dtype == statistics for v in per_row), "see rows.py"
    assert token_ids.is_contiguous() and (bias is None or bias.is_contiguous()), "read without strides"
    assert logits.stride(1) == 1 and (gradient is None or gradient.stride(1) == 1), "a row lies densely"
    assert transform.temperature > 0 and transform.softcap >= 0 and transform.logit_scale > 0, "logits keep their order"
    tile = _tile(logits, gradient, bias)
    with torch.cuda.device_of(logits):
        _kernel()[(C,)](
            *(logits, token_ids, bias, gradient, logprobs, entropy, coefficient, entropy_weight, vectors),
            *(_numbers(transform, objective), V, logits.stride(0), 0 if gradient is None else gradient.stride(0)),
            MODE=mode,
            SOFTCAP=transform.softcap > 0,
            SURROGATE=objective.surrogate,
            KL=objective.kl,
            KL_CORRECTION=objective.kl_correction,
            SAMPLER=objective.sampler,
            ENTROPY_BONUS=objective.entropy_coef != 0 or entropy_weight is not None,
            OVERLAID=_overlaid(logits, gradient),
            ROUNDS=tile.rounds,
            LANES=32 * tile.warps,
            VECTOR=tile.vector,
            num_warps=tile.warps,
        )


def _numbers(transform: Transform, objective: RowObjective) -> Numbers:
    slope = transform.logit_scale / transform.temperature
    if transform.softcap > 0:
        k, squeeze = transform.softcap / transform.temperature, transform.logit_scale / transform.softcap
    else:
        k, squeeze = slope, 0.0
    return Numbers(squeeze, k, slope, *(float(getattr(objective, name)) for name in Numbers._fields[3:]))


def _overlaid(logits: Tensor, gradient: Tensor | None) -> bool:
    """Whether a narrower gradient lies over the memory of the logits."""
    if gradient is None or gradient.data_ptr() != logits.data_ptr():
        return False
    narrow, wide = (t.stride(0) * t.dtype.itemsize for t in (gradient, logits))
    assert narrow == wide or len(logits) == 1, "a gradient over the logits has their row starts"
    assert gradient.dtype.itemsize <= logits.dtype.itemsize, "a gradient over the logits is no wider than they are"
    return gradient.dtype.itemsize < logits.dtype.itemsize


def _tile(logits: Tensor, gradient: Tensor | None, bias: Tensor | None) -> Tile:
    """The tile of these rows: fewer warps for a vocabulary that does not need them."""
    V, tile = logits.shape[1], TILES[logits.dtype.itemsize]
    pointers = [t.data_ptr() for t in (logits, gradient, bias) if t is not None]
    strides = [t.stride(0) for t in (logits, gradient) if t is not None]
    if any(n % ALIGNMENT for n in (V, *pointers, *strides)):
        tile = tile._replace(rounds=UNALIGNED_ROUNDS, vector=1)
    warps = tile.warps
    while warps > 1 and warps // 2 * 32 * tile.rounds * tile.vector >= V:
        warps //= 2
    return tile._replace(warps=warps)
