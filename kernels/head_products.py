"""The matrix products of the output head, and what follows them while their tile is in registers.

`fold_kernel` makes logits and leaves of each tile its softmax statistics, a *part* of the
vocabulary, and on request ratios; `finish_kernel` puts the parts together. `gradient_kernel` makes
logits again and from them gradients. `product_kernel` multiplies what these stored.

Exponents are of 2 for narrow dtypes, where the factor log2(e) joins the logits' own scale, and of e
for float32, which shows what that rounds.
"""

from __future__ import annotations

import triton
import triton.language as tl
from drrlhf.kernels.head_rows import factor_of
from drrlhf.kernels.numerics import exp, expm1, narrow, rounded_product
from drrlhf.kernels.softmax import (
    LARGEST,
    LN2,
    LOG2E,
    entropy_of,
    finish,
    log_sum_squares_of,
    transform,
)
from drrlhf.kernels.tiles import PIECES, load_block, multiply, pieces, place_of, store_block

# Of an entry over the label's logit, in nats: from there on a part is measured from its largest
# entry. Far is after the label counts as improbable; an entropy in float32 shows what that costs.
FAR, NEAR = tl.constexpr(31.9), tl.constexpr(1.0)
# Where the fields of a part lie, see `fold_kernel`.
SHIFTED, SQUARED, PLAIN, TOP = (tl.constexpr(i) for i in range(2, 6))
OUTSIDE = tl.constexpr(1 << 30)  # a row that no tensor has: 0 is read there


