"""Elementary functions that Triton lacks, each to its own last digits."""

from __future__ import annotations

import triton
import triton.language as tl


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
