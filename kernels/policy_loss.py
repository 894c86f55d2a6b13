"""`policy_loss`: token log-probs to the clipped surrogate of each sequence. A program takes a
sequence: its tokens' slopes, and its sums. The backward multiplies the slopes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from drrlhf.kernels.launch import DEBUG, numbers, on, registers
from drrlhf.kernels.numerics import exp, expm1, number, put
from drrlhf.kernels.sequence_logprobs import TOKENS, WARPS, contiguous, limits
from torch import Tensor

from drrlhf.conventions import EXPONENT_LIMIT, SequenceStatistics, statistics_dtype

LIMIT = tl.constexpr(EXPONENT_LIMIT)
SMALL = tl.constexpr(0.34)  # below it the series of k3 has more digits than expm1(d) - d
REGISTERS = 176
ROWS = len(SequenceStatistics._fields)  # of the table of sequences


@triton.jit
def clipped_surrogate(log_ratio, advantage, low, high):
    """As in `drrlhf.reference`: -min(r A, clip(r) A), its derivative by log r, r, clipped low,
    clipped high, clamped."""
    over = tl.where(log_ratio > LIMIT, 1.0, 0.0)
    ratio = exp(tl.where(log_ratio > LIMIT, LIMIT, log_ratio))
    raised = tl.where(ratio < low, low, ratio)
    free, held = ratio * advantage, tl.where(raised > high, high, raised) * advantage
    low_clipped = tl.where(ratio < low, tl.where(advantage < 0, 1.0, 0.0), 0.0)
    high_clipped = tl.where(ratio > high, tl.where(advantage > 0, 1.0, 0.0), 0.0)
    slope = tl.where(low_clipped + high_clipped + over > 0, 0.0, -free)
    return -tl.where(free < held, free, held), slope, ratio, low_clipped, high_clipped, over


@triton.jit
def k3(difference):
    """exp(d) - d - 1, its derivative by log p = -d, and whether d was clamped."""
    over = tl.where(difference > LIMIT, 1.0, 0.0)
    d = tl.where(difference > LIMIT, LIMIT, difference)
    grown = expm1(d)
    s = 1.6059043836821613e-10 * d + 2.08767569878681e-09
    s = s * d + 2.505210838544172e-08
    s = s * d + 2.755731922398589e-07
    s = s * d + 2.7557319223985893e-06
    s = s * d + 2.48015873015873e-05
    s = s * d + 1.984126984126984e-04
    s = s * d + 1.388888888888889e-03
    s = s * d + 8.333333333333333e-03
    s = s * d + 4.1666666666666664e-02
    s = s * d + 1.6666666666666666e-01
    s = s * d + 0.5
    value = tl.where(tl.abs(d) < SMALL, d * d * s, grown - d)
    return value, tl.where(over > 0, 0.0, -grown), over


@triton.jit
def counted_at(mask_ptr, o, end, MASKED: tl.constexpr):
    """Which of the tokens o count."""
    counted = o < end
    if MASKED:
        counted = counted & (tl.load(mask_ptr + o, mask=counted, other=0) != 0)
    return counted


@triton.jit
def load(ptr, o, mask, DOUBLE: tl.constexpr):
    x = tl.load(ptr + o, mask=mask, other=0.0)
    return x.to(tl.float64) if DOUBLE else x.to(tl.float32)


@triton.jit
def log_ratio_at(logps_ptr, old_ptr, o, counted, OLD: tl.constexpr, DOUBLE: tl.constexpr):
    x = load(logps_ptr, o, counted, DOUBLE)
    return x - load(old_ptr, o, counted, DOUBLE) if OLD else tl.zeros_like(x)


@triton.jit
def times(kl_beta, x):
    """kl_beta x, and not 0 times infinity where nobody asked for the divergence."""
    return tl.where(kl_beta == 0, 0.0, kl_beta * x)


@triton.jit
def total(x, counted):
    return tl.sum(tl.where(counted, x, 0.0).to(tl.float64), 0)


@triton.jit(debug=DEBUG)
def policy_loss_kernel(
    logps_ptr, old_ptr, ref_ptr, entropy_ptr, mask_ptr, cu_ptr, advantages_ptr, losses_ptr,
    slopes_ptr, table_ptr, n, tokens, length, parameters,
    BY_SEQUENCE: tl.constexpr, OLD: tl.constexpr, REFERENCE: tl.constexpr, ENTROPY: tl.constexpr,
    MASKED: tl.constexpr, PACKED: tl.constexpr, CORRECTED: tl.constexpr, TOKENS: tl.constexpr,
    DOUBLE: tl.constexpr, DEBUG: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0)
    dtype = tl.float64 if DOUBLE else tl.float32
    begin, end, legal = limits(cu_ptr, s, n, tokens, length, PACKED, DEBUG)
    advantage = tl.load(advantages_ptr + s).to(dtype)
    low, high = number(parameters, 0).to(dtype), number(parameters, 1).to(dtype)
    kl_beta = number(parameters, 2)
    none = tl.where(legal, 0.0, float("nan")).to(tl.float64)
    count, loss, divergence, ratios, entropies = none, none, none, none, none
    lower, higher, overflowed = none, none, none
    if BY_SEQUENCE:
        whole, size = none, none
        for first in range(begin, end, TOKENS):
            o = first + tl.arange(0, TOKENS)
            counted = counted_at(mask_ptr, o, end, MASKED)
            whole += total(log_ratio_at(logps_ptr, old_ptr, o, counted, OLD, DOUBLE), counted)
            size += total(counted, counted)
        whole = whole / tl.where(size > 1, size, 1.0)
    for first in range(begin, end, TOKENS):
        o = first + tl.arange(0, TOKENS)
        counted = counted_at(mask_ptr, o, end, MASKED)
        log_ratio = log_ratio_at(logps_ptr, old_ptr, o, counted, OLD, DOUBLE)
        if BY_SEQUENCE:
            log_ratio = tl.zeros_like(log_ratio) + whole.to(dtype)
        surrogate, slope, ratio, low_clipped, high_clipped, over = clipped_surrogate(
            log_ratio, advantage, low, high
        )
        if REFERENCE:
            reference = load(ref_ptr, o, counted, DOUBLE)
            value, back, beyond = k3(reference - load(logps_ptr, o, counted, DOUBLE))
            if CORRECTED:
                value, back = ratio * value, ratio * back
                if not BY_SEQUENCE:
                    back += tl.where(over > 0, 0.0, value)
            divergence += total(value, counted)
            slope += times(kl_beta.to(dtype), back)
            over = tl.where(beyond > 0, 1.0, over)
        if ENTROPY:
            entropies += total(load(entropy_ptr, o, counted, DOUBLE), counted)
        put(slopes_ptr + o, tl.where(counted, slope, 0.0), o < end)
        count += total(counted, counted)
        loss += total(surrogate, counted)
        ratios += total(ratio, counted)
        lower += total(low_clipped, counted)
        higher += total(high_clipped, counted)
        overflowed += total(over, counted)
    if BY_SEQUENCE and REFERENCE and CORRECTED:
        # Every token moves the ratio, which multiplies the divergence of all of them.
        by_ratio = times(kl_beta, divergence) / tl.where(count > 1, count, 1.0)
        by_ratio = tl.where(whole > LIMIT, 0.0, by_ratio)
        tl.debug_barrier()  # another thread may read a slope than the one that wrote it
        for first in range(begin, end, TOKENS):
            o = first + tl.arange(0, TOKENS)
            counted = counted_at(mask_ptr, o, end, MASKED)
            slope = tl.load(slopes_ptr + o, mask=counted, other=0.0)
            tl.store(slopes_ptr + o, slope + by_ratio.to(slope.dtype), mask=counted)
    put(table_ptr + s, count)
    put(table_ptr + n + s, loss)
    put(table_ptr + 2 * n + s, divergence)
    put(table_ptr + 3 * n + s, ratios)
    put(table_ptr + 4 * n + s, lower)
    put(table_ptr + 5 * n + s, higher)
    put(table_ptr + 6 * n + s, overflowed)
    put(table_ptr + 7 * n + s, entropies)
    tl.store(losses_ptr + s, loss + times(kl_beta, divergence))


@triton.jit
def policy_loss_backward_kernel(
    grad_ptr, slopes_ptr, cu_ptr, out_ptr, n, tokens, length,
    PACKED: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0)
    begin, end, _ = limits(cu_ptr, s, n, tokens, length, PACKED, False)
    factor = tl.load(grad_ptr + s)
    for first in range(begin, end, TOKENS):
        o = first + tl.arange(0, TOKENS)
        slope = tl.load(slopes_ptr + o, mask=o < end, other=0.0)
        tl.store(out_ptr + o, tl.where(factor == 0, 0.0, factor * slope), mask=o < end)


def _by_token(like: Tensor, cu_seqlens: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Memory for every token; zeros where wrong boundaries may leave some out."""
    make = torch.empty if cu_seqlens is None else torch.zeros
    return make(like.shape, dtype=dtype, device=like.device)


