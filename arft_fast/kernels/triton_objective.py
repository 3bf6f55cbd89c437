"""``RowObjective`` in Triton: the coefficient of a row from its log-probs, in scalars (see ``triton_rows_kernel``)."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from .rows import MAX_LOG_RATIO

CLAMP = tl.constexpr(MAX_LOG_RATIO)


@triton.jit
def _expm1(x):
    """exp(x) - 1 for |x| <= MAX_LOG_RATIO, what exp rounds away near 1 is divided out again (W. Kahan)."""
    near = tl.exp(x)
    return tl.where(near == 1.0, x, (near - 1.0) * (x / tl.where(near == 1.0, 1.0, tl.log(near))))


@triton.jit
def _bounded(x, low, high):
    """``x`` within two numbers of any type, in the dtype of ``x``."""
    return tl.minimum(tl.maximum(x, tl.full((), low, x.dtype)), tl.full((), high, x.dtype))


@triton.jit
def _surrogate_slope(ratio, moves, advantage, numbers, SURROGATE: tl.constexpr):
    """d surrogate / d logp; ``moves``: the log-ratio is within its clamp."""
    band = _bounded(ratio, numbers.ratio_low, numbers.ratio_high)
    if SURROGATE == "cispo":
        slope = band * advantage
    elif SURROGATE == "sapo":
        rise = ratio - 1.0
        steep = tl.where(advantage > 0, rise * numbers.sapo_positive, rise * numbers.sapo_negative)
        decay = tl.exp(-tl.abs(steep))  # s (1 - s) is even in its argument: no overflow on either side
        slope = tl.where(moves, 4.0 * decay / ((1.0 + decay) * (1.0 + decay)) * ratio * advantage, 0.0)
    else:
        free = tl.minimum(ratio, tl.full((), numbers.delta, ratio.dtype))
        chosen = tl.where(free * advantage <= band * advantage, free, band)
        too_bad = (advantage < 0) & (chosen * advantage < advantage * numbers.dual_clip)
        slope = tl.where(moves & (chosen == ratio) & (too_bad == 0), ratio * advantage, 0.0)
    return slope


@triton.jit
def _kl_slope(gap, ratio, moves, KL: tl.constexpr, KL_CORRECTION: tl.constexpr):
    """d KL / d logp for ``gap`` = ref - logp."""
    if KL == "k1":
        value = -gap
        slope = tl.full((), 1.0, gap.dtype)
    elif KL == "k2":
        value = 0.5 * gap * gap
        slope = -gap
    else:
        near = _bounded(gap, -CLAMP, CLAMP)
        rise = _expm1(near)
        value = rise - near
        slope = tl.where(near == gap, -rise, 0.0)
    if KL_CORRECTION:
        slope = ratio * (slope + tl.where(moves, value, 0.0))
    return slope


@triton.jit
def coefficient_of_row(
    logp,
    row,
    vectors,
    numbers,
    SURROGATE: tl.constexpr,
    KL: tl.constexpr,
    KL_CORRECTION: tl.constexpr,
    SAMPLER: tl.constexpr,
):
    """g = d loss / d logp of one row, and the row's scale."""
    advantage = tl.load(vectors.advantage + row)
    scale = tl.load(vectors.scale + row)
    if vectors.old is not None:
        log_ratio = logp - tl.load(vectors.old + row)
    else:
        log_ratio = tl.full((), 0.0, logp.dtype)
    moves = tl.abs(log_ratio) <= CLAMP
    ratio = tl.exp(_bounded(log_ratio, -CLAMP, CLAMP))
    slope = -_surrogate_slope(ratio, moves, advantage, numbers, SURROGATE)
    if SAMPLER != "none":
        weight = tl.exp(_bounded(logp - tl.load(vectors.sampler + row), -CLAMP, CLAMP))
        trusted = _bounded(weight, numbers.sampler_low, numbers.sampler_high)
        slope *= trusted if SAMPLER == "truncate" else tl.where(weight == trusted, weight, 0.0)
    if vectors.ref is not None:
        gap = tl.load(vectors.ref + row) - logp
        slope += _kl_slope(gap, ratio, moves, KL, KL_CORRECTION) * numbers.beta
    return tl.where(scale == 0, 0.0, scale * slope), scale  # a masked row may hold anything, NaN too
