"""`token_logprobs`: one read of the logits forward, one read and one write backward.

A program takes ROWS rows, which are more than one only where the vocabulary is small, and goes
through them in blocks of BLOCK columns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from drrlhf.kernels.launch import DEBUG, on
from drrlhf.kernels.numerics import narrow
from drrlhf.kernels.softmax import (
    entropy_of,
    finish,
    first_reference,
    fold,
    gradient,
    log_sum_squares_of,
    transform,
)
from torch import Tensor

from drrlhf.conventions import OPTIONAL, empty_statistics

# Entries of 16 bytes at most: rows are read from where such a group begins.
GROUP = tl.constexpr(16)
# Little: the entropy is a difference that an exponent far from 0 would coarsen.
HEADROOM = tl.constexpr(1.0)


@triton.jit
def load_tile(
    x_ptr,
    starts,
    shift,
    first,
    counted,
    vocabulary,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Columns [first - shift, first - shift + BLOCK) of some rows, those outside as 0.

    Whole groups of entries are loaded at once where nothing is masked entry by entry: where rows
    begin with a group (ALIGNED), or in the middle of one row, read from where its group begins.
    """
    columns = first + tl.arange(0, BLOCK)
    if ALIGNED or ROWS > 1:
        mask = counted[:, None] & (columns < vocabulary)[None, :]
        x = tl.load(x_ptr + starts[:, None] + columns[None, :], mask=mask, other=0.0)
    else:
        p_x = x_ptr + tl.multiple_of(starts - shift, [16])[:, None] + columns[None, :]
        columns -= shift
        if (first >= shift) & (first + BLOCK - shift <= vocabulary):
            x = tl.load(p_x)
        else:
            mask = ((columns >= 0) & (columns < vocabulary))[None, :]
            x = tl.load(p_x, mask=mask, other=0.0)
    return x.to(tl.float32), columns


@triton.jit(debug=DEBUG)
def token_logprobs_kernel(
    x_ptr,
    labels_ptr,
    logp_ptr,
    lse_ptr,
    tail_ptr,
    entropy_ptr,
    mean_ptr,
    top1_ptr,
    squares_ptr,
    n,
    vocabulary,
    stride,
    ignore_index,
    softcap,
    inverse_temperature,
    ENTROPY: tl.constexpr,
    MEAN: tl.constexpr,
    TOP1: tl.constexpr,
    SQUARES: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEBUG: tl.constexpr,
):
    EXTRAS: tl.constexpr = ENTROPY or MEAN or TOP1 or SQUARES
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = rows < n
    labels = tl.load(labels_ptr + rows, mask=live, other=ignore_index)
    counted = labels != ignore_index
    known = (labels >= 0) & (labels < vocabulary)
    if DEBUG:
        tl.device_assert(known | (labels == ignore_index), "labels: outside [0, V)")
    starts = rows * stride
    p_t = x_ptr + starts + tl.where(known, labels, 0)
    t = tl.load(p_t, mask=counted & known, other=0.0).to(tl.float32)
    t, t_slope = transform(t, 1.0, softcap, inverse_temperature, CAPPED)
    t = tl.where(known, t, float("nan"))

    none = tl.zeros([ROWS], tl.float32)
    least = none - float("inf")
    state = (first_reference(t), none, none, none, none, least, least)
    shift = 0
    if not ALIGNED and ROWS == 1:
        shift = (tl.program_id(0).to(tl.int64) * stride % GROUP).to(tl.int32)
    if tl.max(counted.to(tl.int32), 0) > 0:
        for first in range(0, vocabulary + shift, BLOCK):
            x, columns = load_tile(
                x_ptr, starts, shift, first, counted, vocabulary, ROWS, BLOCK, ALIGNED
            )
            z, slope = transform(x, 1.0, softcap, inverse_temperature, CAPPED)
            state = fold(z, columns, labels, vocabulary, state, HEADROOM, EXTRAS, PRECISE)

    reference, total, shifted, squares, plain, before, after = state
    logp, lse, tail, u, _, log_sum, whole = finish(t, reference, total)
    tl.store(logp_ptr + rows, tl.where(counted, logp, 0.0), mask=live)
    tl.store(lse_ptr + rows, tl.where(counted, lse, 0.0), mask=live)
    tl.store(tail_ptr + rows, tl.where(counted, tail, 0.0), mask=live)
    if ENTROPY:
        entropy = entropy_of(u, log_sum, whole, shifted)
        tl.store(entropy_ptr + rows, tl.where(counted, entropy, 0.0).to(tl.float32), mask=live)
    if MEAN:
        mean = tl.where(known, plain.to(tl.float64) / vocabulary, float("nan"))
        tl.store(mean_ptr + rows, tl.where(counted, mean, 0.0).to(tl.float32), mask=live)
    if TOP1:
        tl.store(top1_ptr + rows, counted & (t > before) & (t >= after), mask=live)
    if SQUARES:
        log_squares = log_sum_squares_of(u, log_sum, squares)
        tl.store(squares_ptr + rows, tl.where(counted, log_squares, 0.0).to(tl.float32), mask=live)


