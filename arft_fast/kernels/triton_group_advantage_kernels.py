"""Kernels of ``triton_group_advantage``: one program for each group, of any size.

Dimension letters: B trajectories, P groups, K reward components, C columns (see ``group_advantage_reference``: the
combined reward alone, or one for each component), R rows of a block. K and C are padded to a power of two.

Sums run in float64 in a fixed order, without atomics: the same inputs give the same bits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _components(
    rewards, row, inside, K: tl.constexpr, K_PADDED: tl.constexpr, GATE_BY: tl.constexpr, THRESHOLD: tl.constexpr
):
    """Gated components [R, K] of some rows; NaN where they do not apply, and outside."""
    k = tl.arange(0, K_PADDED)
    here = inside[:, None] & (k < K)[None, :]
    start = rewards + row[:, None] * K
    value = tl.load(start + k[None, :], mask=here, other=float("nan"))
    if len(GATE_BY) > 0:
        for gated in tl.static_range(K):
            if GATE_BY[gated] >= 0:
                gate = tl.load(start + GATE_BY[gated], mask=inside[:, None], other=0.0)  # NaN is below nothing: open
                threshold = tl.full([1, 1], THRESHOLD[gated], value.dtype)  # a bare number would be rounded to float32
                shut = (gate < threshold) & (k == gated)[None, :] & (value == value)
                value = tl.where(shut, 0.0, value)
    return value


@triton.jit
def _combined(value, weight):
    """Weighted sum [R, 1] of components [R, K], rounded to their dtype and back; NaN for rows of only NaN."""
    applies = value == value
    total = tl.sum(tl.where(applies, value.to(tl.float64) * weight[None, :], 0.0), axis=1, keep_dims=True)
    any_applies = tl.max(applies.to(tl.int32), axis=1, keep_dims=True) > 0
    return tl.where(any_applies, total.to(value.dtype).to(tl.float64), float("nan"))


@triton.jit
def _merge(count, mean, squares, more, their_mean, their_squares):
    """Moments [C] of what came before and of the rows of a block [R, C], each of which stands for ``more`` values.

    ``squares`` are squared deviations from the mean. Equal values keep their exact value as mean and have 0 squares.
    """
    their_mean = tl.where(more > 0, their_mean, 0.0)
    low = tl.min(tl.where(more > 0, their_mean, float("inf")), axis=0)
    high = tl.max(tl.where(more > 0, their_mean, float("-inf")), axis=0)
    block = tl.sum(more, axis=0)
    block_mean = tl.where(low == high, low, tl.sum(more * their_mean, axis=0) / tl.maximum(block, 1.0))
    away = their_mean - block_mean[None, :]
    total = count + block
    share = block / tl.maximum(total, 1.0)
    step = block_mean - mean
    squares += tl.sum(their_squares + more * away * away, axis=0) + step * step * count * share
    return total, mean + step * share, squares


@triton.jit
def _add(count, mean, squares, value):
    """Moments [C] with the values of a block [R, C] that are not NaN."""
    present = (value == value).to(tl.float64)
    return _merge(count, mean, squares, present, value, tl.zeros_like(present))


@triton.jit
def _std(count, squares):
    return tl.sqrt(squares / tl.maximum(count - 1.0, 1.0))


@triton.jit
def _batch_moments(moments, P, C: tl.constexpr, C_PADDED: tl.constexpr, R: tl.constexpr):
    """Moments [C] of all groups, from ``moments`` [3, P, C]."""
    count = tl.zeros([C_PADDED], tl.float64)
    mean = tl.zeros([C_PADDED], tl.float64)
    squares = tl.zeros([C_PADDED], tl.float64)
    column = tl.arange(0, C_PADDED)
    for start in range(0, P, R):
        group = start + tl.arange(0, R)
        here = (group < P)[:, None] & (column < C)[None, :]
        at = moments + group[:, None].to(tl.int64) * C + column[None, :]
        plane = P.to(tl.int64) * C
        theirs = tl.load(at, mask=here, other=0.0)
        their_mean = tl.load(at + plane, mask=here, other=0.0)
        their_squares = tl.load(at + 2 * plane, mask=here, other=0.0)
        count, mean, squares = _merge(count, mean, squares, theirs, their_mean, their_squares)
    return count, mean, squares


@triton.jit
def _load_weight(weights, K: tl.constexpr, K_PADDED: tl.constexpr):
    k = tl.arange(0, K_PADDED)
    if weights is None:
        return tl.full([K_PADDED], 1.0, tl.float64)
    else:
        return tl.load(weights + k, mask=k < K, other=0.0).to(tl.float64)


@triton.jit(do_not_specialize=["P"])
def moments_kernel(
    rewards,  # [B, K]
    weights,  # [K] or None
    offsets,  # [P + 1]
    moments,  # [3, P, C] out: count, mean, squares
    P,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    C: tl.constexpr,
    C_PADDED: tl.constexpr,
    R: tl.constexpr,
    GATE_BY: tl.constexpr,
    THRESHOLD: tl.constexpr,
    SUM_FIRST: tl.constexpr,
):
    """Moments of the columns of one group."""
    group = tl.program_id(0).to(tl.int64)
    end = tl.load(offsets + group + 1)
    weight = _load_weight(weights, K, K_PADDED)
    count = tl.zeros([C_PADDED], tl.float64)
    mean = tl.zeros([C_PADDED], tl.float64)
    squares = tl.zeros([C_PADDED], tl.float64)
    for start in range(tl.load(offsets + group), end, R):
        row = start + tl.arange(0, R)
        value = _components(rewards, row, row < end, K, K_PADDED, GATE_BY, THRESHOLD)
        if SUM_FIRST:
            count, mean, squares = _add(count, mean, squares, _combined(value, weight))
        else:
            count, mean, squares = _add(count, mean, squares, value.to(tl.float64))
    column = tl.arange(0, C_PADDED)
    at = moments + group * C + column
    plane = P.to(tl.int64) * C
    tl.store(at, count, mask=column < C)
    tl.store(at + plane, mean, mask=column < C)
    tl.store(at + 2 * plane, squares, mask=column < C)


@triton.jit(do_not_specialize=["P"])
def advantage_kernel(
    rewards,  # [B, K]
    weights,  # [K] or None
    offsets,  # [P + 1]
    moments,  # [3, P, C] of the columns with SCALE "batch", else None
    advantages,  # [B] out; in float64 with NaN for rows that are left out when they are still to be whitened
    group_mean,  # [P] out
    group_std,  # [P] out
    no_signal,  # [P] out
    P,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    C: tl.constexpr,
    C_PADDED: tl.constexpr,
    R: tl.constexpr,
    GATE_BY: tl.constexpr,
    THRESHOLD: tl.constexpr,
    SUM_FIRST: tl.constexpr,
    CENTER: tl.constexpr,
    SCALE: tl.constexpr,
    WHITEN: tl.constexpr,
    STD_FLOOR: tl.constexpr,
    EPSILON: tl.constexpr,
):
    """Advantages of one group: its moments in one loop over its rows, then the rows again."""
    group = tl.program_id(0).to(tl.int64)
    begin = tl.load(offsets + group)
    end = tl.load(offsets + group + 1)
    weight = _load_weight(weights, K, K_PADDED)

    total = tl.zeros([1], tl.float64)  # of the combined reward
    total_mean = tl.zeros([1], tl.float64)
    total_squares = tl.zeros([1], tl.float64)
    count = tl.zeros([C_PADDED], tl.float64)  # of the columns
    mean = tl.zeros([C_PADDED], tl.float64)
    squares = tl.zeros([C_PADDED], tl.float64)
    for start in range(begin, end, R):
        row = start + tl.arange(0, R)
        value = _components(rewards, row, row < end, K, K_PADDED, GATE_BY, THRESHOLD)
        total, total_mean, total_squares = _add(total, total_mean, total_squares, _combined(value, weight))
        if not SUM_FIRST:
            count, mean, squares = _add(count, mean, squares, value.to(tl.float64))
    if SUM_FIRST:
        count, mean, squares = total, total_mean, total_squares
    one = tl.arange(0, 1)
    tl.store(group_mean + group + one, tl.where(total > 0, total_mean, float("nan")))
    tl.store(group_std + group + one, _std(total, total_squares))

    factor = tl.full([C_PADDED], 1.0, tl.float64)
    if CENTER == "leave_one_out":  # r - (n mean - r) / (n - 1) = n / (n - 1) (r - mean)
        factor = count / tl.maximum(count - 1.0, 1.0)
    divisor = tl.full([C_PADDED], 1.0, tl.float64)
    floor = tl.full([C_PADDED], STD_FLOOR, tl.float64)  # as above
    if SCALE == "group":
        divisor = tl.maximum(_std(count, squares), floor) + EPSILON
    elif SCALE == "batch":
        batch_count, _, batch_squares = _batch_moments(moments, P, C, C_PADDED, R)
        divisor = tl.maximum(_std(batch_count, batch_squares), floor) + EPSILON

    signal = tl.zeros([R], tl.int32)
    for start in range(begin, end, R):
        row = start + tl.arange(0, R)
        value = _components(rewards, row, row < end, K, K_PADDED, GATE_BY, THRESHOLD)
        combined = _combined(value, weight)
        if SUM_FIRST:
            column = combined
        else:
            column = value.to(tl.float64)
        centred = column
        if CENTER != "none":
            centred = (column - mean[None, :]) * factor[None, :]
        centred = centred / divisor[None, :]
        if not SUM_FIRST:
            centred = centred * weight[None, :]
        advantage = tl.sum(tl.where(column == column, centred, 0.0), axis=1)
        left_out = tl.sum((combined != combined).to(tl.int32), axis=1) > 0
        if WHITEN:
            tl.store(advantages + row, tl.where(left_out, float("nan"), advantage), mask=row < end)
        else:
            advantage = tl.where(left_out, 0.0, advantage).to(advantages.dtype.element_ty)
            tl.store(advantages + row, advantage, mask=row < end)
            signal |= (advantage != 0).to(tl.int32)
    if not WHITEN:
        tl.store(no_signal + group, (tl.max(signal, axis=0) == 0).to(tl.uint8))


@triton.jit(do_not_specialize=["P"])
def whiten_kernel(
    raw,  # [B] float64, NaN for rows that are left out
    offsets,  # [P + 1]
    moments,  # [3, P, 1] of raw
    advantages,  # [B] out
    no_signal,  # [P] out
    P,
    R: tl.constexpr,
    SUBTRACT: tl.constexpr,
    EPSILON: tl.constexpr,
):
    """Divide the advantages of one group by the std of all (+ epsilon), after subtracting their mean if asked to."""
    group = tl.program_id(0).to(tl.int64)
    end = tl.load(offsets + group + 1)
    count, mean, squares = _batch_moments(moments, P, 1, 1, R)
    divisor = _std(count, squares) + EPSILON
    signal = tl.zeros([R], tl.int32)
    for start in range(tl.load(offsets + group), end, R):
        row = start + tl.arange(0, R)
        value = tl.load(raw + row, mask=row < end, other=float("nan"))
        if SUBTRACT:
            value -= mean
        advantage = tl.where(value == value, value / divisor, 0.0).to(advantages.dtype.element_ty)
        tl.store(advantages + row, advantage, mask=row < end)
        signal |= (advantage != 0).to(tl.int32)
    tl.store(no_signal + group, (tl.max(signal, axis=0) == 0).to(tl.uint8))
