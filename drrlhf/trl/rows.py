"""Batches of pairs as TRL's collators make them: take some pairs out of several, and put them
together again with no more padding than they need.

A batch is a mapping of tensors over the 2n sequences, stacked [chosen…, rejected…], and over the n
pairs; what is neither (pixels of a vision model, say) cannot be taken apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from drrlhf.trl import columns

# Tensors (2n, L), and what fills them up: what lies under a 0 of the mask is never read.
SEQUENCES = {"input_ids": 0, "attention_mask": 0, "completion_mask": 0, "token_type_ids": 0}
# Tensors (n,).
PAIRS = ("ref_chosen_logps", "ref_rejected_logps", "margin", *columns.COLUMNS)


def count(batch: Mapping[str, Any]) -> int:
    """The number of pairs n."""
    return len(batch["input_ids"]) // 2


def separable(batch: Mapping[str, Any]) -> bool:
    """Whether `select` knows every entry of the batch."""
    return all(name in SEQUENCES or name in PAIRS for name in batch)


def lengths(batch: Mapping[str, Any]) -> Tensor:
    """Tokens (n,) of the longer sequence of each pair."""
    return torch.stack(batch["attention_mask"].sum(1).chunk(2)).amax(0)


def select(
    batches: Sequence[Mapping[str, Any]], pairs: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """One batch of the pairs [(batch, row), ...], padded on the right to the longest of them."""
    longest = max(int(lengths(batches[b])[row]) for b, row in pairs)
    merged: dict[str, Any] = {}
    for name in batches[0]:
        if name in PAIRS:
            merged[name] = torch.stack([batches[b][name][row] for b, row in pairs])
            continue
        sides = [
            _fitted(batches[b][name][row + side * count(batches[b])], longest, SEQUENCES[name])
            for side in (0, 1)
            for b, row in pairs
        ]
        merged[name] = torch.stack(sides)
    return merged


def _fitted(sequence: Tensor, length: int, filling: int) -> Tensor:
    if len(sequence) >= length:
        return sequence[:length]
    return torch.nn.functional.pad(sequence, (0, length - len(sequence)), value=filling)


def arrange(kept: Sequence[tuple[int, int]], sizes: Sequence[int], most: int) -> list[list[int]]:
    """Indices into `kept` by microbatch: as few as hold `most` pairs each, evenly filled.

    Pairs of like length (`sizes`) come together, so that little padding is left.
    """
    order = sorted(range(len(kept)), key=lambda i: (sizes[i], i))
    parts = -(-len(kept) // most)
    return [order[len(kept) * k // parts : len(kept) * (k + 1) // parts] for k in range(parts)]
