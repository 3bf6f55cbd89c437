"""The Triton row kernel: one program a row, the row read twice, the gradient left in its place.

First pass: softmax statistics of all ids but the token's own, which joins at the end: ``1 - p_t`` is then a sum of
small terms, never a difference of near equals. Each lane keeps its own running maximum and sums (the online softmax of
arXiv 1805.02867), so that no lane waits for another before the end of the row. Second pass: the gradient.

A reduced logit ``z`` is ``x + bias``, or its tanh under a softcap, and ``y = k z``. ``p`` is proportional to 2^d with
``d = k log2(e) (z - base)``: the difference comes first, so that large logits lose no digits to the factor. ``d`` stops
at ``FLOOR``, where 2^d is 0 in every dtype, so that a forbidden id never makes ``0 * inf``.

A row is worked on in tiles [ROUNDS, LANES, VECTOR]: VECTOR neighbours are one 16-byte load of a thread, LANES are the
threads of a program, ROUNDS loads of a thread are under way at once. ``triton_rows`` launches it.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math

import triton
import triton.language as tl

from .triton_objective import coefficient_of_row

FLOOR = tl.constexpr(-1.0e4)
LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0; what 1 + x loses of a small x is divided out again (W. Kahan)."""
    near = 1.0 + x
    return tl.where(near == 1.0, x, tl.log(near) * (x / tl.where(near == 1.0, 1.0, near - 1.0)))


@triton.jit
def _transform(x, numbers, SOFTCAP: tl.constexpr):
    """The reduced logit z of ``x`` (bias added), and dz/dx in units of its value at x = 0."""
    if SOFTCAP:
        decay = tl.exp(-2.0 * tl.abs(x * numbers.squeeze))
        size = (1.0 - decay) / (1.0 + decay)
        z = tl.where(x < 0, -size, size)
        z = tl.where(x == float("-inf"), x, z)
        slope = 4.0 * decay / ((1.0 + decay) * (1.0 + decay))
    else:
        z = x
        slope = 1.0
    return z, slope


@triton.jit
def _load(logits, bias, cols, inside, STATISTICS: tl.constexpr):
    """Logits with bias [ROUNDS, LANES, VECTOR]; -inf outside."""
    x = tl.load(logits + cols, mask=inside, other=float("-inf")).to(STATISTICS)
    if bias is not None:
        places = bias + cols
        if cols.shape[2] > 1:
            places = tl.multiple_of(places, (1, 1, 16))  # what a load of VECTOR logits presumes
        x += tl.load(places, mask=inside, other=0.0).to(STATISTICS)
    return x


