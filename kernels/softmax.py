"""Softmax statistics of logits that come tile by tile, and the gradient that follows from them.

z = softcap tanh(x scale / softcap) inverse_temperature, without the tanh where softcap is 0. Tiles
are (rows, columns) in float32. The label's own logit t is known before the first tile and stays out
of the sums, so that log p = -log1p(sum of the others relative to t) keeps the digits of a confident
model.
"""

from __future__ import annotations

import triton
import triton.language as tl
from drrlhf.kernels.numerics import LOG2E, expm1, log1p, rounded_product

LARGEST = tl.constexpr(3.4028234663852886e38)
# log2(e) minus the float32 next to it.
LOG2E_TAIL = tl.constexpr(1.92596298909109e-08)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def exp(x, PRECISE: tl.constexpr):
    """exp(x) in float32; PRECISE undoes the rounding of x log2(e), which float32 outputs show.

    Cheaper than `numerics.exp`, which keeps the last digit too: here memory sets the pace.
    """
    if PRECISE:
        x = tl.where(x < -200.0, -200.0, x)
        high = x * LOG2E
        low = tl.fma(x, LOG2E, -high) + x * LOG2E_TAIL
        e = tl.exp2(high)
        # An infinite exponent has no rounding to undo.
        e = tl.where(high < 128.0, tl.fma(e, low * LN2, e), e)
    else:
        e = tl.exp(x)
    return e


@triton.jit
def tangent(u):
    """tanh(u) and 1 - tanh(u)^2 in float32, neither as a difference of neighbours."""
    x = -2.0 * tl.abs(u)
    x = tl.where(x < -80.0, -80.0, x)
    e = tl.exp(x)
    # -expm1(x) / -x by its series where 1 - e would cancel.
    s = 1.0 / 39916800
    s = s * x + 1.0 / 3628800
    s = s * x + 1.0 / 362880
    s = s * x + 1.0 / 40320
    s = s * x + 1.0 / 5040
    s = s * x + 1.0 / 720
    s = s * x + 1.0 / 120
    s = s * x + 1.0 / 24
    s = s * x + 1.0 / 6
    s = s * x + 0.5
    small = x > -1.0
    quotient = tl.where(small, -(x + x * x * s), 2.0 * e) / (1.0 + e)
    value = tl.where(small, quotient, 1.0 - quotient)
    slope = tl.where(small, (1.0 - quotient) * (1.0 + quotient), quotient * (2.0 - quotient))
    return tl.where(u < 0, -value, value), slope


@triton.jit
def transform(x, scale, softcap, inverse_temperature, CAPPED: tl.constexpr):
    """z of raw logits x, and dz/dx up to the factor scale inverse_temperature."""
    z = x * scale
    slope = tl.zeros_like(z) + 1.0
    if CAPPED:
        value, slope = tangent(z / softcap)
        z = softcap * value
    return rounded_product(z, inverse_temperature), slope


@triton.jit
def first_reference(t):
    """Where exponents are measured from at first: the label's logit, if it is one."""
    return tl.where(t > -LARGEST, t, tl.where(t == t, -LARGEST, t))


@triton.jit
def fold(
    z, columns, labels, vocabulary, state,
    HEADROOM: tl.constexpr, EXTRAS: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """Counts a tile of z (rows, columns) in; returns the new state, (rows,) each: reference, total,
    shifted, squares, plain, before, after.

    Of the entries other than the label, relative to `reference`: total = sum e,
    e = exp(z - reference). Where EXTRAS are wanted also shifted = sum e (z - reference),
    squares = sum e^2, and the largest z before and after the label; plain = sum z of all entries.
    The reference moves where an entry lies more than HEADROOM above it.
    """
    reference, total, shifted, squares, plain, before, after = state
    inside = (columns < vocabulary)[None, :] & (columns >= 0)[None, :]
    others = inside & (columns[None, :] != labels[:, None])
    w = tl.where(others, z, float("-inf"))
    top = tl.max(w, 1)
    moved = tl.where(top > reference + HEADROOM, top, reference)
    e = exp(w - moved[:, None], PRECISE)
    factor = exp(reference - moved, PRECISE)
    if EXTRAS:
        # Nothing was summed while the reference was the least of all numbers.
        rise = tl.where(total > 0, moved - reference, 0.0)
        terms = tl.where(e > 0, e * (w - moved[:, None]), 0.0)
        # A rise beyond all numbers leaves nothing of what was summed.
        shifted = tl.where(factor > 0, factor * (shifted - rise * total), 0.0) + tl.sum(terms, 1)
        squares = factor * factor * squares + tl.sum(e * e, 1)
        plain += tl.sum(tl.where(inside, z, 0.0), 1)
        earlier = columns[None, :] < labels[:, None]
        before = tl.maximum(before, tl.max(tl.where(earlier, w, float("-inf")), 1))
        after = tl.maximum(after, tl.max(tl.where(earlier, float("-inf"), w), 1))
    total = factor * total + tl.sum(e, 1)
    return moved, total, shifted, squares, plain, before, after


@triton.jit
def finish(t, reference, total):
    """log p, log-sum-exp as two float32, and what the other statistics need, all (rows,).

    The last four, float64: the label's logit relative to the reference, log p, the log-sum-exp
    relative to the reference, and the sum that it is the log of.
    """
    t64, r = t.to(tl.float64), reference.to(tl.float64)
    u = t64 - r
    others = total.to(tl.float64)
    whole = others + tl.exp(u)
    # From the sum of the others alone where the label is not lost among them.
    near = u > -30.0
    beyond = log1p(others * tl.exp(tl.where(near, -u, 0.0)))
    log_whole = tl.log(whole)
    # What has no answer must stay seen: the label's logit infinite, or every logit -infinity.
    lost = (t != t) | (t > LARGEST) | ((t < -LARGEST) & (others == 0))
    below = tl.where(lost, float("nan"), tl.where(near, -beyond, u - log_whole))
    log_sum = tl.where(lost, float("nan"), tl.where(near, u + beyond, log_whole))
    logp = below.to(tl.float32)
    lse = (r + log_sum).to(tl.float32)
    tail = ((r - lse.to(tl.float64)) + log_sum).to(tl.float32)
    return logp, lse, tail, u, below, log_sum, whole


@triton.jit
def entropy_of(u, log_sum, whole, shifted):
    """log-sum-exp minus the mean of z, both relative to the reference."""
    own = tl.exp(u)
    return log_sum - (shifted.to(tl.float64) + tl.where(own > 0, own * u, 0.0)) / whole


@triton.jit
def log_sum_squares_of(u, log_sum, squares):
    """log sum p^2."""
    own, others = tl.exp(2 * u), squares.to(tl.float64)
    return tl.where(u == 0, log1p(others), tl.log(others + own)) - 2 * log_sum


@triton.jit
def gradient(
    z, is_label, a, b, logp, lse, tail, entropy,
    BY_LOGP: tl.constexpr, BY_ENTROPY: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """d (a log p[label] + b entropy) / dz of a tile (rows, columns); the rest is (rows,)."""
    log_p = (z - lse[:, None]) - tail[:, None]
    p = exp(log_p, PRECISE)
    d = tl.zeros(z.shape, tl.float32)
    if BY_LOGP:
        # The true class as -expm1(logp): 1 - p cancels exactly where tuned models live.
        own = -expm1(logp.to(tl.float64)).to(tl.float32)
        d = a[:, None] * tl.where(is_label, own[:, None], -p)
    if BY_ENTROPY:
        slope = tl.where(p > 0, p * (log_p + entropy[:, None]), 0.0)
        d -= b[:, None] * slope
    return d
