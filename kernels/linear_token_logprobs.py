"""`linear_token_logprobs`: logits are made tile by tile and never held in float32.

In units of one product of all tokens with the head:

    scoring         fold                                     1
    frozen head     fold, storing ratios; hidden gradient    2
    trained head    fold; gradient, both products            4, or 3 with the ratios kept

A *ratio* is p[v] / p[label] = exp(z[v] - z[label]): it is known as soon as its tile is, before the
sum over the vocabulary is, so the pass that finds the log-probs also leaves the operand of the next
product. A row of ratios with minus the sum of the others in the label's place is d logp / d logits
divided by -p[label]; the division is undone in float32 after the product. Where the label is too
improbable for that (`IMPROBABLE`), the row is made again from the logits by the gradient kernel.

Only counted tokens take part: `compact` lists them on the device, `rows_of` puts their rows side by
side, and the host never learns how many they are. A token's log-prob is summed in the same order
whoever else is in the batch.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from drrlhf.kernels import head_products, head_rows
from drrlhf.kernels.launch import DEBUG, on
from drrlhf.kernels.tiles import (
    BLOCK_ROWS,
    PIECES,
    Tile,
    aligned_columns,
    blocks_of,
    describable,
    launch,
    precision_of,
    processors_of,
    tile_for,
)
from torch import Tensor

from drrlhf.conventions import (
    ENTROPY,
    IS_TOP1,
    LOG_SUM_SQ_PROBS,
    MEAN_LOGIT,
    HeadGradient,
    Keep,
    empty_statistics,
    row_width,
)

ROWS, BLOCK = 16, 256  # of the kernels that only pass over rows
AT_ONCE = 64  # parts that `finish_kernel` reads together
LISTED = 2048  # tokens that a kernel which lists them looks at together
LEAST_STEPS = 16  # of a part of a product's depth
# Of the workspace, what parts may take; logits have the rest.
SHARE_OF_PARTS = 8


class Tokens(NamedTuple):
    """A list on the device: rows (n,) of hidden, and how many these are ()."""

    rows: Tensor
    number: Tensor


class Labels(NamedTuple):
    """By slot (n,): the label or -1, its logit z, dz/dx there."""

    label: Tensor
    logit: Tensor
    slope: Tensor


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

    @property
    def precise(self) -> bool:
        """Whether exponents are natural and exact to float32's last digits."""
        return self.hidden.dtype == torch.float32

    def transform(self) -> tuple[float, float, float]:
        return self.logit_scale, self.softcap or 0.0, 1.0 / self.temperature

    def flags(self) -> dict[str, Any]:
        return {
            "BIAS": self.bias is not None,
            "CAPPED": self.softcap is not None,
            "PRECISE": self.precise,
            "PRECISION": precision_of(self.hidden),
            "BLOCK_ROWS": BLOCK_ROWS,
        }

    def tile(self, stores: bool) -> Tile:
        """Of products that make logits. A bias or softcap wants registers beside them."""
        bent = self.bias is not None or self.softcap is not None
        return tile_for(self.weight, stores, small=bent)

    def bias_stride(self) -> int:
        return 0 if self.bias is None else self.bias.stride(0)


