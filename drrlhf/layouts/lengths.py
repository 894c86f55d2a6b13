"""A padded batch in two parts of like lengths: for models that take no rows of several sequences.

An encoder reads every sequence whole, so that a batch is as wide as its longest one, and texts
differ in length. Run as two batches, the short sequences and the long ones, it has about half the
padding, and each sequence the numbers that it has in one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutput

from drrlhf.layouts.model import PER_TOKEN

# Two calls of a model cost more than one: this part of the batch must be saved.
WORTH_SPLITTING = 0.1


def split(attention_mask: Tensor) -> tuple[Tensor, Tensor] | None:
    """Which sequences of a mask (n, L) are short and which are long, in the two parts that have the
    fewest tokens, padding included; None where that saves too little."""
    count = len(attention_mask)
    lengths, order = attention_mask.sum(1).sort(stable=True)
    short = torch.arange(1, count, device=lengths.device)  # how many
    tokens = short * lengths[:-1] + (count - short) * lengths[-1:]
    if not len(tokens) or tokens.min() > (1 - WORTH_SPLITTING) * attention_mask.numel():
        return None
    cut = int(tokens.argmin()) + 1
    return order[:cut], order[cut:]


def on_the_right(attention_mask: Tensor) -> bool:
    """Whether all padding of a mask (n, L) is there."""
    return bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all())


def taken(sequences: Mapping[str, Tensor], which: Tensor) -> dict[str, Tensor]:
    """Some sequences (m,) of several (n, L) that are padded on the right, as wide as the longest of
    them."""
    width = max(int(sequences["attention_mask"][which].sum(1).max()), 1)
    return {name: tensor[which, :width] for name, tensor in sequences.items()}


class TwoParts:
    """Stands in for a classifier whose batches are padded on the right, and gives its logits."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, **given: Any) -> Any:
        mask = given["attention_mask"]
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        known = tensors.keys() <= {"input_ids", "attention_mask", *PER_TOKEN}
        parts = split(mask) if known and on_the_right(mask) else None
        if parts is None:
            return self.model(**given)
        found = [self.model(**given | taken(tensors, part)).logits for part in parts]
        return SequenceClassifierOutput(logits=torch.cat(found)[torch.cat(parts).argsort()])
