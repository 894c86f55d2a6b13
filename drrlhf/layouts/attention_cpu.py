"""Attention over a row of blocks on a CPU, forward and backward in one function.

The forward is PyTorch's kernel, called block by block; in a graph of slices their gradients would
take as long as the products, and keys that several heads share would be copied for each. PyTorch's
backward takes 2 to 3 times what its products take where numbers are narrow and queries few (see
FACTS.md): there the extension takes it, where it is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from drrlhf import backends
from drrlhf.conventions import statistics_dtype
from drrlhf.layouts.layout import Block, causal_mask, seen_by
from drrlhf.ops.library import COMPILED
from drrlhf.precision import multiplied_in

# What torch.nn.functional.scaled_dot_product_attention calls on a CPU.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# Tokens that see this many are better served by PyTorch's backward.
MOST_KEYS = 2048
_BACKWARD = (
    "row_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, "
    "Tensor norms, Tensor blocks, int window, float scale) -> "
    "(Tensor of_query, Tensor of_key, Tensor of_value)"
)
COMPILED.define(_BACKWARD)


def serves(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether it takes (1, heads, T, width) of queries, keys and values."""
    return query.device.type == "cpu" and query.shape[-1] == value.shape[-1]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Sequence[Block],
    window: int | None,
    scale: float | None,
) -> Tensor:
    """softmax(scale q k') v of each block's queries over what it sees, (1, T, heads, width), for
    queries (1, heads, T, width), keys and values (1, kv heads, T, width), the numbers of a head
    side by side.

    ``window`` is the number of tokens up to its own that a token sees, None for all; ``scale`` is
    1 / sqrt(width) unless given. Under autocast everything is cast first, as PyTorch would.
    """
    query, key, value = (x.to(multiplied_in(x)) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    found: Tensor = _Attention.apply(query[0], key[0], value[0], tuple(blocks), window, scale)
    return found[None]


class _Part(NamedTuple):
    """A block's queries and all that they see: (kv heads, heads a key, tokens, width)."""

    query: Tensor
    key: Tensor
    value: Tensor
    window: int | None
    scale: float

    @staticmethod
    def of(
        query: Tensor, key: Tensor, value: Tensor, block: Block, window: int | None, scale: float
    ) -> _Part:
        q = _by_key(query, key)[:, :, block.start : block.stop]
        k, v = (seen_by(x[:, None], block).expand(-1, q.shape[1], -1, -1) for x in (key, value))
        return _Part(q, k, v, window, scale)

    def known(self) -> dict[str, Any]:
        """What PyTorch's kernel is told besides: whether it sees to causality by itself, what else
        to add to the scores, and their scale."""
        queries, keys = self.query.shape[2], self.key.shape[2]
        seen = causal_mask(queries, keys, self.window, self.query.device)
        bias = None
        if seen is not None:
            bias = self.query.new_zeros(1, 1, queries, keys).masked_fill_(~seen, -torch.inf)
        return {"is_causal": seen is None, "attn_mask": bias, "scale": self.scale}


class _Attention(torch.autograd.Function):
    """Queries (heads, T, width), keys and values (kv heads, T, width) -> (T, heads, width)."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        blocks: tuple[Block, ...],
        window: int | None,
        scale: float,
    ) -> Tensor:
        heads, length, width = query.shape
        ctx.options = blocks, window, scale
        out = query.new_empty(length, heads, width)
        # Log-sum-exps of scores, in the dtype in which PyTorch's kernels have them.
        norms = query.new_empty(heads, length, 1, dtype=statistics_dtype(query))
        for block in blocks:
            part = _Part.of(query, key, value, block, window, scale)
            found, sums = _flash(*part[:3], dropout_p=0.0, **part.known())
            _by_key(out.transpose(0, 1), key)[:, :, block.start : block.stop] = found
            _by_key(norms, key)[:, :, block.start : block.stop, 0] = sums
        ctx.save_for_backward(query, key, value, out, norms)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Once: under gradient checkpointing a second look would compute them again, and raises.
        saved = ctx.saved_tensors
        query, key, value, out, norms = saved
        blocks, window, scale = ctx.options
        longest = max(block.beginning + block.stop - block.start for block in blocks)
        if _compiled(query.dtype) and longest <= MOST_KEYS:
            # Autocast, where it is on around a backward, would narrow the products in float32.
            with torch.autocast("cpu", enabled=False):
                found = torch.ops.drrlhf_cpp.row_attention_backward(
                    grad, *saved, torch.tensor(blocks), window or longest, scale
                )
            return *found, None, None, None
        of_query = torch.empty_like(query)
        of_key, of_value = (torch.zeros_like(x, dtype=norms.dtype) for x in (key, value))
        outer, laid, sums = (
            _by_key(x, key) for x in (grad.transpose(0, 1), out.transpose(0, 1), norms)
        )
        for block in blocks:
            own = slice(block.start, block.stop)
            part = _Part.of(query, key, value, block, window, scale)
            found = _flash_backward(
                outer[:, :, own],
                *part[:3],
                laid[:, :, own],
                sums[:, :, own, 0].contiguous(),
                dropout_p=0.0,
                **part.known(),
            )
            _by_key(of_query, key)[:, :, own] = found[0]
            pieces = block.seen()
            for total, new in zip((of_key, of_value), found[1:], strict=True):
                summed = new.sum(1, dtype=norms.dtype)  # over the heads that share a key
                parts = summed.split([stop - start for start, stop in pieces], dim=1)
                for (start, stop), part_of in zip(pieces, parts, strict=True):
                    total[:, start:stop] += part_of
        return of_query, of_key.to(key.dtype), of_value.to(value.dtype), None, None, None


def _compiled(dtype: torch.dtype) -> bool:
    """Whether the extension is there, and its backward the better one: in float32 it is not faster,
    and in float64, whose scores it would take in float32, not as exact."""
    return backends.build_info()["built"] and dtype in (torch.bfloat16, torch.float16)


def _by_key(heads: Tensor, key: Tensor) -> Tensor:
    """(heads, T, width) as (kv heads, heads that share one, T, width); a view."""
    return heads.unflatten(0, (len(key), -1))
