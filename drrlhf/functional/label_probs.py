"""Labels that are probabilities: a pair's loss over both outcomes, and the adversary over them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

import torch
from torch import Tensor

from drrlhf.ambiguity import ChiSquare, parse_ambiguity
from drrlhf.checks import (
    check_floating,
    check_none,
    check_vector,
    constant_in_graphs,
)


class LabelOptions(TypedDict, total=False):
    """The keyword arguments that say how sure a pair's label is.

    label_probs: (n,) in [0, 1], the probability that the chosen one is the better one, such as its
        share of the votes; None: labels are certain.
    label_ambiguity: ``"erm"``, believe it; ``"chi2:r"``, the worst probability near it.
    """

    label_probs: Tensor | None
    label_ambiguity: str


LABEL_OPTIONS = frozenset(LabelOptions.__annotations__)


@constant_in_graphs
def label_radius(ambiguity: str) -> float:
    """r of ``"chi2:r"``, 0 of ``"erm"``.

    Raises:
        ValueError: another set.
    """
    found = parse_ambiguity(ambiguity)
    if isinstance(found, ChiSquare) and found.radius is not None and not found.trim:
        return found.radius
    if str(found) != "erm":
        raise ValueError(
            f"label_ambiguity: expected 'erm' or 'chi2:RADIUS', got {ambiguity!r}; the sets over "
            "pairs go to ambiguity="
        )
    return 0.0


def check_labels(options: Mapping[str, Any], n: int, like: str, on: Tensor) -> None:
    """ValueError unless the options, of n pairs, go together."""
    probs = options.get("label_probs")
    radius = label_radius(options.get("label_ambiguity", "erm"))
    if probs is None:
        if radius:
            raise ValueError(
                "label_probs: label_ambiguity needs the probability of every label, expected "
                f"shape ({n},) in [0, 1], got None; a label of probability 1 has no doubt"
            )
        return
    check_vector("label_probs", probs, n, like, on)
    check_floating("label_probs", probs)
    check_none(
        lambda: ~((probs >= 0) & (probs <= 1)),
        lambda read, _: (
            f"label_probs: expected probabilities in [0, 1], got {read(probs).tolist()}"
        ),
        probs,
    )


def over_outcomes(
    losses: Tensor, swapped: Tensor, label_probs: Tensor, label_ambiguity: str = "erm"
) -> Tensor:
    """The losses (n,) of pairs whose labels have probabilities p (n,):

        max over q in [0, 1] with D(q || p) <= r of q l + (1 - q) l',

    l being the loss as labelled and l' that of the other outcome, both (n,), and D the chi-square
    divergence of `ChiSquare` between two outcomes, (q - p)² / (2 p (1 - p)). The worst q lies
    sqrt(2 r p (1 - p)) from p, towards the larger of the two losses, and not beyond [0, 1]; the
    gradient is that of q held fast. r = 0 is cross-entropy with soft labels; with DPO's loss r > 0
    is DPO-PRO (arXiv 2510.23590). A label of probability 0 or 1 is not doubted.
    """
    p = label_probs.detach().to(losses.dtype)
    p = torch.where((p >= 0) & (p <= 1), p, torch.nan)  # what a device does not refuse
    away = (2 * label_radius(label_ambiguity) * p * (1 - p)).sqrt()
    q = torch.where(losses.detach() >= swapped.detach(), p + away, p - away).clamp(0.0, 1.0)
    # What cannot happen has no loss, even an infinite one.
    as_labelled = torch.where(q == 0, 0.0, q * losses)
    return as_labelled + torch.where(q == 1, 0.0, (1 - q) * swapped)