def _head(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *options: Any
          ) -> Head:  # fmt: skip
    rows = hidden.reshape(-1, hidden.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    return Head(rows, describable(weight), bias, labels.reshape(-1).contiguous(), *options)


# --------------------------------------------------------------------------- rows


def _empty_list(n: int, like: Tensor) -> Tokens:
    """The number first: a pointer to the end of n entries has another alignment for every n, and
    kernels are compiled for alignments.
    """
    room = torch.empty(n + 4, dtype=torch.int32, device=like.device)
    return Tokens(room[4:], room[0])


def compact(
    labels: Tensor, ignore_index: int, a: Tensor | None = None, b: Tensor | None = None
) -> Tokens:
    """The counted tokens; with gradients, those of them that one of these is not 0 for."""
    n = labels.numel()
    tokens = _empty_list(n, labels)
    with on(labels):
        head_rows.compact_kernel[(1,)](
            labels, labels if a is None else a, labels if b is None else b, *tokens, n,
            ignore_index, BY_A=a is not None, BY_B=b is not None, LISTED=LISTED, num_warps=8,
        )  # fmt: skip
    return tokens


def rows_of(x: Tensor, tokens: Tokens, most: int, factor: Tensor | None = None) -> Tensor:
    """(factor) x of at most `most` listed tokens, side by side, for a descriptor to take.

    Rows behind the last of them are 0 as far as blocks of `BLOCK_ROWS` reach.
    """
    width = x.shape[1]
    room = triton.cdiv(max(most, 1), BLOCK_ROWS) * BLOCK_ROWS
    out = x.new_empty(room, aligned_columns(x, width))
    blocks = triton.cdiv(width, BLOCK)
    with on(x):
        head_rows.listed_rows_kernel[(room // ROWS * blocks,)](
            x, *tokens, factor, out, width, x.stride(0), out.stride(0), blocks,
            FACTOR=factor is not None, PAD=BLOCK_ROWS, ROWS=ROWS, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return out[:, :width]


def _labels(head: Head, tokens: Tokens, mean: Tensor | None = None) -> Labels:
    """mean: where the mean of z goes, by token; a softcap leaves no product for it."""
    h, w = head.hidden, head.weight
    n = head.labels.numel()
    found = Labels(
        h.new_empty(n, dtype=torch.int32), *h.new_empty((2, n), dtype=torch.float32).unbind()
    )
    row = kind = None
    if mean is not None:
        row = w.sum(0, dtype=torch.float32) / w.shape[0]
        kind = None if head.bias is None else head.bias.mean(dtype=torch.float32)
    with on(h):
        head_rows.label_logits_kernel[(triton.cdiv(n, ROWS),)](
            h, w, head.bias, row, kind, head.labels, *tokens, *found, mean, h.shape[1], w.shape[0],
            h.stride(0), w.stride(0), head.bias_stride(), *head.transform(),
            BIAS=head.bias is not None, CAPPED=head.softcap is not None, MEAN=mean is not None,
            ROWS=ROWS, BLOCK=BLOCK, DEBUG=DEBUG, num_warps=4,
        )  # fmt: skip
    return found


def _improbable(
    logp: Tensor, tokens: Tokens, first: int, slots: int, every: bool
) -> tuple[Tokens, Tensor]:
    """Of `slots` slots from `first`, those whose rows of ratios are made from the logits."""
    listed = _empty_list(slots, logp)
    at = torch.empty_like(listed.rows)
    with on(logp):
        head_rows.improbable_kernel[(1,)](
            logp, *tokens, listed.rows, at, listed.number, first, slots, EVERY=every,
            LISTED=LISTED, num_warps=8,
        )  # fmt: skip
    return listed, at


def _factors(head: Head, tokens: Tokens, statistics: list[Tensor], a: Tensor) -> Tensor:
    """By slot, what turns kept ratios into a d logp / d logits."""
    factor = torch.empty_like(statistics[0])
    logit = _labels(head, tokens).logit
    with on(factor):
        head_rows.factors_kernel[(triton.cdiv(factor.numel(), 256),)](
            *statistics[:3], logit, a, *tokens, factor, head.unit,
            HALF=head.hidden.dtype == torch.float16, ROWS=256, num_warps=4,
        )  # fmt: skip
    return factor


def _active_blocks(factor: Tensor, tokens: Tokens) -> Tokens:
    """Blocks of slots in which a factor is not 0."""
    listed = _empty_list(triton.cdiv(factor.numel(), BLOCK_ROWS), factor)
    with on(factor):
        head_rows.active_blocks_kernel[(1,)](
            factor, tokens.number, *listed, AT_ONCE=16, ROWS=BLOCK_ROWS, num_warps=4
        )
    return listed


def _scaled_rows(kept: Tensor, a: Tensor, head: Head) -> Tensor:
    """a times what was kept for hidden, 0 for tokens that do not count."""
    out = torch.empty(kept.shape, dtype=kept.dtype, device=kept.device)
    n, width = head.hidden.shape
    blocks = triton.cdiv(width, BLOCK)
    with on(kept):
        head_rows.scaled_rows_kernel[(triton.cdiv(n, ROWS) * blocks,)](
            kept, a, head.labels, out, n, width, head.ignore_index, blocks, ROWS=ROWS,
            BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return out


def _bias_gradient(d: Tensor, tokens: Tokens, factor: Tensor | None, out: Tensor) -> None:
    """out (columns,) = sum of (factor) d over the listed tokens."""
    with on(d):
        head_rows.bias_gradient_kernel[(triton.cdiv(out.numel(), 64),)](
            d, tokens.number, factor, out, out.numel(), d.stride(0),
            FACTOR=factor is not None, ROWS=64, BLOCK=64, num_warps=4,
        )  # fmt: skip


# --------------------------------------------------------------------------- products


def _outputs(head: Head, bits: int) -> dict[str, bool]:
    """What is found from the tiles of logits."""
    return {
        "ENTROPY": bits & ENTROPY != 0,
        "MEAN": bits & MEAN_LOGIT != 0 and head.softcap is not None,
        "TOP1": bits & IS_TOP1 != 0,
        "SQUARES": bits & LOG_SUM_SQ_PROBS != 0,
    }


def _ratios(d: Tensor, head: Head) -> Tensor:
    """The columns of rows of ratios that are the vocabulary's."""
    return d[:, : head.weight.shape[0]]


def _fold(
    head: Head, h: Tensor, tokens: Tokens, labels: Labels, first: int, slots: int,
    results: list[Tensor], outputs: int, ratios: Tensor | None, factor: Tensor | None,
) -> None:  # fmt: skip
    """Statistics of `slots` slots from `first`, their ratios and factors where there is room.

    h: the counted rows of hidden, from slot 0.
    """
    w = head.weight
    vocabulary, width = w.shape
    store = ratios is not None
    tile = head.tile(store)
    parts = triton.cdiv(vocabulary, tile.columns)
    room = h.new_empty((_fields(head, outputs), parts, slots), dtype=torch.float32)
    nearest = h.new_empty((2 + PIECES.value, slots), dtype=torch.float32)
    d = h if ratios is None else _ratios(ratios, head)
    flags, wanted = head.flags(), _outputs(head, outputs)
    launch(
        head_products.fold_kernel, triton.cdiv(slots, tile.rows) * parts, w, tile,
        blocks_of(h, tile.rows, tile.depth), blocks_of(w, tile.columns, tile.depth),
        blocks_of(d, tile.rows, tile.columns // PIECES.value), head.bias, labels.label,
        labels.logit, nearest, room, tokens.number, first, slots, width, vocabulary,
        head.bias_stride(), slots, *head.transform(), **flags, **wanted, STORE=store,
        RISING=head.unit > 0, RAGGED=vocabulary % tile.columns != 0,
    )  # fmt: skip
    unit = 1.0 if head.precise else math.log(2)  # of a logit, see `exponents`
    with on(h):
        head_products.finish_kernel[(triton.cdiv(slots, ROWS),)](
            room, nearest, *tokens, *labels, d, room if factor is None else factor, *results,
            first, slots, vocabulary, d.stride(0), slots, parts, head.unit, unit / vocabulary,
            **wanted, STORE=store, FACTOR=factor is not None, PRECISE=head.precise, ROWS=ROWS,
            AT_ONCE=AT_ONCE, BN=tile.columns, num_warps=4,
        )  # fmt: skip


def _fields(head: Head, outputs: int) -> int:
    """Fields of a part that are held: as far as the last one asked for."""
    wanted = _outputs(head, outputs)
    last = {
        "ENTROPY": head_products.SHIFTED, "SQUARES": head_products.SQUARED,
        "MEAN": head_products.PLAIN, "TOP1": head_products.TOP,
    }  # fmt: skip
    return 1 + max([1, *(last[name].value for name, asked in wanted.items() if asked)])


def _gradient(
    head: Head, h: Tensor, tokens: Tokens, a: Tensor | None, b: Tensor | None,
    statistics: list[Tensor], out: Tensor, most: int, first_column: int, columns: int,
    at: Tensor | None = None,
) -> None:  # fmt: skip
    """d (a logp + b entropy) / d logits of at most `most` listed tokens, over some columns.

    h: the listed rows of hidden. at: where each row of the result goes, and a is 1 for every token.
    """
    w = head.weight
    tile = head.tile(True)
    launch(
        head_products.gradient_kernel,
        triton.cdiv(most, tile.rows) * triton.cdiv(columns, tile.columns), w, tile,
        blocks_of(h, tile.rows, tile.depth), blocks_of(w, tile.columns, tile.depth),
        blocks_of(out[:, :columns], tile.rows, tile.columns // PIECES.value), head.bias,
        head.labels, tokens.rows, at, tokens.number, a, b, *statistics, out, most, first_column,
        columns, w.shape[1], w.shape[0], head.bias_stride(), out.stride(0), *head.transform(),
        **head.flags(), BY_LOGP=at is not None or a is not None, BY_ENTROPY=b is not None,
        ONES=at is not None, AT_SLOTS=at is not None,
    )  # fmt: skip


def _product(
    a: Tensor, b: Tensor, tokens: Tokens, out: Tensor, first: int, most: int, *,
    across: bool = False, factor: Tensor | None = None, blocks: Tokens | None = None,
    add: bool = False,
) -> None:  # fmt: skip
    """out[rows] (+)= (factor) a b over `most` slots from `first`; out = a^T b where across.

    A product of few tiles is taken in several parts of its depth, for as many programs.
    """
    width = b.shape[1]
    depth = a.shape[1]
    tile = tile_for(b, across)
    if across and blocks is not None:
        tile = tile.looked_up()
    rows = depth if across else most
    tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(width, tile.columns)
    steps = triton.cdiv(most if across else depth, tile.depth)
    splits = max(1, min(processors_of(b) // tiles, steps // LEAST_STEPS))
    partial = splits > 1
    to = out
    if partial:
        to = out.new_empty((splits, rows, width), dtype=torch.float32)
    # Operands lie as they are multiplied: slots by depth, or slots by rows.
    of_a = (tile.depth, tile.rows) if across else (tile.rows, tile.depth)
    listed = tokens if blocks is None else blocks
    launch(
        head_products.product_kernel, tiles * splits, b, tile, blocks_of(a, *of_a),
        blocks_of(b, tile.depth, tile.columns), tokens.rows, *listed, tokens.number, factor, to,
        first, most, width, depth, out.stride(0), splits, ACROSS=across,
        LISTED=blocks is not None, PARTIAL=partial,
        FACTOR=factor is not None and not partial and not across, ADD=add and not partial,
        BLOCK_ROWS=BLOCK_ROWS, PRECISION=precision_of(b),
    )  # fmt: skip
    if partial:
        across_blocks = triton.cdiv(width, BLOCK)
        with on(out):
            head_products.sum_parts_kernel[(triton.cdiv(rows, ROWS) * across_blocks,)](
                to, *tokens, factor, out, first, rows, width, out.stride(0), splits,
                across_blocks, ACROSS=across, FACTOR=factor is not None and not across, ADD=add,
                ROWS=ROWS, BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip


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

    workspace: bytes for the statistics of parts, and for the ratios on their way where they are
    not kept.
    """
    assert keep != Keep.COLUMNS, "columns are the CPU's; expected Keep.RATIOS"
    head = _head(hidden, weight, bias, labels, ignore_index, temperature, softcap, logit_scale)
    h, vocabulary = head.hidden, weight.shape[0]
    n = h.shape[0]
    results = [x.zero_() for x in empty_statistics(h, labels.shape, outputs)]
    # float16 holds no ratios: its rows are made from the logits, once these are summed.
    half = h.dtype == torch.float16
    kept = h.new_empty(0)
    if keep == Keep.HIDDEN:
        kept = torch.zeros(hidden.shape, dtype=h.dtype, device=h.device)
    elif keep == Keep.RATIOS:
        # Rows of float16 are made one by one, and a product reads to the end of the last block.
        room = h.new_zeros if half else h.new_empty
        kept = room(n, row_width(vocabulary))
        kept[:, vocabulary:] = 0
    if not n:
        return (*results, kept)

    tokens = compact(head.labels, ignore_index)
    counted = rows_of(h, tokens, n)
    mean = results[4] if outputs & MEAN_LOGIT and softcap is None else None
    of_labels = _labels(head, tokens, mean)
    stores = keep in (Keep.HIDDEN, Keep.RATIOS)
    chunk = _rows_of_parts(head, outputs, workspace)
    if keep == Keep.HIDDEN:
        chunk = min(chunk, _rows_that_fit(h, vocabulary, workspace))
        space = h.new_empty(chunk, row_width(vocabulary))
    factor = torch.empty_like(of_labels.logit) if stores else None
    for first in range(0, n, chunk):
        slots = min(chunk, n - first)
        ratios = None
        if stores:
            ratios = space[:slots] if keep == Keep.HIDDEN else kept[first : first + slots]
        _fold(
            head, counted, tokens, of_labels, first, slots, results, outputs,
            None if half else ratios, factor,
        )  # fmt: skip
        if ratios is None:
            continue
        far, at = _improbable(results[0], tokens, first, slots, half)
        # By the time these are known few are left, most often none.
        far_rows = rows_of(h, far, slots)
        _gradient(head, far_rows, far, None, None, results[:4], ratios, slots, 0, vocabulary, at=at)
        if keep == Keep.HIDDEN:
            rows = kept.view(-1, h.shape[1])
            _product(_ratios(ratios, head), head.weight, tokens, rows, first, slots, factor=factor)
    return (*results, kept)


def _rows_of_parts(head: Head, outputs: int, workspace: int) -> int:
    """Whole tiles of tokens whose statistics by part fit in their share; at least one tile."""
    tile = head.tile(True)
    of_row = _fields(head, outputs) * 4 * triton.cdiv(head.weight.shape[0], tile.columns)
    return _whole_blocks(workspace // SHARE_OF_PARTS // of_row, head.hidden.shape[0])


def _rows_that_fit(h: Tensor, vocabulary: int, workspace: int) -> int:
    """Whole blocks of tokens whose ratios fit in the workspace; at least one."""
    return _whole_blocks(workspace // (row_width(vocabulary) * h.element_size()), h.shape[0])


def _whole_blocks(fitting: int, n: int) -> int:
    return min(max(BLOCK_ROWS, fitting // BLOCK_ROWS * BLOCK_ROWS), n)


def _columns_that_fit(h: Tensor, vocabulary: int, workspace: int) -> int:
    """Whole tiles of the vocabulary whose gradients by all tokens fit; at least one tile."""
    columns = tile_for(h, True).columns
    fitting = workspace // (h.shape[0] * h.element_size())
    return min(max(columns, fitting // columns * columns), row_width(vocabulary))


def linear_token_logprobs_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """As `drrlhf.reference.linear_token_logprobs_backward`, from what was kept where it serves."""
    g = HeadGradient(*arguments)
    hidden, weight, bias, kept, keep = g.hidden, g.weight, g.bias, g.kept, g.keep
    need_hidden, need_weight, need_bias = g.need_hidden, g.need_weight, g.need_bias
    options = (g.ignore_index, g.temperature, g.softcap, g.logit_scale)
    head = _head(hidden, weight, bias, g.labels, *options)
    h = head.hidden
    n, vocabulary = h.shape[0], weight.shape[0]
    a = None if g.grad is None else g.grad.reshape(-1).contiguous()
    b = None if g.grad_entropy is None else g.grad_entropy.reshape(-1).contiguous()
    statistics = [x.reshape(-1) for x in (g.logp, g.lse, g.lse_tail, g.entropy)]
    kind = weight if bias is None else bias
    # What Keep.HIDDEN has kept is scaled into memory of its own.
    answered = keep == Keep.HIDDEN and b is None and need_hidden and n > 0
    summed = need_hidden and not answered
    d_hidden = torch.zeros(hidden.shape if summed else (0,), dtype=h.dtype, device=h.device)
    d_weight = torch.empty(
        weight.shape if need_weight else (0,), dtype=weight.dtype, device=h.device
    )
    d_bias = torch.empty(vocabulary if need_bias else 0, dtype=kind.dtype, device=h.device)
    if not n:
        return d_hidden, d_weight.zero_(), d_bias.zero_()
    if answered:
        assert a is not None
        d_hidden = _scaled_rows(kept, a, head)
        need_hidden = False
    if not (need_hidden or need_weight or need_bias):
        return d_hidden, d_weight, d_bias

    rows = d_hidden.view(-1, h.shape[1])
    if keep == Keep.RATIOS and b is None:
        assert a is not None
        tokens = compact(head.labels, g.ignore_index)
        factor = _factors(head, tokens, statistics, a)
        blocks = _active_blocks(factor, tokens)
        ratios = _ratios(kept, head)
        if need_hidden:
            _product(ratios, head.weight, tokens, rows, 0, n, factor=factor, blocks=blocks)
        if need_weight:
            scaled = rows_of(h, tokens, n, factor)
            _product(ratios, scaled, tokens, d_weight, 0, n, across=True, blocks=blocks)
        if need_bias:
            _bias_gradient(kept, tokens, factor, d_bias)
        return d_hidden, d_weight, d_bias

    tokens = compact(head.labels, g.ignore_index, a, b)
    listed = rows_of(h, tokens, n)
    step = _columns_that_fit(h, vocabulary, g.workspace)
    d = h.new_empty(listed.shape[0], step)
    several = step < vocabulary
    total = rows.to(torch.float32) if need_hidden and several else rows
    for first in range(0, vocabulary, step):
        columns = min(step, vocabulary - first)
        _gradient(head, listed, tokens, a, b, statistics, d, n, first, columns)
        part, here = slice(first, first + columns), d[:, :columns]
        if need_hidden:
            _product(here, head.weight[part], tokens, total, 0, n, add=several)
        if need_weight:
            _product(here, listed, tokens, d_weight[part], 0, n, across=True)
        if need_bias:
            _bias_gradient(here, tokens, None, d_bias[part])
    if need_hidden and several:
        rows.copy_(total)
    return d_hidden, d_weight, d_bias