@triton.jit
def exponents(
    x, bias_ptr, columns, vocabulary, bias_stride, scale, softcap, inverse_temperature,
    BIAS: tl.constexpr, CAPPED: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """z of raw logits x, in units of ln 2 unless PRECISE."""
    if BIAS:
        p_bias = bias_ptr + columns * bias_stride
        x += tl.load(p_bias, mask=columns < vocabulary, other=0.0).to(tl.float32)[None, :]
    if CAPPED:
        z, _ = transform(x, scale, softcap, inverse_temperature, CAPPED)
        return z if PRECISE else z * LOG2E
    else:
        unit = scale * inverse_temperature
        return rounded_product(x, unit) if PRECISE else x * (unit * LOG2E)


@triton.jit
def slope_of(z, softcap, inverse_temperature, PRECISE: tl.constexpr):
    """1 - tanh(u)^2 of what `exponents` made of softcap tanh(u)."""
    whole = softcap * inverse_temperature
    v = z / (whole if PRECISE else whole * LOG2E)
    return (1.0 - v) * (1.0 + v)


@triton.jit
def power(x, PRECISE: tl.constexpr):
    """exp(x), or 2^x unless PRECISE."""
    if PRECISE:
        return exp(x)
    else:
        return tl.exp2(x)


@triton.jit
def labels_of(label_ptr, t_ptr, slots, live, PRECISE: tl.constexpr):
    """Labels of some slots, -1 where there is none, and their logits as far as float32 goes."""
    labels = tl.load(label_ptr + slots, mask=live, other=-1)
    t = tl.load(t_ptr + slots, mask=live, other=0.0)
    if not PRECISE:
        t = t * LOG2E
    # NaN stays.
    return labels, tl.where(t < -LARGEST, -LARGEST, tl.where(t > LARGEST, LARGEST, t))


@triton.jit
def store_nearest(nearest_ptr, rows, slots, y, columns, labels, here):
    """Of rows whose label lies in this piece: its logit as this product made it, and the largest
    before it."""
    if tl.max(here.to(tl.int32), 0) != 0:
        own = tl.where(columns[None, :] == labels[:, None], y, 0.0)
        tl.store(nearest_ptr + rows, tl.sum(own, 1), mask=here)
        earlier = columns[None, :] < labels[:, None]
        before = tl.max(tl.where(earlier, y, float("-inf")), 1)
        tl.store(nearest_ptr + slots + rows, before, mask=here)


@triton.jit
def store_parts(
    p_part, field, m, total, shifted, squares, plain, live,
    ENTROPY: tl.constexpr, SQUARES: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """The statistics of a tile, field by field."""
    tl.store(p_part, m, mask=live)
    tl.store(p_part + field, total, mask=live)
    if ENTROPY:
        tl.store(p_part + SHIFTED * field, shifted, mask=live)
    if SQUARES:
        tl.store(p_part + SQUARED * field, squares, mask=live)
    if MEAN:
        tl.store(p_part + PLAIN * field, plain, mask=live)


@triton.jit
def fold_kernel(
    h_blocks, w_blocks, ratios_blocks, bias_ptr, label_ptr, t_ptr, nearest_ptr, parts_ptr,
    count_ptr, first_slot, slots_here, width, vocabulary, bias_stride, parts_stride,
    scale, softcap, inverse_temperature, programs,
    STORE: tl.constexpr, ENTROPY: tl.constexpr, MEAN: tl.constexpr, TOP1: tl.constexpr,
    SQUARES: tl.constexpr, BIAS: tl.constexpr, CAPPED: tl.constexpr, PRECISE: tl.constexpr,
    RISING: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, DESCRIBED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Logits of `slots_here` slots from `first_slot`, their statistics by tile, ratios where STORE.

    h: the valid rows of hidden side by side, then 0. parts (fields, column blocks, slots), of a
    tile's entries other than the label: the reference m, its logit or, where the largest lies far
    above, that; sum e, e = exp(z - m); on request sum e (z - m); sum e^2; sum z, the label's too;
    the largest. nearest (2 + PIECES, slots), from the label's tile alone, tells whether it comes
    first among equals: its z as this product made it, the largest before it in its piece, and the
    largest of each piece. RISING: z grows with x.
    """
    AS_THEY_ARE: tl.constexpr = RISING and not (BIAS or CAPPED or PRECISE)  # scaled when subtracted
    CLOSE: tl.constexpr = PRECISE and (ENTROPY or SQUARES)
    HEADROOM: tl.constexpr = NEAR if CLOSE else (FAR if PRECISE else FAR * LOG2E)
    PIECE: tl.constexpr = BN // PIECES
    count = tl.maximum(tl.minimum(tl.load(count_ptr) - first_slot, slots_here), 0)
    row_blocks = tl.cdiv(count, BLOCK_ROWS) * (BLOCK_ROWS // BM)  # products read whole blocks
    column_blocks = tl.cdiv(vocabulary, BN)
    field = (tl.zeros([], tl.int64) + column_blocks) * parts_stride
    steps = tl.cdiv(width, BK)
    tl.assume(steps > 0)
    # Counted apart from the loop's tile: the loads of the next one need not wait for this.
    done = tl.program_id(0) - programs
    for tile in tl.range(tl.program_id(0), row_blocks * column_blocks, programs, flatten=True):
        i_rows, i_columns = place_of(tile, row_blocks, column_blocks, GROUP)
        x = tl.zeros([BM, BN], tl.float32)
        for k in range(steps):
            h = load_block(h_blocks, first_slot + i_rows * BM, k * BK, BM, BK, DESCRIBED)
            w = load_block(w_blocks, i_columns * BN, k * BK, BN, BK, DESCRIBED)
            x = multiply(h, w.T, x, PRECISION)
        done += programs
        i_rows, i_columns = place_of(done, row_blocks, column_blocks, GROUP)
        rows = i_rows * BM + tl.arange(0, BM)
        live = rows < count
        labels, t = labels_of(label_ptr, t_ptr, first_slot + rows, live, PRECISE)
        first = i_columns * BN
        unit = scale * inverse_temperature * LOG2E if AS_THEY_ARE else 1.0
        xs = pieces(x, BM, BN)
        others = ()
        top = tl.zeros([BM], tl.float32) - float("inf")
        plain = tl.zeros([BM], tl.float32)
        for i in tl.static_range(PIECES):
            y = xs[i]
            columns = first + i * PIECE + tl.arange(0, PIECE)
            if not AS_THEY_ARE:
                y = exponents(
                    y, bias_ptr, columns, vocabulary, bias_stride, scale, softcap,
                    inverse_temperature, BIAS, CAPPED, PRECISE,
                )  # fmt: skip
            if MEAN:
                if RAGGED:
                    y = tl.where((columns < vocabulary)[None, :], y, 0.0)
                plain += tl.sum(y, 1)
            counts = columns[None, :] != labels[:, None]
            if RAGGED:
                counts = counts & (columns < vocabulary)[None, :]
            if TOP1:
                here = live & (labels // PIECE == i_columns * PIECES + i)
                store_nearest(nearest_ptr, rows, slots_here, y, columns, labels, here)
            y = tl.where(counts, y, float("-inf"))
            others = others + (y,)  # type: ignore[assignment]  # noqa: RUF005
            of_piece = tl.max(y, 1)
            top = tl.maximum(top, of_piece)
            if TOP1:
                mine = live & (labels // BN == i_columns)
                tl.store(nearest_ptr + (2 + i) * slots_here + rows, of_piece, mask=mine)
        p_part = parts_ptr + (tl.zeros([], tl.int64) + i_columns) * parts_stride + rows
        if TOP1:
            tl.store(p_part + TOP * field, top, mask=live)
        m = tl.where(top * unit > t + HEADROOM, top * unit, t)
        total = tl.zeros([BM], tl.float32)
        shifted, squares = total, total
        for i in tl.static_range(PIECES):
            below = others[i] * unit - m[:, None]
            e = power(below, PRECISE)
            total += tl.sum(e, 1)
            if ENTROPY:
                # Where e is 0 its factor may be infinite.
                shifted += tl.sum(e * tl.maximum(below, -200.0), 1)
            if SQUARES:
                squares += tl.sum(e * e, 1)
            if STORE:
                if CLOSE:  # its reference has left the label
                    e = e * power(tl.minimum(m - t, 80.0), PRECISE)[:, None]
                if CAPPED:
                    e = e * slope_of(others[i], softcap, inverse_temperature, PRECISE)
                # A row without an answer must not reach others through a product: `factor_of`.
                e = tl.where(e == e, e, 0.0)
                store_block(ratios_blocks, i_rows * BM, first + i * PIECE, e, DESCRIBED)
        store_parts(
            p_part, field, m, total, shifted, squares, plain * unit, live, ENTROPY, SQUARES, MEAN
        )


@triton.jit
def finish_kernel(
    parts_ptr, nearest_ptr, rows_ptr, count_ptr, label_ptr, t_ptr, slope_ptr, ratios_ptr,
    factor_ptr, logp_ptr, lse_ptr, tail_ptr, entropy_ptr, mean_ptr, top1_ptr, squares_ptr,
    first_slot, slots_here, vocabulary, ratios_stride, parts_stride, parts, unit, mean_unit,
    ENTROPY: tl.constexpr, MEAN: tl.constexpr, TOP1: tl.constexpr, SQUARES: tl.constexpr,
    STORE: tl.constexpr, FACTOR: tl.constexpr, PRECISE: tl.constexpr,
    ROWS: tl.constexpr, AT_ONCE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Puts the parts of the vocabulary together; statistics go to the tokens' places.

    Where STORE, the label's place in the ratios too; where FACTOR, by slot of these, what turns a
    row of them into d logp / d logits.
    """
    here = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = here < tl.minimum(tl.load(count_ptr) - first_slot, slots_here)
    slots = first_slot + here
    rows = tl.load(rows_ptr + slots, mask=live, other=0)
    t = tl.load(t_ptr + slots, mask=live, other=0.0)
    field = (tl.zeros([], tl.int64) + parts) * parts_stride
    o_part = tl.arange(0, AT_ONCE)
    reference = tl.zeros([ROWS], tl.float32) - float("inf")
    lost = tl.zeros([ROWS], tl.int1)
    for first in range(0, parts, AT_ONCE):
        p = parts_ptr + (first + o_part)[:, None] * parts_stride + here[None, :]
        mask = (first + o_part < parts)[:, None] & live[None, :]
        m = tl.load(p, mask=mask, other=float("-inf"))
        lost = lost | (tl.max((m != m).to(tl.int32), 0) != 0)
        reference = tl.maximum(reference, tl.max(m, 0))
    reference = tl.where(lost, float("nan"), reference)
    UNIT: tl.constexpr = 1.0 if PRECISE else LN2
    r = reference.to(tl.float64)
    total = tl.zeros([ROWS], tl.float64)
    shifted, squares, plain = total, total, total
    labels = tl.load(label_ptr + slots, mask=live, other=-1)
    of_label = labels // BN
    before = tl.zeros([ROWS], tl.float32) - float("inf")
    after = before
    for first in range(0, parts, AT_ONCE):
        p = parts_ptr + (first + o_part)[:, None] * parts_stride + here[None, :]
        mask = (first + o_part < parts)[:, None] & live[None, :]
        m = tl.load(p, mask=mask, other=float("-inf"))  # a part that is none is 0 of anything
        rise = (m.to(tl.float64) - r[None, :]) * UNIT
        e = tl.exp(rise)
        part = tl.load(p + field, mask=mask, other=0.0).to(tl.float64)
        total += tl.sum(e * part, 0)
        if ENTROPY:
            of_part = tl.load(p + SHIFTED * field, mask=mask, other=0.0).to(tl.float64) * UNIT
            shifted += tl.sum(e * (of_part + tl.where(part > 0, rise * part, 0.0)), 0)
        if SQUARES:
            of_part = tl.load(p + SQUARED * field, mask=mask, other=0.0).to(tl.float64)
            squares += tl.sum(e * e * of_part, 0)
        if MEAN:
            plain += tl.sum(tl.load(p + PLAIN * field, mask=mask, other=0.0).to(tl.float64), 0)
        if TOP1:
            top = tl.load(p + TOP * field, mask=mask, other=float("-inf"))
            is_before = (first + o_part)[:, None] < of_label[None, :]
            is_after = (first + o_part)[:, None] > of_label[None, :]
            before = tl.maximum(before, tl.max(tl.where(is_before, top, float("-inf")), 0))
            after = tl.maximum(after, tl.max(tl.where(is_after, top, float("-inf")), 0))
    logp, lse, tail, u, below, log_sum, whole = finish(t, r * UNIT, total)
    tl.store(logp_ptr + rows, logp, mask=live)
    tl.store(lse_ptr + rows, lse, mask=live)
    tl.store(tail_ptr + rows, tail, mask=live)
    if ENTROPY:
        entropy = entropy_of(u, log_sum, whole, shifted)
        tl.store(entropy_ptr + rows, entropy.to(tl.float32), mask=live)
    if MEAN:
        mean = tl.where(labels >= 0, plain * mean_unit, float("nan"))
        tl.store(mean_ptr + rows, mean.to(tl.float32), mask=live)
    if TOP1:
        own = tl.load(nearest_ptr + here, mask=live, other=0.0)
        nearest = tl.load(nearest_ptr + slots_here + here, mask=live, other=0.0)
        before = tl.maximum(before, nearest)
        for i in tl.static_range(PIECES):
            top = tl.load(nearest_ptr + (2 + i) * slots_here + here, mask=live, other=0.0)
            place = labels // (BN // PIECES)
            before = tl.where(of_label * PIECES + i < place, tl.maximum(before, top), before)
            after = tl.where(of_label * PIECES + i >= place, tl.maximum(after, top), after)
        # Comparisons with a largest leave NaN out, `below` does not.
        top1 = (below == below) & (own > before) & (own >= after)
        tl.store(top1_ptr + rows, top1, mask=live)
    if SQUARES:
        log_squares = log_sum_squares_of(u, log_sum, squares)
        tl.store(squares_ptr + rows, log_squares.to(tl.float32), mask=live)
    if STORE:
        rest = -expm1(-below) * tl.load(slope_ptr + slots, mask=live, other=0.0)
        rest = tl.where(rest == rest, rest, 0.0)
        p_own = ratios_ptr + here.to(tl.int64) * ratios_stride + labels
        tl.store(p_own, narrow(rest.to(tl.float32), ratios_ptr), mask=live & (labels >= 0))
    if FACTOR:
        tl.store(factor_ptr + slots, factor_of(logp, lse, below, unit, not STORE), mask=live)


# --------------------------------------------------------------------------- gradients


@triton.jit
def gradient_kernel(
    h_blocks, w_blocks, out_blocks, bias_ptr, labels_ptr, rows_ptr, slots_ptr, count_ptr, a_ptr,
    b_ptr, logp_ptr, lse_ptr, tail_ptr, entropy_ptr, out_ptr, most, first_column, columns_here,
    width, vocabulary, bias_stride, out_stride, scale, softcap, inverse_temperature, programs,
    BY_LOGP: tl.constexpr, BY_ENTROPY: tl.constexpr, ONES: tl.constexpr, AT_SLOTS: tl.constexpr,
    BIAS: tl.constexpr, CAPPED: tl.constexpr, PRECISE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, DESCRIBED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """d (a logp + b entropy) / d logits of the listed tokens, over some columns, from the logits.

    h: the listed rows of hidden side by side. Row i of the result is that of listed token i, or
    lies at its slot. ONES: a is 1 for every token.
    """
    count = tl.minimum(tl.load(count_ptr), most)
    row_blocks = tl.cdiv(count, BLOCK_ROWS) * (BLOCK_ROWS // BM)
    column_blocks = tl.cdiv(columns_here, BN)
    steps = tl.cdiv(width, BK)
    tl.assume(steps > 0)
    PIECE: tl.constexpr = BN // PIECES
    unit = scale * inverse_temperature
    done = tl.program_id(0) - programs
    for tile in tl.range(tl.program_id(0), row_blocks * column_blocks, programs, flatten=True):
        i_rows, i_columns = place_of(tile, row_blocks, column_blocks, GROUP)
        x = tl.zeros([BM, BN], tl.float32)
        for k in range(steps):
            h = load_block(h_blocks, i_rows * BM, k * BK, BM, BK, DESCRIBED)
            i_w = first_column + i_columns * BN
            w = load_block(w_blocks, i_w, k * BK, BN, BK, DESCRIBED)
            x = multiply(h, w.T, x, PRECISION)
        done += programs
        i_rows, i_columns = place_of(done, row_blocks, column_blocks, GROUP)
        here = i_rows * BM + tl.arange(0, BM)
        live = here < count
        tokens = tl.load(rows_ptr + here, mask=live, other=0)
        labels = tl.load(labels_ptr + tokens, mask=live, other=-1)
        logp = tl.load(logp_ptr + tokens, mask=live, other=0.0)
        # Rows behind the last token become 0.
        lse = tl.load(lse_ptr + tokens, mask=live, other=float("inf"))
        tail = tl.load(tail_ptr + tokens, mask=live, other=0.0)
        if not PRECISE:
            lse = ((lse.to(tl.float64) + tail.to(tl.float64)) * LOG2E).to(tl.float32)
        a = tl.zeros([BM], tl.float32) + unit
        b = a
        entropy = a
        if BY_LOGP and not ONES:
            a = tl.load(a_ptr + tokens, mask=live, other=0.0).to(tl.float32) * unit
        if BY_ENTROPY:
            b = tl.load(b_ptr + tokens, mask=live, other=0.0).to(tl.float32) * unit
            entropy = tl.load(entropy_ptr + tokens, mask=live, other=0.0)
        own = -expm1(logp.to(tl.float64)).to(tl.float32) * a
        rows = here
        if AT_SLOTS:
            rows = tl.load(slots_ptr + here, mask=live, other=0)
        xs = pieces(x, BM, BN)
        for i in tl.static_range(PIECES):
            first = i_columns * BN + i * PIECE
            columns = first_column + first + tl.arange(0, PIECE)
            z = exponents(
                xs[i], bias_ptr, columns, vocabulary, bias_stride, scale, softcap,
                inverse_temperature, BIAS, CAPPED, PRECISE,
            )  # fmt: skip
            log_p = z - lse[:, None]
            if PRECISE:
                log_p = log_p - tail[:, None]
            p = power(log_p, PRECISE)
            d = tl.zeros_like(p)
            if BY_LOGP:
                # The label as -expm1(logp): 1 - p cancels exactly where tuned models live.
                d = tl.where(columns[None, :] == labels[:, None], own[:, None], -p * a[:, None])
            if BY_ENTROPY:
                if not PRECISE:
                    log_p = log_p * LN2
                d -= b[:, None] * tl.where(p > 0, p * (log_p + entropy[:, None]), 0.0)
            if CAPPED:
                d = d * slope_of(z, softcap, inverse_temperature, PRECISE)
            if AT_SLOTS:
                # A row without an answer must not reach others through a product: `factor_of`.
                d = tl.where(d == d, d, 0.0)
                p_out = out_ptr + (rows.to(tl.int64) * out_stride)[:, None] + columns[None, :]
                mask = live[:, None] & (columns < vocabulary)[None, :]
                tl.store(p_out, narrow(d, out_ptr), mask=mask)
            else:
                store_block(out_blocks, i_rows * BM, first, d, DESCRIBED)


@triton.jit
def looked_up(blocks_ptr, i, BLOCK_ROWS: tl.constexpr):
    """The slot that is the i-th of listed blocks."""
    return tl.load(blocks_ptr + i // BLOCK_ROWS) * BLOCK_ROWS + i % BLOCK_ROWS


@triton.jit
def product_kernel(
    a_blocks, b_blocks, rows_ptr, blocks_ptr, blocks_count_ptr, count_ptr, factor_ptr, out_ptr,
    first_slot, most, width, depth, out_stride, splits, programs,
    ACROSS: tl.constexpr, LISTED: tl.constexpr, PARTIAL: tl.constexpr, FACTOR: tl.constexpr,
    ADD: tl.constexpr, BLOCK_ROWS: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIBED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out (rows, width) = a b for a (slots, depth), or a^T b for a (slots, rows) where ACROSS.

    Of a's slots, those of a list count: `most` at most, from the list's `first_slot`. The result
    of slot i goes to row rows[first_slot + i], times its factor, and is added where ADD; ACROSS,
    that of column i to row i. LISTED: of the slots, only some blocks of BLOCK_ROWS have part.
    PARTIAL: the depth in `splits` parts, each part's sums by slot, one behind the other.
    """
    count = tl.minimum(tl.load(count_ptr) - first_slot, most)
    of_count = tl.cdiv(tl.maximum(count, 0), BLOCK_ROWS)
    if LISTED:
        of_count = tl.load(blocks_count_ptr)
    if ACROSS:
        row_blocks = tl.cdiv(depth, BM)
        steps = of_count * (BLOCK_ROWS // BK)
    else:
        row_blocks = of_count * (BLOCK_ROWS // BM)
        steps = tl.cdiv(depth, BK)
    column_blocks = tl.cdiv(width, BN)
    in_part = row_blocks * column_blocks
    each = tl.maximum(tl.cdiv(steps, splits), 1)
    tl.assume(each > 0)
    PIECE: tl.constexpr = BN // PIECES
    done = tl.program_id(0) - programs
    for tile in tl.range(tl.program_id(0), in_part * splits, programs, flatten=True):
        part = tile // in_part
        i_rows, i_columns = place_of(tile % in_part, row_blocks, column_blocks, GROUP)
        first_step = part * each
        i_row = i_rows * BM
        if LISTED and not ACROSS:
            i_row = looked_up(blocks_ptr, i_row, BLOCK_ROWS)
        x = tl.zeros([BM, BN], tl.float32)
        for k in range(each):
            step = first_step + k
            i_deep = step * BK
            if LISTED and ACROSS:
                i_deep = looked_up(blocks_ptr, tl.where(step < steps, i_deep, 0), BLOCK_ROWS)
            i_deep = tl.where(step < steps, i_deep, OUTSIDE)
            b = load_block(b_blocks, i_deep, i_columns * BN, BK, BN, DESCRIBED)
            if ACROSS:
                a = load_block(a_blocks, i_deep, i_row, BK, BM, DESCRIBED)
                x = multiply(a.T, b, x, PRECISION)
            else:
                a = load_block(a_blocks, i_row, i_deep, BM, BK, DESCRIBED)
                x = multiply(a, b, x, PRECISION)
        done += programs
        part = done // in_part
        i_rows, i_columns = place_of(done % in_part, row_blocks, column_blocks, GROUP)
        i_row = i_rows * BM
        if LISTED and not ACROSS:
            i_row = looked_up(blocks_ptr, i_row, BLOCK_ROWS)
        here = i_row + tl.arange(0, BM)
        live = here < (depth if ACROSS else count)
        if PARTIAL:
            to = (part.to(tl.int64) * (depth if ACROSS else most) + here) * width
        elif ACROSS:
            to = here.to(tl.int64) * out_stride
        else:
            row = tl.load(rows_ptr + first_slot + here, mask=live, other=0)
            to = row.to(tl.int64) * out_stride
        if FACTOR:
            factor = tl.load(factor_ptr + first_slot + here, mask=live, other=0.0)
        xs = pieces(x, BM, BN)
        for i in tl.static_range(PIECES):
            columns = i_columns * BN + i * PIECE + tl.arange(0, PIECE)
            y = xs[i]
            if FACTOR:
                y = tl.where((factor != 0)[:, None], y * factor[:, None], 0.0)
            p_out = out_ptr + to[:, None] + columns[None, :]
            mask = live[:, None] & (columns < width)[None, :]
            if ADD:
                y += tl.load(p_out, mask=mask, other=0.0)
            tl.store(p_out, narrow(y, out_ptr), mask=mask)


@triton.jit
def sum_parts_kernel(
    parts_ptr, rows_ptr, count_ptr, factor_ptr, out_ptr, first_slot, most, width, out_stride,
    splits, blocks, ACROSS: tl.constexpr, FACTOR: tl.constexpr, ADD: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Puts the parts of `product_kernel` (splits, most, width) together, and where they belong."""
    here = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    live = here < most
    row = here
    if not ACROSS:
        live = here < tl.minimum(tl.load(count_ptr) - first_slot, most)
        row = tl.load(rows_ptr + first_slot + here, mask=live, other=0)
    inside = (columns < width)[None, :]
    known = live
    if FACTOR:
        factor = tl.load(factor_ptr + first_slot + here, mask=live, other=0.0)
        known = live & (factor != 0)
    p_part = parts_ptr + (here.to(tl.int64) * width)[:, None] + columns[None, :]
    x = tl.zeros([ROWS, BLOCK], tl.float32)
    for _ in range(0, splits):
        x += tl.load(p_part, mask=known[:, None] & inside, other=0.0)
        p_part += (tl.zeros([], tl.int64) + most) * width
    if FACTOR:
        x = tl.where(known[:, None], x * factor[:, None], 0.0)
    p_out = out_ptr + (row.to(tl.int64) * out_stride)[:, None] + columns[None, :]
    mask = live[:, None] & inside
    if ADD:
        x += tl.load(p_out, mask=mask, other=0.0)
    tl.store(p_out, narrow(x, out_ptr), mask=mask)
