"""`row_worst_case`: the worst case of each row of a table, a program for a block of rows.

What an entry keeps follows from the mass of p above it and beside it: no row is sorted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from drrlhf.kernels.launch import numbers, on
from drrlhf.kernels.numerics import expm1, log1p, number, put
from torch import Tensor

from drrlhf.conventions import MASS_ROUNDING, statistics_dtype

ENTRIES, WARPS = 512, 4  # of a table that a program takes
INFINITY = tl.constexpr(float("inf"))
MASS_ROUNDING = tl.constexpr(MASS_ROUNDING)


@triton.jit
def column(
    table_ptr, mask_ptr, nominal_ptr, row, k, n, width, MASKED: tl.constexpr, NOMINAL: tl.constexpr
):
    """Losses at (row, k) and the mass that they count with, in float64; 0 where they do not."""
    o = row * width + k
    there = (row < n) & (k < width)
    mass = tl.where(there, 1.0, 0.0).to(tl.float64)
    if NOMINAL:
        mass *= tl.load(nominal_ptr + k, mask=k < width, other=0.0).to(tl.float64)
    if MASKED:
        mass = tl.where(tl.load(mask_ptr + o, mask=there, other=0) != 0, mass, 0.0)
    l = tl.load(table_ptr + o, mask=there & (mass > 0), other=0.0).to(tl.float64)
    return l, mass


@triton.jit
def row_worst_case_kernel(
    table_ptr, mask_ptr, nominal_ptr, values_ptr, weights_ptr, n, width, parameters,
    KIND: tl.constexpr, MASKED: tl.constexpr, NOMINAL: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    parameter = number(parameters, 0)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row, k = rows[:, None], tl.arange(0, WIDTH)[None, :]
    l, mass = column(table_ptr, mask_ptr, nominal_ptr, row, k, n, width, MASKED, NOMINAL)
    total = tl.sum(mass, 1)[:, None]
    counts = mass > 0
    p = mass / tl.where(total > 0, total, 1.0)
    nan = tl.sum(tl.where((l != l) & counts, 1, 0), 1)[:, None] > 0
    x = l / parameter if KIND == "kl_temperature" else l
    rank = tl.where(counts, tl.where(x != x, INFINITY, x), -INFINITY)
    top = tl.max(rank, 1)[:, None]
    at_top = counts & (rank == top)
    if KIND == "kl_temperature":
        endless = (top == INFINITY) | (top == -INFINITY)
        below = tl.where(at_top | endless | ~counts, 0.0, rank - top)
        grown = tl.exp(below)
        grown = tl.where(counts & (at_top | ~endless), p * grown, 0.0)
        z = tl.sum(grown, 1)[:, None]
        q = grown / tl.where(z > 0, z, 1.0)
        # Where all are near the largest, log z is a small number of its own.
        less = tl.sum(tl.where(counts, p * expm1(below), 0.0), 1)[:, None]
        near = (z > 0.5) & ~endless
        log_z = tl.where(near, log1p(less), tl.log(tl.where(z > 0, z, 1.0)))
        value = parameter * (tl.where(total > 0, top, 0.0) + log_z)
        value = tl.sum(tl.where(k == 0, value, 0.0), 1)[:, None]
    else:
        q = p
        if KIND != "erm":
            kept = parameter if KIND == "cvar" else 1.0 - parameter
            above = tl.zeros([ROWS, WIDTH], tl.float64)
            beside = above
            for j in range(0, width):
                at_j = tl.full([1, 1], j, tl.int32)
                other, m = column(
                    table_ptr, mask_ptr, nominal_ptr, row, at_j, n, width, MASKED, NOMINAL
                )
                other = tl.where(other != other, INFINITY, other)
                above += tl.where(other > rank, m, 0.0)
                beside += tl.where((other == rank) & (m > 0), m, 0.0)
            mass_above = above / tl.where(total > 0, total, 1.0)
            held = tl.where(beside > 0, beside / tl.where(total > 0, total, 1.0), 1.0)
            # A part below the rounding of the masses is none: of an infinite loss 1e-17 would be
            # seen.
            part = kept - mass_above
            share = tl.where(held - part < MASS_ROUNDING, 1.0, part / held)
            share = tl.where(part < MASS_ROUNDING, 0.0, share)
            q = p * share
            filled = tl.sum(q, 1)[:, None]
            if KIND == "cvar":
                q = q / tl.where(filled > 0, filled, 1.0)
            else:
                best = tl.where(at_top, p, 0.0)
                largest = tl.sum(best, 1)[:, None]
                q += (1.0 - filled) * best / tl.where(largest > 0, largest, 1.0)
        # Not 0 times infinity where an entry has no weight.
        value = tl.sum(q * tl.where(q > 0, l, 0.0), 1)[:, None]
    value = tl.where(nan, float("nan"), value)
    value = tl.where(total > 0, value, 0.0)
    put(values_ptr + row, value, row < n)
    put(weights_ptr + row * width + k, q, (row < n) & (k < width))


def row_worst_case(
    table: Tensor, mask: Tensor | None, nominal: Tensor | None, kind: str, parameter: float
) -> tuple[Tensor, Tensor]:
    """As `drrlhf.reference.row_worst_case`."""
    n, width = table.shape
    dtype = statistics_dtype(table)
    values = torch.zeros(n, dtype=dtype, device=table.device)
    weights = torch.empty(n, width, dtype=dtype, device=table.device)
    if n and width:
        padded = triton.next_power_of_2(width)
        rows = max(1, ENTRIES // padded)
        with on(table):
            row_worst_case_kernel[(triton.cdiv(n, rows),)](
                table.contiguous(),
                None if mask is None else mask.contiguous(),
                None if nominal is None else nominal.contiguous(),
                values,
                weights,
                n,
                width,
                numbers(parameter),
                KIND=kind,
                MASKED=mask is not None,
                NOMINAL=nominal is not None,
                ROWS=rows,
                WIDTH=padded,
                num_warps=WARPS,
            )
    return values, weights
