"""`linear_token_logprobs`: logits are made tile by tile and never held in float32.

In units of one product of all tokens with the head:

    scoring         fold                                     1
    frozen head     fold, storing ratios; hidden gradient    2
    trained head    the same; gradient, weight gradient      4, or 3 with the ratios kept

A *ratio* is p[v] / p[label] = exp(z[v] - z[label]): it is known as soon as its tile is, before the
sum over the vocabulary is, so the pass that finds the log-probs also leaves the operand of the next
product. A row of ratios with minus the sum of the others in the label's place is d logp / d logits
divided by -p[label]; the division is undone in float32 after the product. Where the label is too
improbable for that (`IMPROBABLE`), the row is made again from the logits by the gradient kernel.

Only counted tokens take part: `compact` lists them on the device, programs beyond their number end
at once, and the host never learns it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from drrlhf.kernels.launch import DEBUG, on
from drrlhf.kernels.numerics import expm1, narrow
from drrlhf.kernels.softmax import (
    entropy_of,
    exp,
    finish,
    first_reference,
    fold,
    gradient,
    log_sum_squares_of,
    transform,
)
from drrlhf.kernels.tiles import Tile, launch, multiply, precision_of, splits_of, tile_for
from drrlhf.kernels.token_logprobs import OPTIONAL
from torch import Tensor

from drrlhf import reference
from drrlhf.reference import KEEP_HIDDEN, KEEP_NOTHING, KEEP_RATIOS, KEEP_SLAB

IMPROBABLE = tl.constexpr(reference.IMPROBABLE)
# Of the statistics' reference over the label's logit, in nats: an entry further above it makes the
# label improbable. With extras the reference follows the largest logit, as their digits want.
FAR, NEAR = 32.0, 1.0
FIELDS = 8  # of a part of the vocabulary, in the order of `fold`
LISTED = tl.constexpr(2048)  # tokens that `compact` looks at together


# --------------------------------------------------------------------------- which tokens


@triton.jit
def compact_kernel(
    labels_ptr, a_ptr, b_ptr, rows_ptr, slots_ptr, count_ptr, n, ignore_index,
    BY_A: tl.constexpr, BY_B: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Lists the counted tokens that have a gradient a or b other than 0, if either is given.

    rows: their places; slots: their places among all counted tokens; count: how many they are.
    """
    counted_before = 0
    active_before = 0
    for first in range(0, n, LISTED):
        o = first + tl.arange(0, LISTED)
        labels = tl.load(labels_ptr + o, mask=o < n, other=ignore_index)
        counted = labels != ignore_index
        active = counted
        if BY_A or BY_B:
            asked = tl.zeros([LISTED], tl.int1)
            if BY_A:
                asked = asked | (tl.load(a_ptr + o, mask=o < n, other=0.0) != 0)
            if BY_B:
                asked = asked | (tl.load(b_ptr + o, mask=o < n, other=0.0) != 0)
            active = counted & asked
        slots = counted_before + tl.cumsum(counted.to(tl.int32), 0) - 1
        place = active_before + tl.cumsum(active.to(tl.int32), 0) - 1
        tl.store(rows_ptr + place, o, mask=active)
        tl.store(slots_ptr + place, slots, mask=active)
        counted_before += tl.sum(counted.to(tl.int32), 0)
        active_before += tl.sum(active.to(tl.int32), 0)
    tl.store(count_ptr, active_before)


