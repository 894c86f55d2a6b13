"""A radius to train with, from the losses of a model that was trained without an adversary.

The worst case R_r over a ball of radius r around the scored pairs *covers* a mean loss c where
R_r(losses) >= c: some reweighting within the ball costs that much. Two rules name the losses to
cover; the smallest radius that does is what they suggest.

- ``groups``: for every group g, the mean loss of g is covered by the pairs outside g. So a group
  that the model knows badly is what new prompts may be like.
- ``bootstrap``: the 95 % quantile of the mean loss over bootstrap samples of the prompts is
  covered. This is what chance alone may do to a sample of this size; for KL and chi-square the
  radius is near z²/(2n), z = 1.64, n independent pairs (Duchi, Glynn, Namkoong, arXiv 1610.03425).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from drrlhf.ambiguity import AmbiguitySet, parse_ambiguity
from drrlhf.stress.curves import RADII, SEARCHED, Array, losses_of, set_of, worst_case
from drrlhf.stress.resample import Bootstrap
from drrlhf.stress.scores import Scores

WEAKEST = 1e-6
_HALVINGS = 24
_ROUNDING = 1e-12


def strength_of(ambiguity: AmbiguitySet) -> float:
    """The radius, or 1 - alpha for CVaR: 0 is no adversary, more is stronger."""
    encoded = ambiguity.encode()
    return round(1 - encoded.parameter, 12) if encoded.kind == "cvar" else encoded.parameter


# How far the search goes.
STRONGEST = {
    family: strength_of(set_of(family, strong)) for family, (_, strong) in SEARCHED.items()
}


def suggest_radius(
    scores: Scores,
    *,
    group_by: str | None = None,
    families: Sequence[str] = tuple(RADII),
    quantile: float = 0.95,
    resamples: int = 1000,
    min_support: int = 30,
    seed: int = 0,
) -> dict[str, Any]:
    """The smallest radius of each set whose worst case covers what chance, or other groups, cost.

    Args:
        scores: pairs scored by a plainly trained model that did not train on them; losses are
            -log sigmoid(margin).
        group_by: the attribute whose groups are to be covered, best scored by a model that did not
            train on the group; None leaves the rule ``groups`` out.
        families: which of "tv", "kl", "chi2", "cvar".
        quantile: of the bootstrapped mean loss, in (0.5, 1).
        resamples: bootstrap samples of prompts, at least 100.
        min_support: prompts that a group, and what is outside it, must have to count.
        seed: of the resampling.

    Returns:
        "pairs", "prompts", "pairs_without_prompt" (each a prompt of its own), "mean_loss";
        "bootstrap" with "target" and "sets" {family: set as text}; "groups" (None without
        ``group_by``) with "column", "sets", "decided_by" {family: group}, "too_small", and "each",
        the suggestion of every group. Radii are rounded up to two digits; a set is None where no
        reweighting of these pairs costs enough.

    Raises:
        ValueError: an unknown attribute or family, no two large enough groups, or an option out of
            its range.
    """
    unknown = set(families) - STRONGEST.keys()
    if unknown or not families:
        raise ValueError(f"families must be of {', '.join(STRONGEST)}; got {list(families)}")
    if not 0.5 < quantile < 1:
        raise ValueError(f"quantile must lie in (0.5, 1), got {quantile!r}")
    if resamples < 100:
        raise ValueError(f"resamples must be at least 100, for a quantile; got {resamples}")
    if min_support < 2:
        raise ValueError(f"min_support must be at least 2, got {min_support}")
    losses = losses_of(scores.margin)
    drawn = Bootstrap.of(scores.prompts, resamples, seed).drawn(losses)
    target = float(np.quantile(drawn, quantile))
    return {
        "source": scores.source,
        "pairs": len(scores),
        "prompts": len(np.unique(scores.prompts)),
        "pairs_without_prompt": scores.without_prompt,
        "mean_loss": float(losses.mean()),
        "bootstrap": {
            "quantile": quantile,
            "target": target,
            "sets": {family: _text(covering(losses, target, family)) for family in families},
        },
        "groups": None
        if group_by is None
        else _of_groups(losses, scores, group_by, families, min_support),
    }


def covering(losses: Array, target: float, family: str) -> AmbiguitySet | None:
    """The weakest set of a family, to two digits rounded up, whose worst-case mean of ``losses``
    (n,) is at least ``target``; None if the strongest that is searched is not enough."""

    def covers(strength: float) -> bool:
        found = worst_case(losses, None, _of_strength(family, strength))
        return found >= target - _ROUNDING * abs(target)

    if target <= losses.mean():
        return _of_strength(family, 0)
    strong = STRONGEST[family]
    if not covers(strong):
        return None
    weak = WEAKEST
    if covers(weak):
        return _of_strength(family, weak)
    for _ in range(_HALVINGS):
        middle = math.sqrt(weak * strong)
        weak, strong = (weak, middle) if covers(middle) else (middle, strong)
    near = float(f"{strong:.1e}")
    if near < STRONGEST[family] and covers(near):
        return _of_strength(family, near)
    above = _rounded(strong, up=True)
    if family == "cvar" and above > STRONGEST[family]:  # alpha itself, rounded down
        return set_of(family, _rounded(1 - strong, up=False))
    return _of_strength(family, min(above, STRONGEST[family]))


def _of_strength(family: str, strength: float) -> AmbiguitySet:
    return set_of(family, round(1 - strength, 12) if family == "cvar" else strength)


def _rounded(number: float, up: bool) -> float:
    """Rounded up or down to two significant digits."""
    digits = f"{number:.1e}"
    near = float(digits)
    if near >= number if up else near <= number:
        return near
    step = float(f"1e{int(digits.split('e')[1]) - 1}")
    return float(f"{near + (step if up else -step):.1e}")


def _text(ambiguity: AmbiguitySet | None) -> str | None:
    return None if ambiguity is None else str(ambiguity)


def _of_groups(
    losses: Array, scores: Scores, column: str, families: Sequence[str], min_support: int
) -> dict[str, Any]:
    attribute = scores.attributes.get(column)
    if attribute is None:
        known = ", ".join(scores.attributes) or "none"
        why = f" ({scores.ignored[column]})" if column in scores.ignored else ""
        raise ValueError(f"group_by: no attribute {column!r}{why} in {scores.source}; has: {known}")
    each: list[dict[str, Any]] = []
    too_small = []
    for code, name in enumerate(attribute.names):
        inside = attribute.codes == code
        sizes = [len(np.unique(scores.prompts[part])) for part in (inside, ~inside)]
        if min(sizes) < min_support:
            too_small.append(name)
            continue
        target = float(losses[inside].mean())
        each.append(
            {
                "group": name,
                "pairs": int(inside.sum()),
                "mean_loss": target,
                "mean_loss_outside": float(losses[~inside].mean()),
                "sets": {f: _text(covering(losses[~inside], target, f)) for f in families},
            }
        )
    if len(each) < 2:
        raise ValueError(
            f"group_by: {column!r} has {len(each)} groups of at least {min_support} prompts with "
            "as many outside; need two: take a column of larger groups, or lower min_support"
        )
    decided = {
        family: max(each, key=lambda one: _order(one["sets"][family])) for family in families
    }
    return {
        "column": column,
        "sets": {family: one["sets"][family] for family, one in decided.items()},
        "decided_by": {family: one["group"] for family, one in decided.items()},
        "each": each,
        "too_small": too_small,
    }


def _order(text: str | None) -> float:
    return math.inf if text is None else strength_of(parse_ambiguity(text))
