"""`sequence_logprobs`: sums or means of token log-probs by sequence, a program for each."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from drrlhf.kernels.launch import DEBUG, on
from drrlhf.kernels.numerics import put
from torch import Tensor

from drrlhf.conventions import count_of, statistics_dtype

TOKENS, WARPS = 1024, 4  # that a program takes at a time


@triton.jit
def limits(cu_ptr, i, sequences, tokens, length, PACKED: tl.constexpr, DEBUG: tl.constexpr):
    """Where sequence i begins and ends, and whether the boundaries around it are what they must be.

    Nothing is read beyond the tokens, whatever the boundaries are.
    """
    if PACKED:
        begin = tl.load(cu_ptr + i).to(tl.int64)
        end = tl.load(cu_ptr + i + 1).to(tl.int64)
        legal = (begin >= 0) & (begin <= end) & (end <= tokens)
        legal = legal & ((i > 0) | (begin == 0)) & ((i < sequences - 1) | (end == tokens))
        if DEBUG:
            tl.device_assert(legal, "cu_seqlens: expected 0, ..., tokens, not decreasing")
        end = tl.where(legal, end, begin)
    else:
        begin = i.to(tl.int64) * length
        end = begin + length
        legal = begin >= 0
    return begin, end, legal


@triton.jit
def sequence_sum(logps_ptr, labels_ptr, begin, end, ignore_index, TOKENS: tl.constexpr):
    """Sum of the counted tokens' log-probs in float64, and their number."""
    total = tl.zeros([TOKENS], tl.float64)
    count = total
    for first in range(begin, end, TOKENS):
        o = first + tl.arange(0, TOKENS)
        counted = tl.load(labels_ptr + o, mask=o < end, other=ignore_index) != ignore_index
        total += tl.load(logps_ptr + o, mask=counted & (o < end), other=0.0).to(tl.float64)
        count += tl.where(counted & (o < end), 1.0, 0.0)
    return tl.sum(total, 0), tl.sum(count, 0)


@triton.jit(debug=DEBUG)
def sequence_logprobs_kernel(
    logps_ptr,
    labels_ptr,
    cu_ptr,
    out_ptr,
    sequences,
    tokens,
    length,
    ignore_index,
    PACKED: tl.constexpr,
    MEAN: tl.constexpr,
    TOKENS: tl.constexpr,
    DEBUG: tl.constexpr,
):
    i = tl.program_id(0)
    begin, end, legal = limits(cu_ptr, i, sequences, tokens, length, PACKED, DEBUG)
    total, count = sequence_sum(logps_ptr, labels_ptr, begin, end, ignore_index, TOKENS)
    if MEAN:
        total /= tl.where(count > 1, count, 1.0)
    total = tl.where(legal, total, float("nan"))
    put(out_ptr + i, total)


@triton.jit
def sequence_logprobs_backward_kernel(
    grad_ptr,
    labels_ptr,
    cu_ptr,
    out_ptr,
    sequences,
    tokens,
    length,
    ignore_index,
    PACKED: tl.constexpr,
    MEAN: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """The gradient of sequence i at each of its counted tokens."""
    i = tl.program_id(0)
    begin, end, _ = limits(cu_ptr, i, sequences, tokens, length, PACKED, False)
    g = tl.load(grad_ptr + i).to(tl.float64)
    if MEAN:
        count = tl.zeros([TOKENS], tl.float64)
        for first in range(begin, end, TOKENS):
            o = first + tl.arange(0, TOKENS)
            label = tl.load(labels_ptr + o, mask=o < end, other=ignore_index)
            count += tl.where(label != ignore_index, 1.0, 0.0)
        total = tl.sum(count, 0)
        g /= tl.where(total > 1, total, 1.0)
    for first in range(begin, end, TOKENS):
        o = first + tl.arange(0, TOKENS)
        label = tl.load(labels_ptr + o, mask=o < end, other=ignore_index)
        put(out_ptr + o, tl.where(label != ignore_index, g, 0.0), o < end)


def _launch(
    kernel: Any,
    x: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    out: Tensor,
    ignore_index: int,
    **options: Any,
) -> Tensor:
    """`out`, of one of the kernels above, a program for each sequence."""
    sequences = count_of(labels, cu_seqlens)
    if sequences:
        with on(x):
            kernel[(sequences,)](
                x.contiguous(),
                labels.contiguous(),
                contiguous(cu_seqlens),
                out,
                sequences,
                labels.numel(),
                labels.shape[-1],
                ignore_index,
                PACKED=cu_seqlens is not None,
                TOKENS=TOKENS,
                num_warps=WARPS,
                **options,
            )
    return out


def sequence_logprobs(
    logps: Tensor, labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int, mean: bool
) -> Tensor:
    """As `drrlhf.reference.sequence_logprobs`; boundaries that are none give NaN."""
    out = logps.new_empty(count_of(labels, cu_seqlens), dtype=statistics_dtype(logps))
    given = (logps, labels, cu_seqlens, out, ignore_index)
    return _launch(sequence_logprobs_kernel, *given, MEAN=mean, DEBUG=DEBUG)


def sequence_logprobs_backward(
    grad: Tensor, labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int, mean: bool
) -> Tensor:
    """As `drrlhf.reference.sequence_logprobs_backward`."""
    # Zeros, for tokens that wrong boundaries leave out.
    make = torch.empty if cu_seqlens is None else torch.zeros
    out = make(labels.shape, dtype=grad.dtype, device=grad.device)
    given = (grad, labels, cu_seqlens, out, ignore_index)
    return _launch(sequence_logprobs_backward_kernel, *given, MEAN=mean)


def contiguous(x: Tensor | None) -> Tensor | None:
    """x with its entries side by side, or none."""
    return None if x is None else x.contiguous()
