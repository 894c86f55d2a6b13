"""Names and numbers that all backends of the ops agree on, and that depend on nothing else."""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

import torch
from torch import Tensor


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype of statistics about x: float64 for float64, float32 for everything narrower."""
    return torch.promote_types(x.dtype, torch.float32)


# Bits of `outputs`: which statistics of a token are wanted besides its log-prob.
ENTROPY, MEAN_LOGIT, IS_TOP1, LOG_SUM_SQ_PROBS = 1, 2, 4, 8
OPTIONAL = (ENTROPY, MEAN_LOGIT, IS_TOP1, LOG_SUM_SQ_PROBS)  # in the order of the results


def empty_statistics(like: Tensor, shape: Any, outputs: int) -> list[Tensor]:
    """The seven statistics of tokens (...) without their contents: log-prob, log-sum-exp and what
    of it one number cannot hold, and the optional ones, (0,) where `outputs` does not ask."""
    dtype = statistics_dtype(like)
    found = [like.new_empty(shape, dtype=dtype) for _ in range(3)]
    for bit in OPTIONAL:
        kind = torch.bool if bit == IS_TOP1 else dtype
        found.append(like.new_empty(shape if outputs & bit else (0,), dtype=kind))
    return found


def count_of(labels: Tensor, cu_seqlens: Tensor | None) -> Any:
    """How many sequences there are, padded or packed."""
    return labels.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


class Keep(enum.IntEnum):
    """What the forward of `linear_token_logprobs` keeps for its backward.

    NOTHING: (0,); the backward computes the logits again.
    HIDDEN: (..., D), d logp / d hidden.
    COLUMNS: (V, tokens), d logp / d logits of the valid tokens as (V, valid), packed at the front;
        in bfloat16 divided as RATIOS.
    RATIOS: (tokens, width), a row of d logp / d logits for each valid token, packed at the front,
        where logp >= `IMPROBABLE` divided by -p[label] logit_scale / temperature: these quotients
        can be written before the sum of the exponentials is known.
    ROWS: (tokens, width), d logp / d logits, each row in its token's place.
    """

    NOTHING = 0
    HIDDEN = 1
    COLUMNS = 2
    RATIOS = 3
    ROWS = 4

    def shape(self, hidden: Tensor, vocabulary: int) -> tuple[int, ...]:
        """Of what is kept for hidden states (..., D)."""
        if self is Keep.NOTHING:
            return (0,)
        if self is Keep.HIDDEN:
            return tuple(hidden.shape)
        tokens = hidden.numel() // hidden.shape[-1]
        if self is Keep.COLUMNS:
            return (vocabulary, tokens)
        return (tokens, row_width(vocabulary))


class HeadGradient(NamedTuple):
    """The arguments of `linear_token_logprobs_backward`, as its schema has them."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    grad: Tensor | None
    grad_entropy: Tensor | None
    logp: Tensor
    lse: Tensor
    lse_tail: Tensor
    entropy: Tensor
    kept: Tensor
    ignore_index: int
    temperature: float
    softcap: float | None
    logit_scale: float
    keep: int
    workspace: int
    need_hidden: bool
    need_weight: bool
    need_bias: bool


# Below this log-prob the quotients of Keep.RATIOS could overflow.
IMPROBABLE = -31.0


def row_width(vocabulary: int) -> int:
    """Columns of Keep.RATIOS and Keep.ROWS: rows begin on whole groups of 16 entries."""
    return (vocabulary + 15) // 16 * 16


# The loss that `sequence_preference_loss` has in one launch; the others are compositions.
FUSED_PAIR_LOSS = "sigmoid"

# Parts of a nominal mass that are none: a share of 0.33 is not a binary fraction, and an adversary
# finds a loss of which 1e-17 is left. kMassRounding in csrc/core/dual_search.h.
MASS_ROUNDING = 1e-14

POLICY_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")
IMPORTANCE_LEVELS = ("token", "sequence")
# exp of more is not a ratio to learn from: in float32 its square would overflow the optimizer's
# second moment. Larger exponents are clamped, without gradient, and counted.
EXPONENT_LIMIT = 40.0


class SequenceStatistics(NamedTuple):
    """Sums over the counted tokens of each sequence (S,), detached.

    tokens: how many count; surrogate: -min(r A, clip(r) A); kl: the (corrected) k3 estimate, 0
    without a reference; ratio: r; low_clipped, high_clipped: tokens whose clip took the gradient
    away, for A < 0 and A > 0; overflowed: tokens whose log-ratio, to the old or the reference
    policy, was clamped at 40; entropy: 0 where none was given.
    """

    tokens: Tensor
    surrogate: Tensor
    kl: Tensor
    ratio: Tensor
    low_clipped: Tensor
    high_clipped: Tensor
    overflowed: Tensor
    entropy: Tensor
