"""Elementary functions that Triton lacks, each to its own last digits."""

from __future__ import annotations

import triton
import triton.language as tl
from drrlhf.kernels.launch import INTERPRETED

ROUNDS = tl.constexpr(INTERPRETED)


@triton.jit
def log1p(x):
    """log(1 + x): what rounding 1 + x loses comes back as a factor (Kahan)."""
    u = 1 + x
    d = u - 1
    return tl.where(d == 0, x, tl.log(u) * (x / tl.where(d == 0, 1, d)))


@triton.jit
def expm1(x):
    """exp(x) - 1: what rounding exp(x) loses comes back as a factor (Kahan)."""
    u = tl.exp(x)
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
def narrow(x, ptr):
    """x in the dtype of ptr, float32 rounded to nearest: the interpreter truncates by itself."""
    if ROUNDS and ptr.dtype.element_ty == tl.bfloat16 and x.dtype == tl.float32:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + (((bits >> 16) & 1) + 0x7FFF)) & 0xFFFF0000
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(ptr.dtype.element_ty)


@triton.jit
def put(ptr, x, mask=None):
    """Stores float64 x in the dtype of ptr, by way of float32 where that is narrower."""
    if ptr.dtype.element_ty != tl.float64:
        x = x.to(tl.float32)
    tl.store(ptr, narrow(x, ptr), mask=mask)
