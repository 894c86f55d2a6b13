"""`robust_reward`: the reward of a completion is the worst over several reward functions."""

from __future__ import annotations

import torch
from torch import Tensor

from drrlhf import ops
from drrlhf.ambiguity import AmbiguitySet
from drrlhf.checks import check_floating, check_none, check_vector
from drrlhf.conventions import statistics_dtype
from drrlhf.functional.row_sets import solvable

UWO = "uwo"
WORST = "min"
PLAIN = "erm"  # what "mean" is encoded as


def robust_reward(
    rewards: Tensor, ambiguity: str | AmbiguitySet = WORST, weights: Tensor | None = None
) -> Tensor:
    """The worst case of each completion over K reward functions, (n, K) -> (n,).

    With the nominal distribution p in proportion to ``weights``, for every row

        value = (sum of weights) * min over q in the set around p of sum_k q_k r_k,

    plus the set's penalty if it has one, so that ``"mean"`` is sum_k w_k r_k, TRL's own reward.
    Where a function did not score, p is that of the others, which share its weight: two rows with
    the same worst reward are equal, whoever scored. ``"mean"`` alone leaves its term out, as TRL
    does, so that a missing reward counts as 0 there.
    Rewards are compared as they come: functions that are to be compared by their spread, and not
    by their size, must be brought to one scale before.

    Args:
        rewards: (n, K), floating. NaN: the function did not score that completion.
        ambiguity: ``"min"``, the least reward; ``"mean"``; ``"kl:temperature=t"``,
            -t log sum_k p_k exp(-r_k / t); ``"tv:r"``, a share r of the weight moved to the least;
            ``"cvar:a"``, the mean of the least share a; ``"uwo:c"``, the mean minus c times the
            variance over functions (Coste et al., arXiv 2310.02743, equation 5); or a set such as
            `drrlhf.CVaR`.
        weights: (K,) >= 0, TRL's ``reward_weights``, constants; 1 each unless given.

    Returns:
        (n,), float32, or float64 for float64 rewards; NaN where no function scored, or none that
        has a weight; on a GPU also where the weights are not as above.

    Raises:
        ValueError: shapes, dtypes, negative weights, or a set without a closed form for rows.
    """
    check_floating("rewards", rewards)
    if rewards.ndim != 2:
        raise ValueError(
            f"rewards: expected shape (n, K), a row of rewards for each completion, got "
            f"{tuple(rewards.shape)}"
        )
    table = rewards.to(statistics_dtype(rewards))
    w = table.new_ones(table.shape[1]) if weights is None else _checked(weights, table)
    scored = ~table.isnan() & (w > 0)  # what has no weight does not matter, not even infinite
    penalty = uncertainty("ambiguity", ambiguity)
    # Sums, for autocast would round a product.
    held, everyone = torch.where(scored, w, 0.0).sum(1), w.sum()
    if penalty is None:
        encoded = solvable("ambiguity", ambiguity, WORST)
        found = ops.row_worst_case(-table, scored, w, encoded.kind, encoded.parameter)
        # As nansum leaves out who did not score: `mean` is TRL's number.
        values = -(held if encoded.kind == PLAIN else everyone) * found.values
    else:
        known = torch.where(scored, table, 0.0)
        p = torch.where(scored, w, 0.0) / torch.where(held > 0, held, 1.0).unsqueeze(1)
        mean = (p * known).sum(1, keepdim=True)
        spread = (p * (known - mean).square()).sum(1)
        values = everyone * (mean.squeeze(1) - penalty * spread)
    return torch.where((held > 0) & (everyone >= 0), values, torch.nan)


def _checked(weights: Tensor, table: Tensor) -> Tensor:
    """The weights, in the dtype of the table; NaN for what is none, where nothing refuses it."""
    check_vector("weights", weights, table.shape[1], "rewards", table)
    w = weights.detach().to(table.dtype)
    check_none(
        lambda: ~((w >= 0) & w.isfinite()),
        lambda read, _: f"weights: expected numbers >= 0, got {read(w).tolist()}",
        w,
    )
    return torch.where((w >= 0) & w.isfinite(), w, torch.nan)


def uncertainty(option: str, ambiguity: str | AmbiguitySet) -> float | None:
    """c of ``"uwo:c"``; None of any other set.

    Raises:
        ValueError: c is no finite number >= 0.
    """
    name, _, value = str(ambiguity).strip().lower().partition(":")
    if name != UWO:
        return None
    try:
        found = float(value)
    except ValueError:
        found = float("nan")
    if not 0 <= found < float("inf"):
        raise ValueError(f"{option}: expected uwo:c with a finite c >= 0, got {ambiguity!r}")
    return found
