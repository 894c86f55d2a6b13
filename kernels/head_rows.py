"""What the output head does by rows of `hidden`: which tokens take part, their labels' logits, and
the copies that put their rows side by side.

Lists are made on the device and stay there: programs beyond a list's end do nothing, and the host
never learns how long it is.
"""

from __future__ import annotations

import triton
import triton.language as tl
from drrlhf.kernels.launch import DEBUG
from drrlhf.kernels.numerics import narrow
from drrlhf.kernels.softmax import transform

from drrlhf.conventions import IMPROBABLE

IMPROBABLE = tl.constexpr(IMPROBABLE)


@triton.jit
def compact_kernel(
    labels_ptr, a_ptr, b_ptr, rows_ptr, count_ptr, n, ignore_index,
    BY_A: tl.constexpr, BY_B: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Lists the places of the counted tokens that have a gradient a or b other than 0, if given."""
    before = 0
    for first in range(0, n, LISTED):
        o = first + tl.arange(0, LISTED)
        active = tl.load(labels_ptr + o, mask=o < n, other=ignore_index) != ignore_index
        if BY_A or BY_B:
            asked = tl.zeros([LISTED], tl.int1)
            if BY_A:
                asked = asked | (tl.load(a_ptr + o, mask=o < n, other=0.0) != 0)
            if BY_B:
                asked = asked | (tl.load(b_ptr + o, mask=o < n, other=0.0) != 0)
            active = active & asked
        place = before + tl.cumsum(active.to(tl.int32), 0) - 1
        tl.store(rows_ptr + place, o, mask=active)
        before += tl.sum(active.to(tl.int32), 0)
    tl.store(count_ptr, before)


@triton.jit
def improbable_kernel(
    logp_ptr, rows_ptr, count_ptr, listed_ptr, slots_ptr, listed_count_ptr, first_slot, slots,
    EVERY: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Of `slots` slots from `first_slot`, lists those that ratios do not serve: places, slots."""
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


@triton.jit
def active_blocks_kernel(
    factor_ptr, count_ptr, blocks_ptr, blocks_count_ptr, AT_ONCE: tl.constexpr, ROWS: tl.constexpr
):
    """Lists the blocks of ROWS slots in which a factor is not 0."""
    count = tl.load(count_ptr)
    blocks = tl.cdiv(count, ROWS)
    before = 0
    for first in range(0, blocks, AT_ONCE):
        o = first + tl.arange(0, AT_ONCE)
        slots = o[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        asked = tl.load(factor_ptr + slots, mask=slots < count, other=0.0) != 0
        active = tl.max(asked.to(tl.int32), 1)
        tl.store(blocks_ptr + before + tl.cumsum(active, 0) - 1, o, mask=active != 0)
        before += tl.sum(active, 0)
    tl.store(blocks_count_ptr, before)


@triton.jit(debug=DEBUG)
def label_logits_kernel(
    h_ptr, w_ptr, bias_ptr, mean_row_ptr, mean_bias_ptr, labels_ptr, rows_ptr, count_ptr,
    label_ptr, t_ptr, slope_ptr, mean_ptr, width, vocabulary, h_stride, w_stride, bias_stride,
    scale, softcap, inverse_temperature,
    BIAS: tl.constexpr, CAPPED: tl.constexpr, MEAN: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, DEBUG: tl.constexpr,
):  # fmt: skip
    """By slot: the label (-1 if it lies outside [0, V)), t = z[label] (NaN then), dz/dx there.

    Where MEAN, by token the mean of z over the vocabulary (NaN as t): the product with the head's
    mean row.
    """
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
    of_mean = sums
    for first in range(0, width, BLOCK):
        inside = (first + o_d < width)[None, :]
        h = tl.load(p_h + first, mask=live[:, None] & inside, other=0.0).to(tl.float32)
        w = tl.load(p_w + first, mask=(live & known)[:, None] & inside, other=0.0)
        sums += h * w.to(tl.float32)
        if MEAN:
            mean_row = tl.load(mean_row_ptr + first + o_d, mask=first + o_d < width, other=0.0)
            of_mean += h * mean_row[None, :]
    x = tl.sum(sums, 1)
    if BIAS:
        p_bias = bias_ptr + tl.where(known, labels, 0) * bias_stride
        x += tl.load(p_bias, mask=live & known, other=0.0).to(tl.float32)
    t, slope = transform(x, scale, softcap, inverse_temperature, CAPPED)
    tl.store(label_ptr + slots, tl.where(known, labels, -1).to(tl.int32), mask=live)
    tl.store(t_ptr + slots, tl.where(known, t, float("nan")), mask=live)
    tl.store(slope_ptr + slots, slope, mask=live)
    if MEAN:
        mean = tl.sum(of_mean, 1)
        if BIAS:
            mean += tl.load(mean_bias_ptr)
        mean = tl.where(known, mean * scale * inverse_temperature, float("nan"))
        tl.store(mean_ptr + rows, mean, mask=live)


@triton.jit
def factors_kernel(
    logp_ptr, lse_ptr, tail_ptr, t_ptr, a_ptr, rows_ptr, count_ptr, out_ptr, unit,
    HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """By slot, what turns its row of ratios into a d logp / d logits; exactly 0 where a is.

    t: the labels' logits by slot, as the forward had them: log p is not taken as it was rounded,
    since its rounding would be that of the whole row.
    """
    here = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = here < tl.load(count_ptr)
    rows = tl.load(rows_ptr + here, mask=live, other=0)
    logp = tl.load(logp_ptr + rows, mask=live, other=0.0)
    lse = tl.load(lse_ptr + rows, mask=live, other=0.0)
    t = tl.load(t_ptr + here, mask=live, other=0.0).to(tl.float64)
    below = t - lse.to(tl.float64) - tl.load(tail_ptr + rows, mask=live, other=0.0).to(tl.float64)
    factor = factor_of(logp, lse, below, unit, HALF)
    a = tl.load(a_ptr + rows, mask=live, other=0.0).to(tl.float32)
    tl.store(out_ptr + here, tl.where(a == 0, 0.0, a * factor), mask=live)


@triton.jit
def factor_of(logp, lse, below, unit, HALF: tl.constexpr):
    """What turns a row of ratios into d logp / d logits: -p[label] unit, or 1 for a row that was
    made from the logits. below: log p in float64. Rows hold no NaN: it comes back by its factor.
    """
    made = logp < IMPROBABLE
    if HALF:
        made = made | (logp == logp)
    factor = tl.where(made, 1.0, -tl.exp(below).to(tl.float32) * unit)
    return tl.where((logp == logp) & (lse - lse == 0), factor, float("nan"))


@triton.jit
def listed_rows_kernel(
    x_ptr, rows_ptr, count_ptr, factor_ptr, out_ptr, width, x_stride, out_stride, blocks,
    FACTOR: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[i] = (factor[i]) x[rows[i]]; 0 where the factor is, and up to a multiple of PAD rows."""
    here = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(count_ptr)
    live = here < count
    rows = tl.load(rows_ptr + here, mask=live, other=0).to(tl.int64)
    inside = (columns < width)[None, :]
    if FACTOR:
        factor = tl.load(factor_ptr + here, mask=live, other=0.0)
        live = live & (factor != 0)
    p_x = x_ptr + (rows * x_stride)[:, None] + columns[None, :]
    x = tl.load(p_x, mask=live[:, None] & inside, other=0.0)
    if FACTOR:
        x = tl.where(live[:, None], x.to(tl.float32) * factor[:, None], 0.0)
    p_out = out_ptr + (here.to(tl.int64) * out_stride)[:, None] + columns[None, :]
    mask = (here < tl.cdiv(count, PAD) * PAD)[:, None] & inside
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


@triton.jit
def bias_gradient_kernel(
    d_ptr, count_ptr, factor_ptr, out_ptr, columns_here, d_stride,
    FACTOR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out (columns,) = sum of (factor) d over the rows of a list."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(count_ptr)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, count, ROWS):
        here = first + tl.arange(0, ROWS)
        live = here < count
        p_d = d_ptr + (here.to(tl.int64) * d_stride)[:, None] + columns[None, :]
        mask = live[:, None] & (columns < columns_here)[None, :]
        d = tl.load(p_d, mask=mask, other=0.0).to(tl.float32)
        if FACTOR:
            d *= tl.load(factor_ptr + here, mask=live, other=0.0)[:, None]
        sums += d
    total = tl.sum(sums, 0)
    tl.store(out_ptr + columns, narrow(total, out_ptr), mask=columns < columns_here)
