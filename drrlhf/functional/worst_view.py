"""`worst_view`: the loss of a pair is the worst over the forms that it is given in."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from drrlhf.ambiguity import Encoded
from drrlhf.checks import check_device, check_floating
from drrlhf.conventions import statistics_dtype
from drrlhf.functional.row_worst_case import Rows, row_worst_case, solvable


def worst_view(losses: Tensor, ambiguity: str = "max", mask: Tensor | None = None) -> Tensor:
    """The worst case of each pair over its K views, (n, K) -> (n,).

    A view is the same pair in another form that must not change the preference. For every row,

        value = max over q in the set around the uniform distribution of sum_k q_k l_k,

    minus the set's penalty if it has one, with d value / d l_k = q_k (Danskin). What comes out goes
    into any loss over pairs, such as `robust_risk`, whose set then acts on top of it.

    Args:
        losses: (n, K), floating, any sign.
        ambiguity: ``"max"``, the worst view; ``"mean"``, all alike (augmentation);
            ``"kl:temperature=t"``, t log mean_k exp(l_k / t); ``"cvar:a"``, the mean of the worst
            share a; ``"tv:r"``, a share r of the weight moved to the worst.
        mask: (n, K) bool, False where a pair has no such view: that entry never matters, even NaN.

    Returns:
        (n,), float32, or float64 for float64 losses. A row without a view has value 0.

    Raises:
        ValueError: shapes, dtypes, or a set without a closed form for rows.
    """
    table, encoded = _checked(losses, ambiguity, mask)
    found = _direct(table, mask, encoded) if table.shape[1] else None
    return _solved(table, mask, encoded).values if found is None else found


def _direct(table: Tensor, mask: Tensor | None, encoded: Encoded) -> Tensor | None:
    """The values of sets that PyTorch has one reduction for; None of the others."""
    t = encoded.parameter
    if encoded == solvable("ambiguity", "max"):
        found = _among(table, mask, -math.inf).amax(1)
    elif encoded.kind == "erm":
        found = _among(table, mask, 0.0).sum(1) / _count(table, mask)
    elif encoded.kind == "kl_temperature" and t > 0:
        sums = torch.logsumexp(_among(table, mask, -math.inf) / t, 1)
        found = t * (sums - _count(table, mask).log())
    else:
        return None
    return found if mask is None else torch.where(mask.any(1), found, 0.0)


def _among(table: Tensor, mask: Tensor | None, other: float) -> Tensor:
    return table if mask is None else table.masked_fill(~mask, other)


def _count(table: Tensor, mask: Tensor | None) -> Tensor:
    """How many views count, () or (n,)."""
    return table.new_tensor(table.shape[1]) if mask is None else mask.sum(1).to(table.dtype)


def worst_views(losses: Tensor, ambiguity: str = "max", mask: Tensor | None = None) -> Rows:
    """As `worst_view`, with the weights (n, K) of the views, detached; they sum to 1 by row."""
    table, encoded = _checked(losses, ambiguity, mask)
    return _solved(table, mask, encoded)


def _solved(table: Tensor, mask: Tensor | None, encoded: Encoded) -> Rows:
    counted = torch.ones_like(table) if mask is None else mask.to(table.dtype)
    return row_worst_case(table, counted, encoded)


def _checked(losses: Tensor, ambiguity: str, mask: Tensor | None) -> tuple[Tensor, Encoded]:
    """The losses in the dtype of statistics, and the set."""
    _check(losses, mask)
    return losses.to(statistics_dtype(losses)), solvable("ambiguity", ambiguity)


def _check(losses: Tensor, mask: Tensor | None) -> None:
    check_floating("losses", losses)
    if losses.ndim != 2:
        raise ValueError(
            f"losses: expected shape (n, K), a row of views for each pair, got "
            f"{tuple(losses.shape)}; add a dimension with .unsqueeze(1)"
        )
    if mask is None:
        return
    check_device("mask", mask, "losses", losses)
    if mask.shape != losses.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"mask: expected bool of shape {tuple(losses.shape)} as losses, got {mask.dtype} of "
            f"{tuple(mask.shape)}"
        )