@triton.jit
def token_logprobs_backward_kernel(
    x_ptr,
    out_ptr,
    labels_ptr,
    a_ptr,
    b_ptr,
    logp_ptr,
    lse_ptr,
    tail_ptr,
    entropy_ptr,
    n,
    vocabulary,
    stride,
    out_stride,
    ignore_index,
    softcap,
    inverse_temperature,
    blocks,
    BY_LOGP: tl.constexpr,
    BY_ENTROPY: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile of the gradient; `out_ptr` may be `x_ptr`, for a tile is read before it is written.

    Both tensors' rows begin alike within a group of entries, see `load_tile`.
    """
    i_rows = tl.program_id(0) // blocks
    rows = i_rows.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = rows < n
    labels = tl.load(labels_ptr + rows, mask=live, other=ignore_index)
    a = tl.zeros([ROWS], tl.float32)
    b = a
    entropy = a
    if BY_LOGP:
        a = tl.load(a_ptr + rows, mask=live, other=0.0).to(tl.float32)
    if BY_ENTROPY:
        b = tl.load(b_ptr + rows, mask=live, other=0.0).to(tl.float32)
        entropy = tl.load(entropy_ptr + rows, mask=live, other=0.0)
    asked = (labels != ignore_index) & ((a != 0) | (b != 0))
    starts, out_starts = rows * stride, rows * out_stride
    first = (tl.program_id(0) % blocks) * BLOCK
    shift = 0
    if not ALIGNED and ROWS == 1:
        shift = (i_rows.to(tl.int64) * stride % GROUP).to(tl.int32)
    d = tl.zeros([ROWS, BLOCK], tl.float32)
    if tl.max(asked.to(tl.int32), 0) > 0:
        logp = tl.load(logp_ptr + rows, mask=live, other=0.0)
        lse = tl.load(lse_ptr + rows, mask=live, other=0.0)
        tail = tl.load(tail_ptr + rows, mask=live, other=0.0)
        x, columns = load_tile(x_ptr, starts, shift, first, asked, vocabulary, ROWS, BLOCK, ALIGNED)
        z, slope = transform(x, 1.0, softcap, inverse_temperature, CAPPED)
        is_label = columns[None, :] == labels[:, None]
        d = gradient(z, is_label, a, b, logp, lse, tail, entropy, BY_LOGP, BY_ENTROPY, PRECISE)
        d = tl.where(asked[:, None], d * slope * inverse_temperature, 0.0)
    d = narrow(d, out_ptr)
    columns = first + tl.arange(0, BLOCK)
    if ALIGNED or ROWS > 1:
        mask = live[:, None] & (columns < vocabulary)[None, :]
        tl.store(out_ptr + out_starts[:, None] + columns[None, :], d, mask=mask)
    else:
        p_d = out_ptr + tl.multiple_of(out_starts - shift, [16])[:, None] + columns[None, :]
        columns -= shift
        if (first >= shift) & (first + BLOCK - shift <= vocabulary):
            tl.store(p_d, d)
        else:
            tl.store(p_d, d, mask=((columns >= 0) & (columns < vocabulary))[None, :])


class Launch(NamedTuple):
    """Rows of a program, columns of a block, and warps."""

    rows: int
    block: int
    warps: int


def configuration(vocabulary: int) -> Launch:
    """Blocks of up to 4096 columns: 16 entries of a thread, two loads of 16 bytes in bfloat16."""
    block = min(triton.next_power_of_2(vocabulary), 4096)
    rows = max(1, min(64, 4096 // block))
    return Launch(rows, max(block, 16), 8)


class RowBlock(NamedTuple):
    """Some rows (n, V) of a tensor, the part of it that they are of, and which row comes first."""

    rows: Tensor
    of: Tensor
    first: int

    @property
    def place(self) -> slice:
        return slice(self.first, self.first + self.rows.shape[0])


# A launch for each block of rows takes less than a copy of them where it has some.
LEAST_ROWS = 16


def row_blocks(x: Tensor, first: int = 0) -> list[RowBlock]:
    """x (..., V) as rows with neighbouring entries, in blocks where no one view holds all, as in
    x[:, :-1]. Other layouts are copied."""
    width = x.shape[-1]
    try:
        rows = x.view(-1, width)
    except RuntimeError:  # there is no such view
        if x.dim() > 2 and x.stride(-1) == 1 and x[0].numel() >= LEAST_ROWS * width:
            n = x[0].numel() // width
            return [y for i, part in enumerate(x) for y in row_blocks(part, first + i * n)]
        rows = x.reshape(-1, width)
    return [RowBlock(rows if rows.stride(1) == 1 else rows.contiguous(), x, first)]


def _aligned(*tensors: Tensor) -> bool:
    """Whether every row begins with a group of entries and ends with one."""
    return all(
        x.shape[1] % 16 == 0 and x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0 for x in tensors
    )


def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
    outputs: int,
) -> tuple[Tensor, ...]:
    """As `drrlhf.reference.token_logprobs`; a label outside [0, V) gives NaN."""
    results = empty_statistics(logits, labels.shape, outputs)
    y, blocks = labels.reshape(-1).contiguous(), row_blocks(logits)
    options = (ignore_index, temperature, softcap, outputs)
    if len(blocks) == 1:
        _forward_into(results, blocks[0].rows, y, *options)
    else:
        flat = [x.view(-1) for x in results]
        for block in blocks:
            own = [x[block.place] for x in flat]
            _forward_into(own, block.rows, y[block.place], *options)
    return tuple(results)


def _forward_into(
    results: list[Tensor],
    x: Tensor,
    labels: Tensor,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
    outputs: int,
) -> None:
    """The statistics of the rows x (n, V)."""
    n, vocabulary = x.shape
    rows, block, warps = configuration(vocabulary)
    if not n:
        return
    with on(x):
        token_logprobs_kernel[(triton.cdiv(n, rows),)](
            x,
            labels,
            *results,
            n,
            vocabulary,
            x.stride(0),
            ignore_index,
            softcap or 0.0,
            1.0 / temperature,
            *(outputs & bit != 0 for bit in OPTIONAL),
            CAPPED=softcap is not None,
            PRECISE=x.dtype == torch.float32,
            ALIGNED=_aligned(x),
            ROWS=rows,
            BLOCK=block,
            DEBUG=DEBUG,
            num_warps=warps,
        )


def _backward_into(
    out: Tensor,
    x: Tensor,
    per_token: list[Tensor | None],
    ignore_index: int,
    temperature: float,
    softcap: float | None,
) -> None:
    """The gradient of the rows x (n, V) into out (n, V), which may be x.

    per_token: labels, both upstream gradients, and the statistics, (n,) each.
    """
    n, vocabulary = x.shape
    if not n:
        return
    rows, block, warps = configuration(vocabulary)
    aligned = _aligned(x, out)
    if not aligned and rows == 1 and (x.stride(0) - out.stride(0)) % 16:
        x = x.contiguous()
    # A row that is read from where its group begins may take one block more.
    blocks = triton.cdiv(vocabulary + (0 if aligned or rows > 1 else 15), block)
    labels, grad, grad_entropy, logp, *rest = per_token
    given = (labels, *(logp if g is None else g for g in (grad, grad_entropy)), logp, *rest)
    with on(x):
        token_logprobs_backward_kernel[(triton.cdiv(n, rows) * blocks,)](
            x,
            out,
            *given,
            n,
            vocabulary,
            x.stride(0),
            out.stride(0),
            ignore_index,
            softcap or 0.0,
            1.0 / temperature,
            blocks,
            BY_LOGP=grad is not None,
            BY_ENTROPY=grad_entropy is not None,
            CAPPED=softcap is not None,
            PRECISE=x.dtype == torch.float32,
            ALIGNED=aligned,
            ROWS=rows,
            BLOCK=block,
            num_warps=warps,
        )


def _backward(logits: Tensor, out: Tensor | None, labels: Tensor, *rest: Any) -> None:
    """The gradient of the logits into out (n, V), or over them."""
    *per_token, ignore_index, temperature, softcap = rest
    flat = [None if x is None else x.reshape(-1).contiguous() for x in (labels, *per_token)]
    blocks = row_blocks(logits)
    for rows, of, first in blocks:
        to, own = rows if out is None else out, flat
        if len(blocks) > 1:
            place = slice(first, first + rows.shape[0])
            own = [None if x is None else x[place] for x in flat]
            to = rows if out is None else out[place]
        _backward_into(to, rows, own, ignore_index, temperature, softcap)
        if out is None and rows.data_ptr() != of.data_ptr():
            of.copy_(rows.view(of.shape))


def token_logprobs_backward(logits: Tensor, labels: Tensor, *rest: Any) -> Tensor:
    """As `drrlhf.reference.token_logprobs_backward`."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _backward(logits, out.view(-1, logits.shape[-1]), labels, *rest)
    return out


def token_logprobs_backward_(logits: Tensor, labels: Tensor, *rest: Any) -> None:
    """`token_logprobs_backward` written over the logits."""
    _backward(logits, None, labels, *rest)