def policy_loss(
    logps: Tensor,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    entropy: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    advantages: Tensor,
    by_sequence: bool,
    clip_low: float,
    clip_high: float,
    kl_beta: float,
    correct_kl: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `drrlhf.reference.policy_loss`; what it refuses by value gives NaN."""
    dtype, n = statistics_dtype(logps), advantages.numel()
    losses = logps.new_empty(n, dtype=torch.float64)
    slopes = _by_token(logps, cu_seqlens, dtype)
    table = logps.new_empty((ROWS, n), dtype=dtype)
    if not n:
        return losses, slopes, table
    with on(logps):
        policy_loss_kernel[(n,)](
            *(contiguous(x) for x in (logps, old_logps, ref_logps, entropy, mask, cu_seqlens)),
            advantages.contiguous(), losses, slopes, table, n, logps.numel(), logps.shape[-1],
            numbers(1 - clip_low, 1 + clip_high, kl_beta), BY_SEQUENCE=by_sequence,
            OLD=old_logps is not None, REFERENCE=ref_logps is not None,
            ENTROPY=entropy is not None, MASKED=mask is not None, PACKED=cu_seqlens is not None,
            CORRECTED=correct_kl, TOKENS=TOKENS, DOUBLE=dtype == torch.float64, DEBUG=DEBUG,
            num_warps=WARPS, **registers(logps, REGISTERS),
        )  # fmt: skip
    return losses, slopes, table


def policy_loss_backward(grad: Tensor, slopes: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """As `drrlhf.reference.policy_loss_backward`."""
    out, n = _by_token(slopes, cu_seqlens, slopes.dtype), grad.numel()
    if not n:
        return out
    with on(slopes):
        policy_loss_backward_kernel[(n,)](
            grad.to(slopes.dtype).contiguous(), slopes, contiguous(cu_seqlens), out, n,
            slopes.numel(), slopes.shape[-1], PACKED=cu_seqlens is not None, TOKENS=TOKENS,
            num_warps=WARPS,
        )  # fmt: skip
    return out
