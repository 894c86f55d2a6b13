"""A padded batch in two parts of like lengths: for models that take no rows of several sequences.

An encoder reads every sequence whole, so that a batch is as wide as its longest one, and texts
differ in length. Run as two batches, the short sequences and the long ones, it has about half the
padding, and each sequence the numbers that it has in one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutput

# Tensors (n, L) that are cut as the tokens are.
PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids")
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


class TwoParts:
    """Stands in for a classifier whose batches are padded on the right, and gives its logits."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, **given: Any) -> Any:
        mask = given["attention_mask"]
        tensors = {name for name, value in given.items() if isinstance(value, Tensor)}
        on_the_right = bool((mask[:, 1:] <= mask[:, :-1]).all())
        parts = split(mask) if tensors <= {*PER_TOKEN} and on_the_right else None
        if parts is None:
            return self.model(**given)
        found = []
        for part in parts:
            width = max(int(mask[part].sum(1).max()), 1)
            cut = {name: given[name][part, :width] for name in tensors}
            found.append(self.model(**given | cut).logits)
        return SequenceClassifierOutput(logits=torch.cat(found)[torch.cat(parts).argsort()])
