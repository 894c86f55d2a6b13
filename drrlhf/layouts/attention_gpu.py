"""Attention over a row of blocks on a GPU: one call of PyTorch's flash attention a layer.

Flash attention takes many short sequences of queries and keys, one after the other, and shows the
queries of each the keys up to their own place, counted from the end. A block's queries and all that
it sees are such a sequence. Keys that several blocks see are copied for each, which costs bytes but
no products, and their gradients are added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from drrlhf.layouts.layout import Block
from drrlhf.precision import multiplied_in

# What torch.nn.attention.varlen calls, in every version that we support.
_flash = torch.ops.aten._flash_attention_forward
_flash_backward = torch.ops.aten._flash_attention_backward
WIDEST = 256  # of the heads that it has kernels for


def serves(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether flash attention takes (1, heads, T, width) of queries, keys and values, as they are
    after autocast: 16 bits, on a GPU of NVIDIA's from Ampere on."""
    width = query.shape[-1]
    return (
        query.device.type == "cuda"
        and torch.version.hip is None
        and torch.backends.cuda.is_flash_attention_available()
        and _has_both_ways(width, torch.cuda.get_device_capability(query.device))
        and {multiplied_in(x) for x in (query, key, value)} <= {torch.bfloat16, torch.float16}
        and width == value.shape[-1]
        and width % 8 == 0
        and width <= WIDEST
    )


def _has_both_ways(width: int, capability: tuple[int, int]) -> bool:
    """Whether a GPU has kernels forward and backward. PyTorch refuses the backward of widths in
    (192, 224] where a processor has less shared memory than that of a data center."""
    small = (8, 6) <= capability < (9, 0) or capability >= (12, 0)
    return capability >= (8, 0) and not (small and 192 < width <= 224)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Sequence[Block],
    window: int | None,
    scale: float | None,
) -> Tensor:
    """softmax(scale q k') v of each block's queries over what it sees, (1, T, heads, width), for
    queries (1, heads, T, width), keys and values (1, kv heads, T, width) that `serves` accepts,
    the numbers of a head side by side.

    ``window`` is the number of tokens up to its own that a token sees, None for all; ``scale`` is
    1 / sqrt(width) unless given.
    """
    query, key, value = (x[0].transpose(0, 1).to(multiplied_in(x)) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    known = _known(tuple(blocks), query.device)
    found: Tensor = _Attention.apply(query, key, value, known, window, scale)
    return found[None]


class _Known(NamedTuple):
    """What a row's blocks come to as sequences of queries and keys.

    The keys are the row's, or, where blocks have prefixes, its tokens ``seen`` (K,). ``bags`` then
    says who is where: token t of the row is there at ``order[bags[t] : bags[t + 1]]``.
    """

    queries: Tensor  # where each block's queries begin, and the last end, (blocks + 1,)
    keys: Tensor  # likewise
    most_queries: int
    most_keys: int
    seen: Tensor | None
    order: Tensor | None
    bags: Tensor | None


@lru_cache(maxsize=4)  # every layer of a model asks for the same row, and asks again to go back
def _known(blocks: tuple[Block, ...], device: torch.device) -> _Known:
    queries = np.array([b.stop - b.start for b in blocks])
    prefixes = np.array([b.beginning for b in blocks])

    def bounds(lengths: np.ndarray) -> Tensor:
        return torch.tensor([0, *lengths.cumsum()], dtype=torch.int32, device=device)

    # Of one query flash attention takes another way, which has no way back.
    most = max(int(queries.max()), 2), int((queries + prefixes).max())
    shapes = bounds(queries), bounds(queries + prefixes), *most
    if not prefixes.any():
        return _Known(*shapes, None, None, None)
    seen = np.concatenate([np.arange(*piece) for block in blocks for piece in block.seen()])
    order = seen.argsort(kind="stable")
    bags = np.searchsorted(seen[order], np.arange(blocks[-1].stop))
    return _Known(*shapes, *(torch.from_numpy(x).to(device) for x in (seen, order, bags)))


class _Attention(torch.autograd.Function):
    """Queries (T, heads, width), keys and values (T, kv heads, width) -> (T, heads, width)."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        known: _Known,
        window: int | None,
        scale: float,
    ) -> Tensor:
        ctx.known, ctx.window, ctx.scale = known, window, scale
        keys, values = (_laid(x, known) for x in (key, value))
        out, *rest, _ = _flash(
            query, keys, values, *known[:4], 0.0, True, False, **_options(window, scale)
        )
        ctx.save_for_backward(query, key, value, out, *rest)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Once: under gradient checkpointing a second look would compute them again, and raises.
        query, key, value, out, sums, *random = ctx.saved_tensors
        known = ctx.known
        keys, values = (_laid(x, known) for x in (key, value))
        of_query, *found = _flash_backward(
            grad.contiguous(),
            query,
            keys,
            values,
            out,
            sums,
            *known[:4],
            0.0,
            True,
            *random,
            **_options(ctx.window, ctx.scale),
        )
        of_key, of_value = (_summed(x, known) for x in found)
        return of_query, of_key, of_value, None, None, None


def _options(window: int | None, scale: float) -> dict[str, Any]:
    left = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
    return {"scale": scale, **left}


def _laid(tensor: Tensor, known: _Known) -> Tensor:
    """Keys or values of the row (T, kv heads, width), block by block (K, kv heads, width)."""
    return tensor if known.seen is None else tensor[known.seen]


def _summed(tensor: Tensor, known: _Known) -> Tensor:
    """The gradient of the row's keys or values from that of `_laid`; in the same order always."""
    if known.order is None:
        return tensor
    flat = F.embedding_bag(known.order, tensor.flatten(1), known.bags, mode="sum")
    return flat.unflatten(1, tensor.shape[1:])
