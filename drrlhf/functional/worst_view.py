"""`worst_view`: the loss of a pair is the worst over the forms that it is given in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from drrlhf import ops
from drrlhf.ambiguity import AmbiguitySet
from drrlhf.checks import check_device, check_floating
from drrlhf.functional.row_sets import solvable

WORST = "max"


def worst_view(
    losses: Tensor, ambiguity: str | AmbiguitySet = WORST, mask: Tensor | None = None
) -> Tensor:
    """The worst case of each pair over its K views, (n, K) -> (n,).

    A view is the same pair in another form that must not change the preference. For every row,

        value = max over q in the set around the uniform distribution of sum_k q_k l_k,

    minus the set's penalty if it has one, with d value / d l_k = q_k (Danskin). What comes out goes
    into any loss over pairs, such as `robust_risk`, whose set then acts on top of it.

    Args:
        losses: (n, K), floating, any sign.
        ambiguity: ``"max"``, the worst view; ``"mean"``, all alike (augmentation);
            ``"kl:temperature=t"``, t log mean_k exp(l_k / t); ``"cvar:a"``, the mean of the worst
            share a; ``"tv:r"``, a share r of the weight moved to the worst; or such a set, as
            `drrlhf.CVaR` is one.
        mask: (n, K) bool, False where a pair has no such view: that entry never matters, even NaN.

    Returns:
        (n,), float32, or float64 for float64 losses. A row without a view has value 0.

    Raises:
        ValueError: shapes, dtypes, or a set without a closed form for rows.
    """
    return worst_views(losses, ambiguity, mask).values


def worst_views(
    losses: Tensor, ambiguity: str | AmbiguitySet = WORST, mask: Tensor | None = None
) -> Any:
    """As `worst_view`, named: values (n,), and weights (n, K) of the views, detached, which sum to
    1 by row."""
    check_floating("losses", losses)
    if losses.ndim != 2:
        raise ValueError(
            f"losses: expected shape (n, K), a row of views for each pair, got "
            f"{tuple(losses.shape)}; add a dimension with .unsqueeze(1)"
        )
    check_device("mask", mask, "losses", losses)
    if mask is not None and (mask.shape != losses.shape or mask.dtype != torch.bool):
        raise ValueError(
            f"mask: expected bool of shape {tuple(losses.shape)} as losses, got {mask.dtype} of "
            f"{tuple(mask.shape)}"
        )
    encoded = solvable("ambiguity", ambiguity, WORST)
    return ops.row_worst_case(losses, mask, None, encoded.kind, encoded.parameter)
