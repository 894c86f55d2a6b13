"""Attention over a row of several sequences: each block of a layout by PyTorch's own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from drrlhf.layouts import attention_cpu, attention_gpu
from drrlhf.layouts.layout import Block, causal_mask, seen_by

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
    if served := _served(query, key, value, kwargs):
        # The kernels of a CPU read numbers of a head that lie apart wrongly, those of a GPU refuse.
        laid = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        return served.attention(*laid, blocks, window, kwargs.get("scaling")), None
    found = []
    for block in blocks:
        q = query[:, :, block.start : block.stop]
        k, v = (seen_by(tensor, block) for tensor in (key, value))
        mask = causal_mask(q.shape[2], k.shape[2], window, q.device)
        mask = None if mask is None else mask[None, None]
        found.append(sdpa_attention_forward(module, q, k, v, mask, **kwargs)[0])
    return torch.cat(found, dim=1), None


def _served(query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> Any:
    """The module that does what is asked for in one function; None if there is none."""
    if kwargs.get("dropout") or kwargs.get("is_causal") is False or is_compiling():
        return None
    for module in (attention_cpu, attention_gpu):
        if module.serves(query, key, value):
            return module
    return None


def _block_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """No mask for a row with blocks; else transformers' own."""
    return None if _row_at_hand else sdpa_mask(*args, **kwargs)


AttentionInterface.register(ATTENTION, block_attention)
AttentionMaskInterface.register(ATTENTION, _block_mask)