@triton.jit
def _exponent(z, base, bits):
    """d = bits (z - base), never below FLOOR; NaN stays."""
    return tl.maximum((z - base) * bits, FLOOR, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _lane_sum(values):
    """[ROUNDS, LANES, VECTOR] -> [LANES], within a thread."""
    return tl.sum(tl.sum(values, axis=2), axis=0)


@triton.jit
def _others(
    logits,
    bias,
    token,
    V,
    tile,
    tiles,
    numbers,
    bits,
    TILE: tl.constexpr,
    LANES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    STATISTICS: tl.constexpr,
):
    """Of each lane's ids but the token [LANES]: the largest z, and from there the sums of 2^d and of 2^d d."""
    top = tl.full((LANES,), float("-inf"), STATISTICS)
    rest = tl.zeros((LANES,), STATISTICS)
    moment = tl.zeros((LANES,), STATISTICS)
    # From the end of the row to its start: the second pass begins with what was read last and is still in the L2 cache.
    for i in range(0, tiles):
        start = (tiles - 1 - i) * TILE
        cols = start + tile
        z, _ = _transform(_load(logits, bias, cols, cols < V, STATISTICS), numbers, SOFTCAP)
        if (token >= start) & (token < start + TILE):
            z = tl.where(cols == token, float("-inf"), z)
        new_top = tl.maximum(top, tl.max(tl.max(z, axis=2), axis=0))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        d = _exponent(z, base[None, :, None], bits)
        p = tl.exp2(d)
        shift = _exponent(top, base, bits)
        decay = tl.exp2(shift)
        if ENTROPY:
            moment = decay * (moment + rest * shift) + _lane_sum(p * d)
        rest = decay * rest + _lane_sum(p)
        top = new_top
    return top, rest, moment


@triton.jit
def _write_gradient(
    gradient,
    logits,
    bias,
    V,
    tile,
    tiles,
    numbers,
    bits,
    base,
    constant,
    linear,
    TILE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY_BONUS: tl.constexpr,
    OVERLAID: tl.constexpr,
    STATISTICS: tl.constexpr,
):
    """gradient_j = 2^d_j (constant + linear d_j) dz_j/dx_j, right for every id but the token."""
    for i in range(0, tiles):
        cols = i * TILE + tile
        z, slope = _transform(_load(logits, bias, cols, cols < V, STATISTICS), numbers, SOFTCAP)
        d = _exponent(z, base, bits)
        value = tl.exp2(d) * (constant + linear * d if ENTROPY_BONUS else constant)
        if SOFTCAP:
            value *= slope
        if OVERLAID:
            # A narrower gradient at the same row start: tile i writes over bytes of tiles <= i / 2 alone, and once all
            # warps are here, all of them have read tile i and those before it. At equal width an element lies over
            # itself, and its store needs its own load: no barrier.
            tl.debug_barrier()
        tl.store(gradient + cols, value.to(gradient.dtype.element_ty), mask=cols < V)


# The alignment of the bias counts only beside aligned rows (see _load): alone it would pull the loads of unaligned rows
# into a layout that the stores cannot have.
@triton.jit(do_not_specialize_on_alignment=["bias"])
def rows_kernel(
    logits,  # [C, V], rows logits_stride apart
    token_ids,  # [C] int32 or int64
    bias,  # [V] or None
    gradient,  # [C, V], rows gradient_stride apart; may lie over logits
    logprobs,  # [C], as all that follow, in the dtype of the statistics
    entropy,
    coefficient,
    entropy_weight,
    vectors,  # rows.Vectors
    numbers,  # triton_rows.Numbers
    V,
    logits_stride,
    gradient_stride,
    MODE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SURROGATE: tl.constexpr,
    KL: tl.constexpr,
    KL_CORRECTION: tl.constexpr,
    SAMPLER: tl.constexpr,
    ENTROPY_BONUS: tl.constexpr,
    OVERLAID: tl.constexpr,
    ROUNDS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """``score``, ``policy`` and ``gradients`` of ``rows.py``, by MODE; grid (C,): axis 0 alone takes 2^31 - 1 rows."""
    TILE: tl.constexpr = ROUNDS * LANES * VECTOR
    ENTROPY: tl.constexpr = ENTROPY_BONUS or MODE != "gradients"
    STATISTICS: tl.constexpr = tl.float64 if logits.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64)  # a row of a chunk may start past 2^31 elements
    logits += row * logits_stride
    k = tl.full((), numbers.k, STATISTICS)
    bits = k * LOG2E

    token = tl.load(token_ids + row)
    known = (token >= 0) & (token < V)  # another id gives NaN instead of a stray read
    token = tl.where(known, token, 0).to(tl.int32)
    own_x = tl.load(logits + token, mask=known, other=float("nan")).to(STATISTICS)
    if bias is not None:
        own_x += tl.load(bias + token).to(STATISTICS)
    own_z, own_slope = _transform(own_x, numbers, SOFTCAP)

    rounds = tl.arange(0, ROUNDS)[:, None, None]
    lanes = tl.arange(0, LANES)[None, :, None]
    tile = (rounds * LANES + lanes) * VECTOR + tl.arange(0, VECTOR)[None, None, :]
    tiles = (V + TILE - 1) // TILE
    top, rest, moment = _others(
        *(logits, bias, token, V, tile, tiles, numbers, bits),
        *(TILE, LANES, SOFTCAP, ENTROPY, STATISTICS),
    )
    others = tl.max(top, axis=0)
    base = tl.maximum(others, own_z)
    shift = _exponent(top, base, bits)
    decay = tl.exp2(shift)
    own_d = _exponent(own_z, base, bits)
    own = tl.exp2(own_d)
    rest_sum = tl.sum(decay * rest, axis=0)
    total = own + rest_sum
    log_total = tl.where(own_z >= others, _log1p(rest_sum), tl.log(total))
    logp = (own_z - base) * k - log_total
    if ENTROPY:
        H = log_total - (tl.sum(decay * (moment + rest * shift), axis=0) + own * own_d) / total * LN2
    if MODE != "gradients":
        tl.store(logprobs + row, logp)
        tl.store(entropy + row, H)

    if MODE != "score":
        e = tl.full((), 0.0, STATISTICS)
        if MODE == "policy":
            g, scale = coefficient_of_row(logp, row, vectors, numbers, SURROGATE, KL, KL_CORRECTION, SAMPLER)
            tl.store(coefficient + row, g)
            if ENTROPY_BONUS:
                e = -scale * numbers.entropy_coef
        else:
            g = tl.load(coefficient + row)
            if ENTROPY_BONUS:
                e = tl.load(entropy_weight + row)
        gradient += row * gradient_stride
        if (g != 0) | (e != 0):
            unit = numbers.slope / total
            linear = -e * unit * LN2
            constant = -g * unit
            own_gradient = g * (rest_sum / total)
            if ENTROPY_BONUS:
                constant -= e * (H - log_total) * unit
                own_gradient -= e * (own / total) * (logp + H)
            own_gradient = tl.where(logp == float("-inf"), 0.0, own_gradient * own_slope * numbers.slope)
            _write_gradient(
                *(gradient, logits, bias, V, tile, tiles, numbers, bits, base, constant, linear),
                *(TILE, SOFTCAP, ENTROPY_BONUS, OVERLAID, STATISTICS),
            )
            tl.debug_barrier()  # the token's own place is written last
            tl.store(gradient + token, own_gradient.to(gradient.dtype.element_ty), mask=known)
        else:  # every warp has read the row: the sums above waited for all of them
            for i in range(0, tiles):
                cols = i * TILE + tile
                tl.store(gradient + cols, tl.zeros(cols.shape, gradient.dtype.element_ty), mask=cols < V)
