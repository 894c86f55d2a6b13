"""Elementary functions that Triton lacks, each to its own last digits."""

from __future__ import annotations

import triton
import triton.language as tl
from drrlhf.kernels.launch import INTERPRETED

ROUNDS = tl.constexpr(INTERPRETED)


LOG2E = tl.constexpr(1.4426950408889634)
# ln 2 in two float32: a multiple of the first by a small integer is exact.
LN2_HIGH, LN2_LOW = tl.constexpr(0.693359375), tl.constexpr(-2.12194440e-4)


@triton.jit
def rounded_product(x, y):
    """x y as a float32 of its own: a compiler that joins a product to the sum behind it would make
    of one logit several numbers, the label's here and the sum's there."""
    return tl.fma(x, y, 0.0)


@triton.jit
def exp(x):
    """exp(x); the hardware's in float32 is off by two units and what x log2(e) is rounded by."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        return exp_float32(x)


@triton.jit
def exp_float32(x):
    """exp(x), off by less than one unit.

    x = k ln 2 + r with |r| <= ln 2 / 2, and the series of exp(r) to r^7.
    """
    x = tl.where(x < -200.0, -200.0, x)  # 0 from there on, and a difference with -inf is none
    k = tl.floor(x * LOG2E + 0.5)
    r = tl.fma(k, -LN2_LOW, tl.fma(k, -LN2_HIGH, x))
    s = tl.fma(r, 1.0 / 5040, 1.0 / 720)
    s = tl.fma(s, r, 1.0 / 120)
    s = tl.fma(s, r, 1.0 / 24)
    s = tl.fma(s, r, 1.0 / 6)
    s = tl.fma(s, r, 0.5)
    e = tl.fma(r * r, s, r) + 1.0
    # In two factors: 2^128 is no float32, and exp(88.7) is.
    half = tl.floor(k * 0.5)
    e = e * tl.exp2(half) * tl.exp2(k - half)
    return tl.where(x > 89.0, float("inf"), e)


@triton.jit
def log1p(x):
    """log(1 + x): what rounding 1 + x loses comes back as a factor (Kahan)."""
    u = 1 + x
    d = u - 1
    return tl.where(d == 0, x, tl.log(u) * (x / tl.where(d == 0, 1, d)))


@triton.jit
def expm1(x):
    """exp(x) - 1: what rounding exp(x) loses comes back as a factor (Kahan)."""
    u = exp(x)
    d = u - 1
    plain = (d == 0) | (d == -1) | (d != d) | (u == float("inf"))
    log_u = tl.log(tl.where(plain, 2, u))
    return tl.where(d == 0, x, tl.where(plain, d, d * (x / log_u)))


@triton.jit
def softplus(x):
    """log(1 + exp(x)) = -log sigmoid(-x)."""
    return tl.where(x > 0, x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), of which neither tail cancels."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x > 0, 1.0, e) / (1.0 + e)


@triton.jit
def number(parameters, i: tl.constexpr):
    """The i-th of `launch.numbers`, in float64: an argument alone would arrive in float32."""
    return tl.zeros([], tl.float64) + parameters[i][0] + parameters[i][1]


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x in a dtype, float32 rounded to nearest: the interpreter truncates by itself."""
    if ROUNDS and dtype == tl.bfloat16 and x.dtype == tl.float32:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + (((bits >> 16) & 1) + 0x7FFF)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def narrow(x, ptr):
    """x in the dtype of ptr, see `rounded`."""
    return rounded(x, ptr.dtype.element_ty)


@triton.jit
def put(ptr, x, mask=None):
    """Stores float64 x in the dtype of ptr, by way of float32 where that is narrower."""
    if ptr.dtype.element_ty != tl.float64:
        x = x.to(tl.float32)
    tl.store(ptr, narrow(x, ptr), mask=mask)
