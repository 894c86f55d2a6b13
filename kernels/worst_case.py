"""Losses as they come to worst-case weights: nominal weights normalised, masked losses put aside,
groups stepped, and what has no answer kept visible. The searches: `drrlhf.kernels.dual_search`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from drrlhf.kernels.dual_search import INFINITY, trim_top, worst_case, zero


@triton.jit
def group_step(scratch_ptr, groups_ptr, before_ptr, after_ptr, masses_ptr, n, size, step_size,
               UPDATE: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One exponentiated-gradient step of the group weights, see `Group`: the value; q in scratch.

    before, after: weights (G,), which may be the same; masses: float64 scratch (2, G).
    """
    l_ptr, p_ptr, q_ptr = scratch_ptr, scratch_ptr + n, scratch_ptr + 3 * n
    for g in range(0, size):
        mass = tl.zeros([BLOCK], tl.float64)
        loss = mass
        for first in range(0, n, BLOCK):
            o = first + tl.arange(0, BLOCK)
            mine = tl.load(groups_ptr + o, mask=o < n, other=-1) == g
            p = tl.load(p_ptr + o, mask=o < n, other=0.0)
            mass += tl.where(mine, p, 0.0)
            loss += tl.where(mine, p * tl.load(l_ptr + o, mask=o < n, other=0.0), 0.0)
        tl.store(masses_ptr + g, tl.sum(mass, 0))
        tl.store(masses_ptr + size + g, tl.sum(loss, 0))
    tl.debug_barrier()
    o_g = tl.arange(0, SIZE)
    mass = tl.load(masses_ptr + o_g, mask=o_g < size, other=0.0)
    loss = tl.load(masses_ptr + size + o_g, mask=o_g < size, other=0.0)
    w = tl.load(before_ptr + o_g, mask=o_g < size, other=0.0)
    present = mass > 0
    held = tl.sum(tl.where(present, w, 0.0), 0)
    gain = tl.where(present, step_size * (loss / tl.where(present, mass, 1.0)), -INFINITY)
    best = tl.max(gain, 0)
    if UPDATE:
        grown = tl.where(present, w * tl.exp(gain - tl.where(present, best, 0.0)), 0.0)
        stepped = grown * (held / tl.sum(grown, 0))
        # A weight that underflowed to 0 could never come back.
        stepped = tl.where(stepped < 2.2250738585072014e-308, 2.2250738585072014e-308, stepped)
        w = tl.where(present, stepped, w)
    total = tl.sum(tl.where(present, w, 0.0), 0)
    tl.store(after_ptr + o_g, w, mask=o_g < size)
    tl.store(masses_ptr + size + o_g, w / total / tl.where(present, mass, 1.0), mask=o_g < size)
    tl.debug_barrier()
    value = tl.zeros([BLOCK], tl.float64)
    for first in range(0, n, BLOCK):
        o = first + tl.arange(0, BLOCK)
        group = tl.load(groups_ptr + o, mask=o < n, other=0)
        p = tl.load(p_ptr + o, mask=o < n, other=0.0)
        scale = tl.load(masses_ptr + size + group, mask=(o < n) & (p > 0), other=0.0)
        q = tl.where(p > 0, scale * p, 0.0)
        value += q * tl.load(l_ptr + o, mask=o < n, other=0.0)
        tl.store(q_ptr + o, q, mask=o < n)
    return tl.sum(value, 0)


@triton.jit
def nominal_at(nominal_ptr, o, n, WEIGHTED: tl.constexpr):
    """Nominal weights in float64, as they were given: 1 each if none were."""
    if WEIGHTED:
        return tl.load(nominal_ptr + o, mask=o < n, other=0.0).to(tl.float64)
    else:
        return tl.where(o < n, 1.0, 0.0).to(tl.float64)


@triton.jit
def solve(
    scratch_ptr, nominal_ptr, groups_ptr, before_ptr, after_ptr, masses_ptr, n, size, parameter,
    temperature, trim, KIND: tl.constexpr, NOMINAL: tl.constexpr, TRIMS: tl.constexpr,
    UPDATE: tl.constexpr, WEIGHTED: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    DEBUG: tl.constexpr,
):  # fmt: skip
    """Value and dual of the losses in the scratch, whatever they are; q in the scratch.

    What cannot be answered is NaN: a loss that is not finite, a nominal weight that is negative or
    not finite, an out-of-range group id. The group weights then stay as they were.
    """
    l_ptr, p_ptr, q_ptr = scratch_ptr, scratch_ptr + n, scratch_ptr + 3 * n
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, n, BLOCK):
        o = first + tl.arange(0, BLOCK)
        p = nominal_at(nominal_ptr, o, n, WEIGHTED)
        if WEIGHTED:
            legal = (p >= 0) & (p < INFINITY)
            if DEBUG:
                tl.device_assert(legal, "nominal: expected finite weights >= 0")
            p = tl.where(legal, p, float("nan"))
        total += p
    mass = tl.sum(total, 0)
    plain = tl.zeros([BLOCK], tl.float64)
    lost = plain
    for first in range(0, n, BLOCK):
        o = first + tl.arange(0, BLOCK)
        p = nominal_at(nominal_ptr, o, n, WEIGHTED)
        p = tl.where(mass > 0, p / tl.where(mass > 0, mass, 1.0), mass)
        l = tl.where(p == 0, 0.0, tl.load(l_ptr + o, mask=o < n, other=0.0))
        unknown = (tl.abs(l) < INFINITY) == 0  # NaN too
        if KIND == "group":
            group = tl.load(groups_ptr + o, mask=o < n, other=0)
            outside = (group < 0) | (group >= size)
            if DEBUG:
                tl.device_assert(outside == 0, "groups: outside [0, G)")
            unknown = unknown | outside
            l = tl.where(outside, float("nan"), l)
        lost += tl.where(unknown & (o < n), 1.0, 0.0)
        plain += p * l
        tl.store(p_ptr + o, p, mask=o < n)
        tl.store(l_ptr + o, l, mask=o < n)
    tl.debug_barrier()
    value, dual = tl.sum(plain, 0), zero()
    stepped = tl.sum(lost, 0) == 0
    if stepped & (mass > 0):
        if KIND == "group":
            if TRIMS:
                trim_top(l_ptr, p_ptr, n, trim, BLOCK)
            value = group_step(
                scratch_ptr, groups_ptr, before_ptr, after_ptr, masses_ptr, n, size,
                parameter, UPDATE, SIZE, BLOCK,
            )  # fmt: skip
        else:
            value, dual = worst_case(
                scratch_ptr, n, parameter, temperature, trim, KIND, NOMINAL, TRIMS, BLOCK
            )
    else:
        if KIND == "group":
            o_g = tl.arange(0, SIZE)
            w = tl.load(before_ptr + o_g, mask=o_g < size, other=0.0)
            tl.store(after_ptr + o_g, w, mask=o_g < size)
        value = tl.where(mass == 0, 0.0, tl.where(mass > 0, value, float("nan")))
        for first in range(0, n, BLOCK):
            o = first + tl.arange(0, BLOCK)
            p = tl.load(p_ptr + o, mask=o < n, other=0.0)
            tl.store(q_ptr + o, tl.where(p == 0, 0.0, float("nan")), mask=o < n)
    tl.debug_barrier()
    return value, dual
