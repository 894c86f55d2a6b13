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

from drrlhf.layouts.lengths import on_the_right
from drrlhf.trl import columns

# Tensors (2n, L).
SEQUENCES = ("input_ids", "attention_mask", "completion_mask", "token_type_ids")
# Tensors (n,): rewards of the answers of a changed pair as they are, NaN where nobody asked; and
# all that there are.
ORIGINALS = ("original_chosen_reward", "original_rejected_reward")
PAIRS = ("ref_chosen_logps", "ref_rejected_logps", "margin", *ORIGINALS, *columns.PAIR_COLUMNS)


def count(batch: Mapping[str, Any]) -> int:
    """The number of pairs n."""
    return len(batch["input_ids"]) // 2


def separable(batch: Mapping[str, Any]) -> bool:
    """Whether `select` knows every entry of the batch, and its padding is on the right."""
    known = all(name in SEQUENCES or name in PAIRS for name in batch)
    return known and on_the_right(batch["attention_mask"])


def lengths(batch: Mapping[str, Any]) -> Tensor:
    """Tokens (n,) of the longer sequence of each pair."""
    return torch.stack(batch["attention_mask"].sum(1).chunk(2)).amax(0)


def select(
    batches: Sequence[Mapping[str, Any]],
    pairs: Sequence[tuple[int, int]],
    pad_token_id: int,
    multiple: int | None = None,
) -> dict[str, Any]:
    """One batch of the pairs [(batch, row), ...], padded on the right to the longest of them, or on
    to the next ``multiple``.

    ``pad_token_id`` must be the model's: a classifier finds the last token of a row by it.
    """
    longest = max(int(lengths(batches[b])[row]) for b, row in pairs)
    longest += -longest % (multiple or 1)
    merged: dict[str, Any] = {}
    for name in batches[0]:
        if name in PAIRS:
            merged[name] = torch.stack([batches[b][name][row] for b, row in pairs])
            continue
        filling = _filling(name, pad_token_id)
        sides = [
            _fitted(batches[b][name][row + side * count(batches[b])], longest, filling)
            for side in (0, 1)
            for b, row in pairs
        ]
        merged[name] = torch.stack(sides)
    return merged


def below(one: Mapping[str, Any], other: Mapping[str, Any], pad_token_id: int) -> dict[str, Tensor]:
    """The tensors by sequence of two batches, one under the other, equally wide."""
    width = max(one["input_ids"].shape[1], other["input_ids"].shape[1])
    return {
        name: torch.cat(
            [_fitted(part[name], width, _filling(name, pad_token_id)) for part in (one, other)]
        )
        for name in SEQUENCES
        if name in one
    }


def _filling(name: str, pad_token_id: int) -> int:
    """What an entry of a batch is filled up with."""
    return pad_token_id if name == "input_ids" else 0


def _fitted(sequences: Tensor, length: int, filling: int) -> Tensor:
    """One sequence (L,) or several (n, L), cut or filled up to a length."""
    missing = length - sequences.shape[-1]
    if missing <= 0:
        return sequences[..., :length]
    return torch.nn.functional.pad(sequences, (0, missing), value=filling)


def arrange(kept: Sequence[tuple[int, int]], sizes: Sequence[int], most: int) -> list[list[int]]:
    """Indices into `kept` by microbatch: as few as hold `most` pairs each, evenly filled.

    Pairs of like length (`sizes`) come together, so that little padding is left.
    """
    order = sorted(range(len(kept)), key=lambda i: (sizes[i], i))
    parts = -(-len(kept) // most)
    return [order[len(kept) * k // parts : len(kept) * (k + 1) // parts] for k in range(parts)]
