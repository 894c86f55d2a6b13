"""Attention over a row of blocks on a CPU, forward and backward in one function.

The forward is PyTorch's kernel, called block by block; in a graph of slices their gradients would
take as long as the products, and keys that several heads share would be copied for each. PyTorch's
backward takes 2 to 3 times what its products take where numbers are narrow and queries few (see
FACTS.md): there it is done by products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from drrlhf.layouts.layout import Block, causal_mask, seen_by

# What torch.nn.functional.scaled_dot_product_attention calls on a CPU.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# Queries whose gradients are taken at once by products, and keys up to which that is faster.
QUERIES, MOST_KEYS = 128, 1024


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Sequence[Block],
    window: int | None,
    scale: float | None,
) -> Tensor:
    """softmax(scale q k') v of each block's queries over what it sees, (1, T, heads, width), for
    queries (1, heads, T, width), keys and values (1, kv heads, T, width).

    ``window`` is the number of tokens up to its own that a token sees, None for all; ``scale`` is
    1 / sqrt(width) unless given. Under autocast everything is cast first.
    """
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = (x.to(dtype) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    found: Tensor = _Attention.apply(query[0], key[0], value[0], tuple(blocks), window, scale)
    return found[None]


class _Part(NamedTuple):
    """Some queries of a block, with all that they see: (kv heads, heads a key, tokens, width)."""

    query: Tensor
    key: Tensor
    value: Tensor
    window: int | None
    scale: float

    @staticmethod
    def of(
        query: Tensor, key: Tensor, value: Tensor, block: Block, first: int, *rest: Any
    ) -> _Part:
        """The queries from ``first`` to the end of a block, which ends where they end."""
        q = _by_key(query, key)[:, :, first : block.stop]
        k, v = (seen_by(x[:, None], block).expand(-1, q.shape[1], -1, -1) for x in (key, value))
        return _Part(q, k, v, *rest)

    @property
    def causal(self) -> bool:
        """Whether the kernel knows by itself what is seen."""
        queries, keys = self.query.shape[2], self.key.shape[2]
        return queries == keys and (self.window is None or keys <= self.window)

    def bias(self, dtype: torch.dtype) -> Tensor:
        """What is added to the scores (queries, keys): 0, or -inf where nothing is seen."""
        queries, keys = self.query.shape[2], self.key.shape[2]
        seen = causal_mask(queries, keys, self.window, self.query.device)
        return self.query.new_zeros(queries, keys, dtype=dtype).masked_fill_(~seen, -torch.inf)

    def known(self) -> dict[str, Any]:
        """What PyTorch's kernel is told besides."""
        mask = None if self.causal else self.bias(self.query.dtype)[None, None]
        return {"attn_mask": mask, "scale": self.scale}


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
        norms = query.new_empty(heads, length, 1, dtype=torch.float32)  # log-sum-exps of scores
        for block in blocks:
            part = _Part.of(query, key, value, block, block.start, window, scale)
            found, sums = _flash(*part[:3], 0.0, part.causal, **part.known())
            _by_key(out.transpose(0, 1), key)[:, :, block.start : block.stop] = found
            _by_key(norms, key)[:, :, block.start : block.stop, 0] = sums
        ctx.save_for_backward(query, key, value, out, norms)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, norms = ctx.saved_tensors
        blocks, window, scale = ctx.options
        of_query = torch.empty_like(query)
        of_key, of_value = (torch.zeros_like(x, dtype=torch.float32) for x in (key, value))
        known = [_by_key(x, key) for x in (grad.transpose(0, 1), out.transpose(0, 1), norms)]
        for block, first in _cut(blocks, query.dtype):
            part = _Part.of(query, key, value, block, first, window, scale)
            few = part.key.shape[2] <= MOST_KEYS and query.dtype != torch.float32
            gradients = _by_products if few else _by_kernel
            found = gradients(part, *(x[:, :, first : block.stop] for x in known))
            _by_key(of_query, key)[:, :, first : block.stop] = found[0]
            before = block.before_stop - block.before
            for total, new in zip((of_key, of_value), found[1:], strict=True):
                total[:, block.before : block.before_stop] += new[:, :before]
                total[:, block.start : block.stop] += new[:, before:]
        return of_query, of_key.to(key.dtype), of_value.to(value.dtype), None, None, None


def _cut(blocks: Sequence[Block], dtype: torch.dtype) -> Iterator[tuple[Block, int]]:
    """Blocks, in parts by queries where numbers are narrow: each as the block that ends with its
    last query, and its first query."""
    for block in blocks:
        step = block.stop - block.start if dtype == torch.float32 else QUERIES
        for first in range(block.start, block.stop, step):
            yield block._replace(stop=min(first + step, block.stop)), first


def _by_kernel(
    part: _Part, outer: Tensor, out: Tensor, norms: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a part's queries, and of keys and values (kv heads, keys, width), by PyTorch's
    kernel; all arguments are laid out by key."""
    sums = norms[..., 0].contiguous()
    of_query, *of_keys = _flash_backward(
        outer, *part[:3], out, sums, 0.0, part.causal, **part.known()
    )
    of_key, of_value = (found.sum(1, dtype=torch.float32) for found in of_keys)
    return of_query, of_key, of_value


def _by_products(
    part: _Part, outer: Tensor, out: Tensor, norms: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_by_kernel`. Scores are taken in float32, or a score of 10 would move its probability by
    4 % in bfloat16; the products with the gradients in the dtype that they will have."""
    shape, width = part.query.shape, part.query.shape[3]
    q, do, o, sums = (x.reshape(len(x), -1, x.shape[3]) for x in (part.query, outer, out, norms))
    k, v = part.key[:, 0], part.value[:, 0]
    scores = torch.bmm(q.float(), k.float().mT).mul_(part.scale).sub_(sums)
    scores.view(*shape[:3], -1).add_(part.bias(torch.float32))
    p = scores.exp_()
    wide = do.float()
    inner = (wide * o).sum(-1, keepdim=True)
    ds = torch.bmm(wide, v.float().mT).sub_(inner).mul_(p).mul_(part.scale).to(q.dtype)
    of_query = torch.bmm(ds, k).view(*shape[:3], width)
    return of_query, torch.bmm(ds.mT, q), torch.bmm(p.to(q.dtype).mT, do)


def _by_key(heads: Tensor, key: Tensor) -> Tensor:
    """(heads, T, width) as (kv heads, heads that share one, T, width); a view."""
    return heads.unflatten(0, (len(key), -1))
