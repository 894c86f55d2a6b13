"""Attention over a row of several sequences: each block of a layout by PyTorch's own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from drrlhf.layouts.layout import Block

ATTENTION = "drrlhf_packed"
# Keyword under which the blocks of the row travel to the attention layers.
BLOCKS = "packed_blocks"
_row_at_hand = False
# What torch.nn.functional.scaled_dot_product_attention calls on a CPU.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@contextlib.contextmanager
def one_row() -> Iterator[None]:
    """Inside, models make no mask: what they are given is a row, whose blocks say it all."""
    global _row_at_hand
    before, _row_at_hand = _row_at_hand, True
    try:
        yield
    finally:
        _row_at_hand = before


def block_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention (1, heads, T, width) -> (1, T, heads, width) of a row with
    blocks; without blocks it is transformers' own."""
    blocks: Sequence[Block] | None = kwargs.pop(BLOCKS, None)
    if blocks is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    window = kwargs.get("sliding_window")
    if query.device.type == "cpu" and not kwargs.get("dropout") and not is_compiling():
        same = query.shape[-1] == value.shape[-1]
        if same and kwargs.get("is_causal") is not False:
            return _on_cpu(query, key, value, blocks, window, kwargs.get("scaling")), None
    found = []
    for block in blocks:
        q = query[:, :, block.start : block.stop]
        k, v = (_seen(tensor, block) for tensor in (key, value))
        mask = _mask(q.shape[2], k.shape[2], window, q.device)
        found.append(sdpa_attention_forward(module, q, k, v, mask, **kwargs)[0])
    return torch.cat(found, dim=1), None


def _on_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Sequence[Block],
    window: int | None,
    scale: float | None,
) -> Tensor:
    """`block_attention` (1, T, heads, width) by PyTorch's kernel for CPUs, block after block in one
    function: the slices and their gradients would take as long as the products, and keys that
    several heads share would be copied for each."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = (x.to(dtype) for x in (query, key, value))
    found: Tensor = _BlocksOnCPU.apply(query[0], key[0], value[0], tuple(blocks), window, scale)
    return found[None]


class _BlocksOnCPU(torch.autograd.Function):
    """Queries (heads, T, width), keys and values (kv heads, T, width) -> (T, heads, width)."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        blocks: tuple[Block, ...],
        window: int | None,
        scale: float | None,
    ) -> Tensor:
        heads, length, width = query.shape
        ctx.options = blocks, window, scale
        out = query.new_empty(length, heads, width)
        norms = query.new_empty(heads, length, dtype=torch.float32)
        laid, logsumexps = out.transpose(0, 1), norms[..., None]
        for block in blocks:
            own = slice(block.start, block.stop)
            inputs, causal, mask = _problem(query, key, value, block, window)
            found, sums = _flash(*inputs, 0.0, causal, attn_mask=mask, scale=scale)
            _by_key(laid, key)[:, :, own] = found
            _by_key(logsumexps, key)[:, :, own, 0] = sums
        ctx.save_for_backward(query, key, value, out, norms)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, norms = ctx.saved_tensors
        blocks, window, scale = ctx.options
        of_query = torch.empty_like(query)
        of_key, of_value = (torch.zeros_like(x, dtype=torch.float32) for x in (key, value))
        outer, laid = (_by_key(x.transpose(0, 1), key) for x in (grad, out))
        logsumexps = _by_key(norms[..., None], key)[..., 0]
        for block in blocks:
            own = slice(block.start, block.stop)
            inputs, causal, mask = _problem(query, key, value, block, window)
            found = _flash_backward(
                outer[:, :, own],
                *inputs,
                laid[:, :, own],
                logsumexps[:, :, own].contiguous(),
                0.0,
                causal,
                attn_mask=mask,
                scale=scale,
            )
            _by_key(of_query, key)[:, :, own] = found[0]
            before = block.before_stop - block.before
            for total, part in zip((of_key, of_value), found[1:], strict=True):
                summed = part.sum(1, dtype=torch.float32)  # over the heads that share a key
                total[:, block.before : block.before_stop] += summed[:, :before]
                total[:, own] += summed[:, before:]
        return of_query, of_key.to(key.dtype), of_value.to(value.dtype), None, None, None


def _problem(
    query: Tensor, key: Tensor, value: Tensor, block: Block, window: int | None
) -> tuple[tuple[Tensor, Tensor, Tensor], bool, Tensor | None]:
    """Queries, keys and values (kv heads, heads a key, tokens, width) of a block; whether the
    kernel is to see to causality; and if not, what is added to the products."""
    q = _by_key(query, key)[:, :, block.start : block.stop]
    k, v = (_seen(x[:, None], block).expand(-1, q.shape[1], -1, -1) for x in (key, value))
    mask = _mask(q.shape[2], k.shape[2], window, q.device)
    if mask is not None:
        mask = q.new_zeros(mask.shape).masked_fill(~mask, -torch.inf)
    return (q, k, v), mask is None, mask


def _by_key(heads: Tensor, key: Tensor) -> Tensor:
    """(heads, T, width) as (kv heads, heads that share one, T, width); a view."""
    return heads.unflatten(0, (len(key), -1))


def _seen(tensor: Tensor, block: Block) -> Tensor:
    """What a block sees of the keys or values of a row (1, heads, T, width)."""
    own = tensor[:, :, block.start : block.stop]
    if block.before == block.before_stop:
        return own
    if block.before_stop == block.start:  # right before it
        return tensor[:, :, block.before : block.stop]
    return torch.cat([tensor[:, :, block.before : block.before_stop], own], dim=2)


def _mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor | None:
    """The mask (1, 1, queries, keys) of causal attention to the last ``window`` tokens, for queries
    that are the last of the keys; None: just causal, and as many queries as keys."""
    narrow = window is not None and keys > window
    if queries == keys and not narrow:
        return None
    ones = torch.ones(queries, keys, dtype=torch.bool, device=device)
    seen = ones.tril(keys - queries)
    if narrow:
        assert window is not None
        seen &= ~ones.tril(keys - queries - window)
    return seen[None, None]


def _block_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """No mask for a row with blocks; else transformers' own."""
    return None if _row_at_hand else sdpa_mask(*args, **kwargs)


AttentionInterface.register(ATTENTION, block_attention)
AttentionMaskInterface.register(ATTENTION, _block_mask)