@triton.jit
def improbable_kernel(
    logp_ptr, rows_ptr, count_ptr, listed_ptr, slots_ptr, listed_count_ptr, first_slot, slots,
    EVERY: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Of `slots` slots from `first_slot`, lists those that ratios do not serve, from 0."""
    count = tl.minimum(tl.load(count_ptr) - first_slot, slots)
    before = 0
    for first in range(0, count, LISTED):
        o = first + tl.arange(0, LISTED)
        rows = tl.load(rows_ptr + first_slot + o, mask=o < count, other=0)
        logp = tl.load(logp_ptr + rows, mask=o < count, other=0.0)
        far = o < count
        if not EVERY:
            far = far & (logp < IMPROBABLE)
        place = before + tl.cumsum(far.to(tl.int32), 0) - 1
        tl.store(listed_ptr + place, rows, mask=far)
        tl.store(slots_ptr + place, o, mask=far)
        before += tl.sum(far.to(tl.int32), 0)
    tl.store(listed_count_ptr, before)


class Tokens(NamedTuple):
    """A list on the device: rows (n,) of hidden, their slots (n,), and how many these are ()."""

    rows: Tensor
    slots: Tensor
    number: Tensor


def _empty_list(labels: Tensor, n: int) -> Tokens:
    room = torch.empty(2, n, dtype=torch.int32, device=labels.device)
    return Tokens(room[0], room[1], room.new_empty(()))


def compact(
    labels: Tensor, ignore_index: int, a: Tensor | None = None, b: Tensor | None = None
) -> Tokens:
    """The counted tokens; with gradients, those of them that one of these is not 0 for."""
    tokens = _empty_list(labels, labels.numel())
    with on(labels):
        compact_kernel[(1,)](
            labels, labels if a is None else a, labels if b is None else b, *tokens,
            labels.numel(), ignore_index, BY_A=a is not None, BY_B=b is not None, LISTED=LISTED,
            num_warps=8,
        )  # fmt: skip
    return tokens


# --------------------------------------------------------------------------- forward


@triton.jit(debug=DEBUG)
def label_logits_kernel(
    h_ptr, w_ptr, bias_ptr, labels_ptr, rows_ptr, count_ptr, t_ptr, slope_ptr,
    width, vocabulary, h_stride, w_stride, bias_stride, scale, softcap, inverse_temperature,
    BIAS: tl.constexpr, CAPPED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    DEBUG: tl.constexpr,
):  # fmt: skip
    """t = z[label] and the slope of its transform, by slot; NaN for a label outside [0, V)."""
    slots = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = slots < tl.load(count_ptr)
    rows = tl.load(rows_ptr + slots, mask=live, other=0).to(tl.int64)
    labels = tl.load(labels_ptr + rows, mask=live, other=0).to(tl.int64)
    known = (labels >= 0) & (labels < vocabulary)
    if DEBUG:
        tl.device_assert(known, "labels: outside [0, V)")
    o_d = tl.arange(0, BLOCK)
    p_h = h_ptr + (rows * h_stride)[:, None] + o_d[None, :]
    p_w = w_ptr + (tl.where(known, labels, 0) * w_stride)[:, None] + o_d[None, :]
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        mask = (live & known)[:, None] & (first + o_d < width)[None, :]
        h = tl.load(p_h + first, mask=mask, other=0.0).to(tl.float32)
        sums += h * tl.load(p_w + first, mask=mask, other=0.0).to(tl.float32)
    x = tl.sum(sums, 1)
    if BIAS:
        p_bias = bias_ptr + tl.where(known, labels, 0) * bias_stride
        x += tl.load(p_bias, mask=live & known, other=0.0).to(tl.float32)
    t, slope = transform(x, scale, softcap, inverse_temperature, CAPPED)
    tl.store(t_ptr + slots, tl.where(known, t, float("nan")), mask=live)
    tl.store(slope_ptr + slots, slope, mask=live)


@triton.jit
def logits_tile(
    p_h, p_w, width, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Raw logits (BM, BN), from pointers to the first BK entries of hidden and head rows.

    In two halves of columns: what follows the product needs registers for one half at a time.
    """
    o_k = tl.arange(0, BK)
    x = tl.zeros([BM, BN], tl.float32)
    for k in range(0, width, BK):
        if EVEN:
            h = tl.load(p_h)
            w = tl.load(p_w)
        else:
            h = tl.load(p_h, mask=(o_k < width - k)[None, :], other=0.0)
            w = tl.load(p_w, mask=(o_k < width - k)[None, :], other=0.0)
        x = multiply(h, w.T, x, PRECISION)
        p_h += BK
        p_w += BK
    return tl.split(tl.permute(tl.reshape(x, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def transform_half(
    x, bias_ptr, columns, vocabulary, bias_stride, scale, softcap, inverse_temperature,
    BIAS: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """z and its slope of raw logits in some columns."""
    if BIAS:
        bias = tl.load(bias_ptr + columns * bias_stride, mask=columns < vocabulary, other=0.0)
        x += bias.to(tl.float32)[None, :]
    return transform(x, scale, softcap, inverse_temperature, CAPPED)


@triton.jit
def fold_half(
    x, columns, live, here, labels, t, bias_ptr, ratios_ptr, vocabulary, bias_stride,
    ratios_stride, scale, softcap, inverse_temperature,
    reference, total, shifted, squares, plain, own, before, after,
    STORE: tl.constexpr, EXTRAS: tl.constexpr, HEADROOM: tl.constexpr, BIAS: tl.constexpr,
    CAPPED: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """Counts half a tile of raw logits in, see `softmax.fold`, and stores its ratios."""
    z, slope = transform_half(
        x, bias_ptr, columns, vocabulary, bias_stride, scale, softcap, inverse_temperature, BIAS,
        CAPPED,
    )  # fmt: skip
    reference, total, shifted, squares, plain, own, before, after, e = fold(
        z, columns, labels, vocabulary, reference, total, shifted, squares, plain, own, before,
        after, HEADROOM, EXTRAS, PRECISE,
    )  # fmt: skip
    if STORE:
        if EXTRAS:  # whose reference has left the label
            e = exp(tl.minimum(z - t[:, None], 80.0), PRECISE)
            e = tl.where((columns < vocabulary)[None, :], e, 0.0)
        p_e = ratios_ptr + (here.to(tl.int64) * ratios_stride)[:, None] + columns[None, :]
        mask = live[:, None] & (columns < ratios_stride)[None, :]
        tl.store(p_e, narrow(e * slope, ratios_ptr), mask=mask)
    return reference, total, shifted, squares, plain, own, before, after


@triton.jit
def fold_kernel(
    h_ptr, w_ptr, bias_ptr, labels_ptr, rows_ptr, count_ptr, t_ptr, parts_ptr, ratios_ptr,
    first_slot, slots_here, width, vocabulary, h_stride, w_stride, bias_stride, ratios_stride,
    parts_stride, splits, scale, softcap, inverse_temperature,
    STORE: tl.constexpr, EXTRAS: tl.constexpr, HEADROOM: tl.constexpr, BIAS: tl.constexpr,
    CAPPED: tl.constexpr, PRECISE: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Statistics of BM tokens over one part of the vocabulary, and their ratios where STORE.

    Programs of one part lie side by side: they read the same rows of the head at the same time.
    """
    row_blocks = tl.cdiv(slots_here, BM)
    i_rows = tl.program_id(0) % row_blocks
    i_part = tl.program_id(0) // row_blocks
    here = i_rows * BM + tl.arange(0, BM)
    count = tl.minimum(tl.load(count_ptr) - first_slot, slots_here)
    if i_rows * BM < count:
        live = here < count
        slots = first_slot + here
        rows = tl.load(rows_ptr + slots, mask=live, other=0).to(tl.int64)
        labels = tl.load(labels_ptr + rows, mask=live, other=-1)
        t = tl.load(t_ptr + slots, mask=live, other=0.0)
        o_k = tl.arange(0, BK)
        p_h = h_ptr + (rows * h_stride)[:, None] + o_k[None, :]
        reference = first_reference(t)
        total = tl.zeros([BM], tl.float32)
        shifted, squares, plain, own = total, total, total, total
        before = total - float("inf")
        after = before
        tiles = tl.cdiv(vocabulary, BN)
        each = tl.cdiv(tiles, splits)
        for i_tile in range(i_part * each, tl.minimum((i_part + 1) * each, tiles)):
            # Columns beyond the last begin again, which needs no mask, and do not count.
            w_rows = ((i_tile * BN + tl.arange(0, BN)) % vocabulary).to(tl.int64)
            p_w = w_ptr + (w_rows * w_stride)[:, None] + o_k[None, :]
            x_left, x_right = logits_tile(p_h, p_w, width, EVEN, PRECISION, BM, BN, BK)
            columns = i_tile * BN + tl.arange(0, BN // 2)
            reference, total, shifted, squares, plain, own, before, after = fold_half(
                x_left, columns, live, here, labels, t, bias_ptr, ratios_ptr, vocabulary,
                bias_stride, ratios_stride, scale, softcap, inverse_temperature,
                reference, total, shifted, squares, plain, own, before, after,
                STORE, EXTRAS, HEADROOM, BIAS, CAPPED, PRECISE,
            )  # fmt: skip
            reference, total, shifted, squares, plain, own, before, after = fold_half(
                x_right, columns + BN // 2, live, here, labels, t, bias_ptr, ratios_ptr,
                vocabulary, bias_stride, ratios_stride, scale, softcap, inverse_temperature,
                reference, total, shifted, squares, plain, own, before, after,
                STORE, EXTRAS, HEADROOM, BIAS, CAPPED, PRECISE,
            )  # fmt: skip
        p_part = parts_ptr + i_part * parts_stride + here
        field = splits * parts_stride
        tl.store(p_part, reference, mask=live)
        tl.store(p_part + field, total, mask=live)
        if EXTRAS:
            tl.store(p_part + 2 * field, shifted, mask=live)
            tl.store(p_part + 3 * field, squares, mask=live)
            tl.store(p_part + 4 * field, plain, mask=live)
            tl.store(p_part + 5 * field, own, mask=live)
            tl.store(p_part + 6 * field, before, mask=live)
            tl.store(p_part + 7 * field, after, mask=live)


@triton.jit
def finish_kernel(
    parts_ptr, rows_ptr, count_ptr, t_ptr, slope_ptr, labels_ptr, ratios_ptr, factor_ptr,
    logp_ptr, lse_ptr, tail_ptr, entropy_ptr, mean_ptr, top1_ptr, squares_ptr,
    first_slot, slots_here, vocabulary, ratios_stride, parts_stride, splits, unit,
    ENTROPY: tl.constexpr, MEAN: tl.constexpr, TOP1: tl.constexpr, SQUARES: tl.constexpr,
    STORE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Puts the parts of the vocabulary together; statistics go to the tokens' places.

    Where STORE, the label's place in the ratios too, and by slot the factor that turns a row of
    them into d logp / d logits: -p[label] times `unit`, or 1 for a row that is made again.
    """
    EXTRAS: tl.constexpr = ENTROPY or MEAN or TOP1 or SQUARES
    here = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = here < tl.minimum(tl.load(count_ptr) - first_slot, slots_here)
    slots = first_slot + here
    rows = tl.load(rows_ptr + slots, mask=live, other=0)
    t = tl.load(t_ptr + slots, mask=live, other=0.0)
    field = splits * parts_stride
    reference = first_reference(t)
    for i_part in range(0, splits):
        p_part = parts_ptr + i_part * parts_stride + here
        of_part = tl.load(p_part, mask=live, other=0.0)
        reference = tl.where(of_part > reference, of_part, reference)
    r = reference.to(tl.float64)
    total = tl.zeros([ROWS], tl.float64)
    shifted, squares, plain = total, total, total
    own = tl.zeros([ROWS], tl.float32)
    before = own - float("inf")
    after = before
    for i_part in range(0, splits):
        p_part = parts_ptr + i_part * parts_stride + here
        rise = tl.load(p_part, mask=live, other=0.0).to(tl.float64) - r
        e = tl.exp(rise)
        part = tl.load(p_part + field, mask=live, other=0.0).to(tl.float64)
        total += e * part
        if EXTRAS:
            of_part = tl.load(p_part + 2 * field, mask=live, other=0.0).to(tl.float64)
            shifted += e * (of_part + tl.where(part > 0, rise * part, 0.0))
            squares += e * e * tl.load(p_part + 3 * field, mask=live, other=0.0).to(tl.float64)
            plain += tl.load(p_part + 4 * field, mask=live, other=0.0).to(tl.float64)
            own += tl.load(p_part + 5 * field, mask=live, other=0.0)
            before = tl.maximum(before, tl.load(p_part + 6 * field, mask=live, other=0.0))
            after = tl.maximum(after, tl.load(p_part + 7 * field, mask=live, other=0.0))
    logp, lse, tail, u, log_sum, whole = finish(t, reference, total)
    tl.store(logp_ptr + rows, logp, mask=live)
    tl.store(lse_ptr + rows, lse, mask=live)
    tl.store(tail_ptr + rows, tail, mask=live)
    if ENTROPY:
        entropy = entropy_of(u, log_sum, whole, shifted)
        tl.store(entropy_ptr + rows, entropy.to(tl.float32), mask=live)
    if MEAN:
        tl.store(mean_ptr + rows, (plain / vocabulary).to(tl.float32), mask=live)
    if TOP1:
        tl.store(top1_ptr + rows, (own > before) & (own >= after), mask=live)
    if SQUARES:
        log_squares = log_sum_squares_of(u, log_sum, squares)
        tl.store(squares_ptr + rows, log_squares.to(tl.float32), mask=live)
    if STORE:
        labels = tl.load(labels_ptr + rows, mask=live, other=-1).to(tl.int64)
        # Not of the rounded log p: its rounding, |log p| units, would be that of the whole row.
        precise = u - log_sum
        rest = -expm1(-precise) * tl.load(slope_ptr + slots, mask=live, other=0.0)
        p_own = ratios_ptr + here.to(tl.int64) * ratios_stride + labels
        inside = live & (labels >= 0) & (labels < vocabulary)
        tl.store(p_own, narrow(rest.to(tl.float32), ratios_ptr), mask=inside)
        divided = -tl.exp(precise).to(tl.float32) * unit
        # NaN is not improbable: it stays seen.
        tl.store(factor_ptr + slots, tl.where(logp < IMPROBABLE, 1.0, divided), mask=live)


# --------------------------------------------------------------------------- gradients


@triton.jit
def gradient_half(
    x, columns, end, live, labels, p_row, bias_ptr, a, b, logp, lse, tail, entropy,
    vocabulary, bias_stride, scale, softcap, inverse_temperature,
    BY_LOGP: tl.constexpr, BY_ENTROPY: tl.constexpr, BIAS: tl.constexpr, CAPPED: tl.constexpr,
    PRECISE: tl.constexpr,
):  # fmt: skip
    """Stores the gradient of half a tile of raw logits, in its columns before `end`."""
    z, slope = transform_half(
        x, bias_ptr, columns, vocabulary, bias_stride, scale, softcap, inverse_temperature, BIAS,
        CAPPED,
    )  # fmt: skip
    is_label = columns[None, :] == labels[:, None]
    d = gradient(z, is_label, a, b, logp, lse, tail, entropy, BY_LOGP, BY_ENTROPY, PRECISE)
    d = d * slope * (scale * inverse_temperature)
    mask = live[:, None] & (columns < end)[None, :]
    tl.store(p_row[:, None] + columns[None, :], narrow(d, p_row), mask=mask)


@triton.jit
def gradient_kernel(
    h_ptr, w_ptr, bias_ptr, labels_ptr, rows_ptr, slots_ptr, count_ptr, a_ptr, b_ptr, logp_ptr,
    lse_ptr, tail_ptr, entropy_ptr, d_ptr, first_column, columns_here, width, vocabulary,
    h_stride, w_stride, bias_stride, d_stride, scale, softcap, inverse_temperature,
    BY_LOGP: tl.constexpr, BY_ENTROPY: tl.constexpr, ONES: tl.constexpr, AT_SLOTS: tl.constexpr,
    BIAS: tl.constexpr, CAPPED: tl.constexpr, PRECISE: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """d (a logp + b entropy) / d logits of the listed tokens, over some columns, from the logits.

    Row i of d is that of listed token i, or lies at its slot. ONES: a is 1 for every token.
    """
    column_blocks = tl.cdiv(columns_here, BN)
    i_columns = tl.program_id(0) % column_blocks
    i_rows = tl.program_id(0) // column_blocks
    count = tl.load(count_ptr)
    if i_rows * BM < count:
        here = i_rows * BM + tl.arange(0, BM)
        live = here < count
        rows = tl.load(rows_ptr + here, mask=live, other=0).to(tl.int64)
        labels = tl.load(labels_ptr + rows, mask=live, other=-1)
        o_k = tl.arange(0, BK)
        first = first_column + i_columns * BN
        w_rows = ((first + tl.arange(0, BN)) % vocabulary).to(tl.int64)
        p_h = h_ptr + (rows * h_stride)[:, None] + o_k[None, :]
        p_w = w_ptr + (w_rows * w_stride)[:, None] + o_k[None, :]
        x_left, x_right = logits_tile(p_h, p_w, width, EVEN, PRECISION, BM, BN, BK)
        a = tl.zeros([BM], tl.float32) + 1.0
        b = a
        entropy = a
        if BY_LOGP and not ONES:
            a = tl.load(a_ptr + rows, mask=live, other=0.0).to(tl.float32)
        if BY_ENTROPY:
            b = tl.load(b_ptr + rows, mask=live, other=0.0).to(tl.float32)
            entropy = tl.load(entropy_ptr + rows, mask=live, other=0.0)
        logp = tl.load(logp_ptr + rows, mask=live, other=0.0)
        lse = tl.load(lse_ptr + rows, mask=live, other=0.0)
        tail = tl.load(tail_ptr + rows, mask=live, other=0.0)
        if AT_SLOTS:
            here = tl.load(slots_ptr + here, mask=live, other=0)
        p_row = d_ptr + here.to(tl.int64) * d_stride - first_column
        end = tl.minimum(vocabulary, first_column + columns_here)
        columns = first + tl.arange(0, BN // 2)
        gradient_half(
            x_left, columns, end, live, labels, p_row, bias_ptr, a, b, logp, lse, tail, entropy,
            vocabulary, bias_stride, scale, softcap, inverse_temperature,
            BY_LOGP, BY_ENTROPY, BIAS, CAPPED, PRECISE,
        )  # fmt: skip
        gradient_half(
            x_right, columns + BN // 2, end, live, labels, p_row, bias_ptr, a, b, logp, lse, tail,
            entropy, vocabulary, bias_stride, scale, softcap, inverse_temperature,
            BY_LOGP, BY_ENTROPY, BIAS, CAPPED, PRECISE,
        )  # fmt: skip


@triton.jit
def hidden_gradient_kernel(
    d_ptr, w_ptr, rows_ptr, slots_ptr, count_ptr, factor_ptr, out_ptr,
    first_slot, slots_here, width, columns_here, d_stride, w_stride, out_stride,
    FACTOR: tl.constexpr, AT_SLOTS: tl.constexpr, ADD: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[rows] = (factor) d head, or that added: d (slots, columns), head (columns, D)."""
    column_blocks = tl.cdiv(width, BN)
    i_columns = tl.program_id(0) % column_blocks
    i_rows = tl.program_id(0) // column_blocks
    here = i_rows * BM + tl.arange(0, BM)
    count = tl.minimum(tl.load(count_ptr) - first_slot, slots_here)
    if i_rows * BM < count:
        live = here < count
        rows = tl.load(rows_ptr + first_slot + here, mask=live, other=0).to(tl.int64)
        lies = here
        if AT_SLOTS:
            lies = tl.load(slots_ptr + first_slot + here, mask=live, other=0)
        lies = tl.where(live, lies, 0).to(tl.int64)
        columns = i_columns * BN + tl.arange(0, BN)
        o_k = tl.arange(0, BK)
        p_d = d_ptr + (lies * d_stride)[:, None] + o_k[None, :]
        p_w = w_ptr + (o_k.to(tl.int64) * w_stride)[:, None]
        p_w = p_w + (columns % width)[None, :]  # those beyond the last begin again: no mask
        x = tl.zeros([BM, BN], tl.float32)
        for k in range(0, columns_here, BK):
            if EVEN:
                d = tl.load(p_d)
                w = tl.load(p_w)
            else:
                d = tl.load(p_d, mask=(o_k < columns_here - k)[None, :], other=0.0)
                w = tl.load(p_w, mask=(o_k < columns_here - k)[:, None], other=0.0)
            x = multiply(d, w, x, PRECISION)
            p_d += BK
            p_w += BK * w_stride
        if FACTOR:
            x *= tl.load(factor_ptr + first_slot + here, mask=live, other=0.0)[:, None]
        p_out = out_ptr + (rows * out_stride)[:, None] + columns[None, :]
        mask = live[:, None] & (columns < width)[None, :]
        if ADD:
            x += tl.load(p_out, mask=mask, other=0.0)
        tl.store(p_out, narrow(x, out_ptr), mask=mask)


@triton.jit
def weight_gradient_kernel(
    d_ptr, h_ptr, slots_ptr, count_ptr, out_ptr, columns_here, width, d_stride, h_stride,
    out_stride, AT_SLOTS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out (columns, D) = d^T h over the listed tokens: d by slot or in the list's order, h so."""
    column_blocks = tl.cdiv(width, BN)
    i_columns = tl.program_id(0) % column_blocks
    i_rows = tl.program_id(0) // column_blocks
    count = tl.load(count_ptr)
    o_k = tl.arange(0, BK)
    rows = i_rows * BM + tl.arange(0, BM)
    columns = i_columns * BN + tl.arange(0, BN)
    p_d = d_ptr + (rows % columns_here)[None, :]
    p_h = h_ptr + (columns % width)[None, :]
    x = tl.zeros([BM, BN], tl.float32)
    for k in range(0, count, BK):
        here = k + o_k
        live = here < count
        lies = here
        if AT_SLOTS:
            lies = tl.load(slots_ptr + here, mask=live, other=0)
        d = tl.load(p_d + (lies.to(tl.int64) * d_stride)[:, None], mask=live[:, None], other=0.0)
        h = tl.load(p_h + (here.to(tl.int64) * h_stride)[:, None], mask=live[:, None], other=0.0)
        x = multiply(d.T, h, x, PRECISION)
    p_out = out_ptr + (rows.to(tl.int64) * out_stride)[:, None] + columns[None, :]
    mask = (rows < columns_here)[:, None] & (columns < width)[None, :]
    tl.store(p_out, narrow(x, out_ptr), mask=mask)


@triton.jit
def bias_gradient_kernel(
    d_ptr, slots_ptr, count_ptr, factor_ptr, out_ptr, columns_here, d_stride,
    FACTOR: tl.constexpr, AT_SLOTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out (columns,) = sum of (factor) d over the listed tokens."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(count_ptr)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, count, ROWS):
        here = first + tl.arange(0, ROWS)
        live = here < count
        lies = here
        if AT_SLOTS:
            lies = tl.load(slots_ptr + here, mask=live, other=0)
        p_d = d_ptr + (lies.to(tl.int64) * d_stride)[:, None] + columns[None, :]
        mask = live[:, None] & (columns < columns_here)[None, :]
        d = tl.load(p_d, mask=mask, other=0.0).to(tl.float32)
        if FACTOR:
            d *= tl.load(factor_ptr + here, mask=live, other=0.0)[:, None]
        sums += d
    total = tl.sum(sums, 0)
    tl.store(out_ptr + columns, narrow(total, out_ptr), mask=columns < columns_here)


@triton.jit
def factors_kernel(
    logp_ptr, lse_ptr, tail_ptr, t_ptr, a_ptr, rows_ptr, count_ptr, out_ptr, unit,
    HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """By listed token, what turns its row of ratios into a d logp / d logits.

    t: the labels' logits in the list's order, as the forward had them: log p is not taken as it
    was rounded, since its rounding would be that of the whole row.
    """
    here = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = here < tl.load(count_ptr)
    rows = tl.load(rows_ptr + here, mask=live, other=0)
    logp = tl.load(logp_ptr + rows, mask=live, other=0.0)
    factor = tl.load(a_ptr + rows, mask=live, other=0.0).to(tl.float32)
    if not HALF:
        lse = tl.load(lse_ptr + rows, mask=live, other=0.0).to(tl.float64)
        t = tl.load(t_ptr + here, mask=live, other=0.0).to(tl.float64)
        precise = t - lse - tl.load(tail_ptr + rows, mask=live, other=0.0).to(tl.float64)
        divided = -tl.exp(precise).to(tl.float32) * unit
        factor *= tl.where(logp < IMPROBABLE, 1.0, divided)
    tl.store(out_ptr + here, factor, mask=live)


@triton.jit
def listed_rows_kernel(
    x_ptr, rows_ptr, count_ptr, factor_ptr, out_ptr, width, stride, blocks,
    FACTOR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[i] = (factor[i]) x[rows[i]]."""
    here = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    live = here < tl.load(count_ptr)
    rows = tl.load(rows_ptr + here, mask=live, other=0).to(tl.int64)
    mask = live[:, None] & (columns < width)[None, :]
    x = tl.load(x_ptr + (rows * stride)[:, None] + columns[None, :], mask=mask, other=0.0)
    if FACTOR:
        x = x.to(tl.float32) * tl.load(factor_ptr + here, mask=live, other=0.0)[:, None]
    p_out = out_ptr + (here.to(tl.int64) * width)[:, None] + columns[None, :]
    tl.store(p_out, narrow(x, out_ptr), mask=mask)


@triton.jit
def scaled_rows_kernel(
    x_ptr, a_ptr, labels_ptr, out_ptr, n, width, ignore_index, blocks,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = a x by rows (n, D); 0 where the label is ignored or a is 0, whatever x is there."""
    rows = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    labels = tl.load(labels_ptr + rows, mask=rows < n, other=ignore_index)
    a = tl.load(a_ptr + rows, mask=rows < n, other=0.0).to(tl.float32)
    asked = (labels != ignore_index) & (a != 0)
    places = (rows.to(tl.int64) * width)[:, None] + columns[None, :]
    inside = (columns < width)[None, :]
    x = tl.load(x_ptr + places, mask=asked[:, None] & inside, other=0.0).to(tl.float32)
    x = tl.where(asked[:, None], x * a[:, None], 0.0)
    mask = (rows < n)[:, None] & inside
    tl.store(out_ptr + places, narrow(x, out_ptr), mask=mask)


ROWS, BLOCK = 16, 256  # of the kernels that only pass over rows


# --------------------------------------------------------------------------- launches


class Head(NamedTuple):
    """The operands as rows, and the options of the logits."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    ignore_index: int
    temperature: float
    softcap: float | None
    logit_scale: float

    @property
    def unit(self) -> float:
        """dz/dx of logits x where the softcap does not bend."""
        return self.logit_scale / self.temperature

    def transform(self) -> tuple[float, float, float]:
        return self.logit_scale, self.softcap or 0.0, 1.0 / self.temperature

    def flags(self) -> dict[str, bool]:
        return {"BIAS": self.bias is not None, "CAPPED": self.softcap is not None}

    def bias_stride(self) -> int:
        return 0 if self.bias is None else self.bias.stride(0)

    def is_heavy(self, extras: bool) -> bool:
        """Whether much follows a product of logits."""
        return extras or self.bias is not None or self.softcap is not None

    def depth_is_even(self, tile: Tile) -> bool:
        """Whether the steps of a product over D come out even."""
        return self.hidden.shape[1] % tile.depth == 0


def _head(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *options: Any
          ) -> Head:  # fmt: skip
    rows = hidden.reshape(-1, hidden.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    head = weight if weight.stride(1) == 1 else weight.contiguous()
    return Head(rows, head, bias, labels.reshape(-1).contiguous(), *options)


def _precise(x: Tensor) -> bool:
    return x.dtype == torch.float32


def _label_logits(head: Head, tokens: Tokens) -> Tensor:
    """z[label] and its slope, (2, n) by slot."""
    found = head.hidden.new_empty((2, head.labels.numel()), dtype=torch.float32)
    h, w = head.hidden, head.weight
    with on(h):
        label_logits_kernel[(triton.cdiv(found.shape[1], ROWS),)](
            h, w, head.bias, head.labels, tokens.rows, tokens.number, found[0], found[1],
            h.shape[1], w.shape[0], h.stride(0), w.stride(0), head.bias_stride(),
            *head.transform(), **head.flags(), ROWS=ROWS, BLOCK=BLOCK, DEBUG=DEBUG, num_warps=4,
        )  # fmt: skip
    return found


def _fold(
    head: Head, tokens: Tokens, of_labels: Tensor, first: int, slots: int, results: list[Tensor],
    outputs: int, ratios: Tensor | None, factor: Tensor | None,
) -> None:  # fmt: skip
    """Statistics of `slots` slots from `first`, and the ratios of these where there is room."""
    h, w = head.hidden, head.weight
    extras = outputs != 0
    tile = tile_for(h, head.is_heavy(extras))
    splits = splits_of(h, triton.cdiv(slots, tile.rows), triton.cdiv(w.shape[0], tile.columns))
    parts = h.new_empty((FIELDS if extras else 2, splits, slots), dtype=torch.float32)
    store, room = ratios is not None, parts if ratios is None else ratios

    def grid(rows: int, columns: int) -> tuple[int]:
        return (triton.cdiv(slots, rows) * splits,)

    launch(
        fold_kernel, grid, h, tile, h, w, head.bias, head.labels, tokens.rows, tokens.number,
        of_labels[0], parts, room, first, slots, h.shape[1], w.shape[0], h.stride(0), w.stride(0),
        head.bias_stride(), room.stride(0), slots, splits,
        *head.transform(), **head.flags(), STORE=store, EXTRAS=extras,
        HEADROOM=NEAR if extras else FAR, PRECISE=_precise(h), EVEN=head.depth_is_even(tile),
        PRECISION=precision_of(h),
    )  # fmt: skip
    with on(h):
        finish_kernel[(triton.cdiv(slots, ROWS),)](
            parts, tokens.rows, tokens.number, of_labels[0], of_labels[1], head.labels, room,
            parts if factor is None else factor, *results, first, slots, w.shape[0],
            room.stride(0), slots, splits, head.unit,
            *(outputs & bit != 0 for bit in OPTIONAL), STORE=store, ROWS=ROWS, num_warps=1,
        )  # fmt: skip


def _gradient(
    head: Head, tokens: Tokens, a: Tensor | None, b: Tensor | None, statistics: list[Tensor],
    out: Tensor, first_column: int, columns: int, most: int, ones: bool = False,
    at_slots: bool = False,
) -> None:  # fmt: skip
    """d (a logp + b entropy) / d logits of at most `most` listed tokens, over some columns."""
    h, w = head.hidden, head.weight
    tile = tile_for(h, head.is_heavy(b is not None))

    def grid(rows: int, width: int) -> tuple[int]:
        return (triton.cdiv(most, rows) * triton.cdiv(columns, width),)

    launch(
        gradient_kernel, grid, h, tile, h, w, head.bias, head.labels, *tokens, a, b,
        *statistics, out, first_column, columns, h.shape[1], w.shape[0], h.stride(0), w.stride(0),
        head.bias_stride(), out.stride(0), *head.transform(),
        **head.flags(), BY_LOGP=ones or a is not None, BY_ENTROPY=b is not None, ONES=ones,
        AT_SLOTS=at_slots, PRECISE=_precise(h), EVEN=head.depth_is_even(tile),
        PRECISION=precision_of(h),
    )  # fmt: skip


def _hidden_gradient(
    d: Tensor, weight: Tensor, tokens: Tokens, factor: Tensor | None, out: Tensor, first: int,
    slots: int, at_slots: bool = False, add: bool = False,
) -> None:  # fmt: skip
    """out[rows] (+)= (factor) d weight over `slots` listed tokens from `first`."""
    tile = tile_for(weight)
    columns, width = weight.shape

    def grid(rows: int, across: int) -> tuple[int]:
        return (triton.cdiv(slots, rows) * triton.cdiv(width, across),)

    launch(
        hidden_gradient_kernel, grid, weight, tile, d, weight, *tokens, factor, out, first, slots,
        width, columns, d.stride(0), weight.stride(0), out.stride(0),
        FACTOR=factor is not None, AT_SLOTS=at_slots, ADD=add, EVEN=columns % tile.depth == 0,
        PRECISION=precision_of(weight), tunable=not add,
    )  # fmt: skip


def _weight_gradient(
    d: Tensor, hidden: Tensor, tokens: Tokens, out: Tensor, at_slots: bool
) -> None:
    """out (columns, D) = d^T hidden over the listed tokens."""
    tile = tile_for(hidden)
    columns, width = out.shape

    def grid(rows: int, across: int) -> tuple[int]:
        return (triton.cdiv(columns, rows) * triton.cdiv(width, across),)

    launch(
        weight_gradient_kernel, grid, hidden, tile, d, hidden, tokens.slots, tokens.number, out,
        columns, width, d.stride(0), hidden.stride(0), out.stride(0),
        AT_SLOTS=at_slots, PRECISION=precision_of(hidden),
    )  # fmt: skip


def _bias_gradient(
    d: Tensor, tokens: Tokens, factor: Tensor | None, out: Tensor, at_slots: bool
) -> None:
    """out (columns,) = sum of (factor) d over the listed tokens."""
    with on(d):
        bias_gradient_kernel[(triton.cdiv(out.numel(), 64),)](
            d, tokens.slots, tokens.number, factor, out, out.numel(), d.stride(0),
            FACTOR=factor is not None, AT_SLOTS=at_slots, ROWS=64, BLOCK=64, num_warps=4,
        )  # fmt: skip


def _listed_rows(x: Tensor, tokens: Tokens, factor: Tensor | None) -> Tensor:
    """(factor) x of the listed tokens, side by side."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    blocks = triton.cdiv(x.shape[1], BLOCK)
    with on(x):
        listed_rows_kernel[(triton.cdiv(x.shape[0], ROWS) * blocks,)](
            x, tokens.rows, tokens.number, factor, out, x.shape[1], x.stride(0), blocks,
            FACTOR=factor is not None, ROWS=ROWS, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return out


def _scaled_rows(kept: Tensor, a: Tensor, head: Head) -> Tensor:
    """a times what was kept for hidden, 0 for tokens that do not count."""
    out = torch.empty(kept.shape, dtype=kept.dtype, device=kept.device)
    n, width = head.hidden.shape
    blocks = triton.cdiv(width, BLOCK)
    with on(kept):
        scaled_rows_kernel[(triton.cdiv(n, ROWS) * blocks,)](
            kept, a, head.labels, out, n, width, head.ignore_index, blocks, ROWS=ROWS,
            BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return out


# --------------------------------------------------------------------------- the ops


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    outputs: int,
    keep: int,
    workspace: int,
) -> tuple[Tensor, ...]:
    """As `drrlhf.reference.linear_token_logprobs`; a label outside [0, V) gives NaN.

    workspace: bytes for the ratios on their way where they are not kept.
    """
    assert keep != KEEP_SLAB, "a slab of columns is the CPU's; expected KEEP_RATIOS"
    head = _head(hidden, weight, bias, labels, ignore_index, temperature, softcap, logit_scale)
    h, vocabulary = head.hidden, weight.shape[0]
    n = h.shape[0]
    results = [h.new_zeros(labels.shape, dtype=torch.float32) for _ in range(3)]
    for bit in OPTIONAL:
        dtype = torch.bool if bit == reference.IS_TOP1 else torch.float32
        results.append(h.new_zeros(labels.shape if outputs & bit else (0,), dtype=dtype))
    kept = h.new_empty(0)
    if keep == KEEP_HIDDEN:
        kept = torch.zeros(hidden.shape, dtype=h.dtype, device=h.device)
    elif keep == KEEP_RATIOS:
        kept = h.new_empty(n, reference.ratios_width(vocabulary))
    if not n:
        return (*results, kept)

    tokens = compact(head.labels, ignore_index)
    of_labels = _label_logits(head, tokens)
    if keep == KEEP_NOTHING:
        _fold(head, tokens, of_labels, 0, n, results, outputs, None, None)
        return (*results, kept)
    chunk, ratios = n, kept
    if keep == KEEP_HIDDEN:
        chunk = _rows_that_fit(h, vocabulary, workspace)
        ratios = h.new_empty(chunk, reference.ratios_width(vocabulary))
    # float16 holds no ratios: its rows are made from the logits, once these are summed.
    half = h.dtype == torch.float16
    factor = None if half else torch.empty_like(of_labels[0])
    for first in range(0, n, chunk):
        slots = min(chunk, n - first)
        _fold(
            head, tokens, of_labels, first, slots, results, outputs,
            None if half else ratios, factor,
        )  # fmt: skip
        far = _empty_list(head.labels, slots)
        with on(h):
            improbable_kernel[(1,)](
                results[0], tokens.rows, tokens.number, *far, first, slots, EVERY=half,
                LISTED=LISTED, num_warps=8,
            )  # fmt: skip
        _gradient(
            head, far, None, None, results[:4], ratios, 0, vocabulary, slots, ones=True,
            at_slots=True,
        )  # fmt: skip
        if keep == KEEP_HIDDEN:
            rows = kept.view(-1, h.shape[1])
            _hidden_gradient(ratios, head.weight, tokens, factor, rows, first, slots)
    return (*results, kept)


def _rows_that_fit(h: Tensor, vocabulary: int, workspace: int) -> int:
    """Whole tiles of tokens whose ratios fit in the workspace; at least one tile."""
    rows = tile_for(h).rows
    fitting = workspace // (reference.ratios_width(vocabulary) * h.element_size())
    return min(max(rows, fitting // rows * rows), h.shape[0])


def _columns_that_fit(h: Tensor, vocabulary: int, workspace: int) -> int:
    """Whole tiles of the vocabulary whose gradients by all tokens fit; at least one tile."""
    columns = tile_for(h).columns
    fitting = workspace // (h.shape[0] * h.element_size())
    return min(max(columns, fitting // columns * columns), reference.ratios_width(vocabulary))


def linear_token_logprobs_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    grad: Tensor | None,
    grad_entropy: Tensor | None,
    logp: Tensor,
    lse: Tensor,
    lse_tail: Tensor,
    entropy: Tensor,
    kept: Tensor,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    keep: int,
    workspace: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `drrlhf.reference.linear_token_logprobs_backward`, from what was kept where it serves."""
    head = _head(hidden, weight, bias, labels, ignore_index, temperature, softcap, logit_scale)
    h = head.hidden
    n, vocabulary = h.shape[0], weight.shape[0]
    a = None if grad is None else grad.reshape(-1).contiguous()
    b = None if grad_entropy is None else grad_entropy.reshape(-1).contiguous()
    statistics = [x.reshape(-1) for x in (logp, lse, lse_tail, entropy)]
    kind = weight if bias is None else bias
    d_hidden = torch.zeros(hidden.shape if need_hidden else (0,), dtype=h.dtype, device=h.device)
    d_weight = torch.empty(
        weight.shape if need_weight else (0,), dtype=weight.dtype, device=h.device
    )
    d_bias = torch.empty(vocabulary if need_bias else 0, dtype=kind.dtype, device=h.device)
    if not n:
        return d_hidden, d_weight.zero_(), d_bias.zero_()
    if keep == KEEP_HIDDEN and b is None and need_hidden:
        assert a is not None
        d_hidden = _scaled_rows(kept, a, head)
        need_hidden = False
    if not (need_hidden or need_weight or need_bias):
        return d_hidden, d_weight, d_bias

    tokens = compact(head.labels, ignore_index, a, b)
    rows = d_hidden.view(-1, h.shape[1])
    if keep == KEEP_RATIOS and b is None:
        assert a is not None
        factor = torch.empty_like(statistics[0])
        of_labels, _ = _label_logits(head, tokens)
        with on(h):
            factors_kernel[(triton.cdiv(n, 256),)](
                logp, lse, lse_tail, of_labels, a, tokens.rows, tokens.number, factor, head.unit,
                HALF=h.dtype == torch.float16, ROWS=256, num_warps=4,
            )  # fmt: skip
        if need_hidden:
            _hidden_gradient(kept, head.weight, tokens, factor, rows, 0, n, at_slots=True)
        if need_weight:
            listed = _listed_rows(h, tokens, factor)
            _weight_gradient(kept, listed, tokens, d_weight, at_slots=True)
        if need_bias:
            _bias_gradient(kept, tokens, factor, d_bias, at_slots=True)
        return d_hidden, d_weight, d_bias

    listed = _listed_rows(h, tokens, None) if need_weight else h
    step = _columns_that_fit(h, vocabulary, workspace)
    d = h.new_empty(n, step)
    several = step < vocabulary
    total = rows.to(torch.float32) if need_hidden and several else rows
    for first in range(0, vocabulary, step):
        columns = min(step, vocabulary - first)
        _gradient(head, tokens, a, b, statistics, d, first, columns, n)
        part = slice(first, first + columns)
        if need_hidden:
            _hidden_gradient(d, head.weight[part], tokens, None, total, 0, n, add=several)
        if need_weight:
            _weight_gradient(d, listed, tokens, d_weight[part], at_slots=False)
        if need_bias:
            _bias_gradient(d, tokens, None, d_bias[part], at_slots=False)
    if need_hidden and several:
        rows.copy_(total)
    return d_hidden, d_weight, d_bias
