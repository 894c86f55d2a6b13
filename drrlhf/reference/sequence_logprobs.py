"""Token log-probs to log-probs of sequences, padded or packed.

Boundaries may be anything at all. Where the CPU does not refuse them first, wrong ones give NaN, as
in the kernels, and are never an index: on a device an index that is out of range ends the process's
context. The same holds for every other id that a caller gives (labels, groups, prompts).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from drrlhf.conventions import statistics_dtype
from drrlhf.reference.token_logprobs import counted


class Segments:
    """Which sequence each token belongs to: rows of padded tokens (B, L), or parts of packed (T,).

    Packed boundaries that do not run from 0 to T, or that decrease, are none: every sum is then
    NaN, and no token is looked for outside of the sequences.
    """

    def __init__(self, tokens: Tensor, cu_seqlens: Tensor | None) -> None:
        device = tokens.device
        self.legal: Tensor | None = None
        if cu_seqlens is None:
            self.count = tokens.shape[0]
            rows = torch.arange(self.count, device=device)
            self.of = rows.unsqueeze(1).expand(tokens.shape)
            return
        cu_seqlens = cu_seqlens.long()
        self.count = len(cu_seqlens) - 1
        place = torch.arange(tokens.numel(), device=device)
        # Tokens behind the last boundary get a sequence of their own, which nobody asks for.
        self.of = torch.searchsorted(cu_seqlens[1:].contiguous(), place, right=True)
        self.legal = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == tokens.numel())
        self.legal = self.legal & (cu_seqlens[1:] >= cu_seqlens[:-1]).all()

    def sums(self, x: Tensor) -> Tensor:
        """Sums (S,) of a number by token."""
        found = x.new_zeros(self.count + 1).index_add(0, self.of.reshape(-1), x.reshape(-1))
        found = found[: self.count]
        return found if self.legal is None else torch.where(self.legal, found, math.nan)

    def spread(self, x: Tensor) -> Tensor:
        """To each token what x (S,) says of its sequence."""
        return torch.cat([x, x.new_zeros(1)])[self.of]


def token_counts(labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int) -> Tensor:
    """Counted tokens by sequence (S,), in float64."""
    return Segments(labels, cu_seqlens).sums(counted(labels, ignore_index).double())


def sequence_logprobs(
    logps: Tensor, labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int, mean: bool
) -> Tensor:
    """Sums or means (S,) over the counted tokens of padded (B, L) rows, or packed (T,) segments."""
    kept = torch.where(counted(labels, ignore_index), logps, 0).double()
    total = Segments(labels, cu_seqlens).sums(kept)
    if mean:
        total = total / token_counts(labels, cu_seqlens, ignore_index).clamp(min=1)
    return total.to(statistics_dtype(logps))


def sequence_logprobs_backward(
    grad: Tensor, labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int, mean: bool
) -> Tensor:
    """The gradient (S,) of every sequence at each of its counted tokens; 0 elsewhere."""
    if mean:
        counts = token_counts(labels, cu_seqlens, ignore_index).clamp(min=1)
        grad = grad / counts.to(grad.dtype)
    return torch.where(counted(labels, ignore_index), Segments(labels, cu_seqlens).spread(grad), 0)
