"""Attention over a row of several sequences: each block of a layout by PyTorch's own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from drrlhf.layouts.layout import Block

ATTENTION = "drrlhf_packed"
# Keyword under which the blocks of the row travel to the attention layers.
BLOCKS = "packed_blocks"
_row_at_hand = False


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
    found = []
    for block in blocks:
        q = query[:, :, block.start : block.stop]
        k, v = (_seen(tensor, block) for tensor in (key, value))
        mask = _mask(q.shape[2], k.shape[2], window, q.device)
        found.append(sdpa_attention_forward(module, q, k, v, mask, **kwargs)[0])
    return torch.cat(found, dim=1), None


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
