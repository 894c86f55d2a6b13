"""What the worst-case reweighting piles onto, in words that a person can use."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from drrlhf.ambiguity import AmbiguitySet
from drrlhf.stress.curves import ERRORS, Array, error_codes, losses_of, worst_case_weights
from drrlhf.stress.resample import counts
from drrlhf.stress.scores import Scores
from drrlhf.stress.student import above

NAMED = 5
# A group is named when its share of the weight rises by a tenth of itself or more, and by more than
# chance: a handful of pairs that carry all weight lie in some group by themselves.
LIFT = 1.1
STANDARD_ERRORS = 3.0


def adversary_of(
    scores: Scores, blocks: NDArray[np.int64], ambiguity: AmbiguitySet, min_support: int
) -> dict[str, Any]:
    """Where ``ambiguity``'s adversary over the losses moves weight, as numbers and sentences.
    ``blocks`` (n,) are those of prompts that pairs lie in."""
    n = len(scores)
    value, weights = worst_case_weights(losses_of(scores.margin), None, ambiguity)
    wrong = ERRORS[error_codes(scores.margin)]
    piled = _piled(scores, blocks, weights, min_support)
    facts = {
        "set": str(ambiguity),
        "loss": value,
        "effective_sample_size": float(weights.sum() ** 2 / (weights @ weights) / n),
        "largest_weight": float(weights.max() * n),
        "wrong": {"before": float(wrong.mean()), "after": float(weights @ wrong)},
        "piled": piled,
        "length": _length(scores, blocks, weights, min_support),
        "position": _position(scores),
    }
    return facts | {"sentences": _sentences(facts)}


def _piled(
    scores: Scores, blocks: NDArray[np.int64], weights: Array, min_support: int
) -> list[dict[str, Any]]:
    """The groups whose share of the weight rises most, among those with enough pairs.

    With q_i the weights, d_i = q_i - 1/n, which sum to 0, and p the share of pairs in a group, its
    share of the weight rises by sum_i d_i 1[i in group] = sum_i d_i (1[i in group] - p). Where the
    group has nothing to do with the losses, the terms of different prompts have mean 0 each, and
    the sum of their squares is the variance. Few heavy pairs make it as large as the rise itself.
    """
    found: list[dict[str, Any]] = []
    gained = weights - weights.sum() / len(weights)
    by_block = np.bincount(blocks, weights=gained)[:, None]
    for name, attribute in scores.attributes.items():
        codes, size = attribute.codes + 1, len(attribute.names) + 1  # what is not known is 0
        pairs = np.bincount(codes, minlength=size)[1:]
        before = pairs / len(scores)
        after = np.bincount(codes, weights=weights, minlength=size)[1:]
        inside = counts(blocks, codes, size, gained)[:, 1:]
        spread = np.square(inside - before * by_block).sum(0)
        sure = after - before > STANDARD_ERRORS * np.sqrt(spread)
        for index in np.flatnonzero((pairs >= min_support) & sure & (after >= LIFT * before)):
            share, own = float(after[index]), float(before[index])
            row = {"before": own, "after": share, "lift": share / own}
            found.append({"attribute": name, "value": attribute.names[index], **row})
    return sorted(found, key=lambda row: row["before"] - row["after"])[:NAMED]


def _length(
    scores: Scores, blocks: NDArray[np.int64], weights: Array, min_support: int
) -> dict[str, float] | None:
    """How scores follow length; None where lengths are not known. It "misleads" where the model is
    right more often by more than chance when the chosen answer is the longer one."""
    if scores.longer is None:
        return None
    known = np.isfinite(scores.longer) & (scores.longer != 0)
    if known.sum() < 2:
        return None
    longer, margin = scores.longer[known], scores.margin[known]
    right = 1 - ERRORS[error_codes(margin)]
    shorter = longer < 0
    return {
        "pairs": int(known.sum()),
        "prefers_longer": float(((np.sign(margin * longer) + 1) / 2).mean()),
        "chosen_is_longer": float((~shorter).mean()),
        "misleads": above(right, ~shorter, shorter, blocks[known], min_support),
        "accuracy_chosen_longer": _mean(right[~shorter]),
        "accuracy_chosen_shorter": _mean(right[shorter]),
        "rank_correlation": _rank_correlation(longer, margin),
        "weight_chosen_shorter": float(weights[known][shorter].sum() / weights[known].sum()),
    }


def _position(scores: Scores) -> dict[str, float] | None:
    """Accuracy by where the chosen answer stood; None where no column says."""
    if scores.position is None or not np.isfinite(scores.position).any():
        return None
    right = 1 - ERRORS[error_codes(scores.margin)]
    return {
        "accuracy_chosen_first": _mean(right[scores.position == 0]),
        "accuracy_chosen_second": _mean(right[scores.position == 1]),
    }


def _mean(values: Array) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _rank_correlation(a: Array, b: Array) -> float:
    """Spearman's: the correlation of ranks, ties sharing theirs; NaN when one is constant."""
    ranks = [_ranks(values) - (len(values) + 1) / 2 for values in (a, b)]
    spread = (ranks[0] @ ranks[0] * (ranks[1] @ ranks[1])) ** 0.5
    return float(ranks[0] @ ranks[1] / spread) if spread else float("nan")


def _ranks(values: Array) -> Array:
    _, places, sizes = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(sizes) - (sizes - 1) / 2)[places]


def _sentences(facts: dict[str, Any]) -> list[str]:
    wrong = facts["wrong"]
    said = [
        f"Under {facts['set']} pairs that the model ranks wrongly carry {wrong['after']:.1%} of "
        f"the weight instead of {wrong['before']:.1%}; the heaviest pair counts "
        f"{facts['largest_weight']:.1f} times, and the weighted sample is worth "
        f"{facts['effective_sample_size']:.0%} of the pairs."
    ]
    for one in facts["piled"]:
        said.append(
            f"It piles onto {one['attribute']} = {one['value']}: {one['after']:.1%} of the weight "
            f"instead of {one['before']:.1%} ({one['lift']:.2f} times)."
        )
    if not facts["piled"]:
        said.append("No group gains clearly: what is hard is spread.")
    return [*said, _said_of_length(facts["length"]), _said_of_position(facts["position"])]


def _said_of_length(length: dict[str, float] | None) -> str:
    if length is None:
        return (
            "Length bias: not known; give texts chosen and rejected, or chosen_length and "
            "rejected_length."
        )
    told = _told(
        length, "when the chosen answer is", chosen_longer="longer", chosen_shorter="shorter"
    )
    follows = length["rank_correlation"]
    beside = f" (rank correlation of margin and length {follows:+.2f})" * (follows == follows)
    return (
        f"Length: the model prefers the longer answer in {length['prefers_longer']:.1%} of the "
        f"pairs, where the chosen answer is longer in {length['chosen_is_longer']:.1%}; accuracy "
        f"is {told}{beside}."
    )


def _said_of_position(position: dict[str, float] | None) -> str:
    if position is None:
        return (
            "Position bias: not known; a column chosen_position (first or second) would tell. A "
            "reward model that reads one answer at a time has none."
        )
    told = _told(
        position, "when the chosen answer stands", chosen_first="first", chosen_second="second"
    )
    return f"Position: accuracy is {told}."


def _told(facts: dict[str, float], when: str, **halves: str) -> str:
    """The accuracies of two halves of the pairs, without one that is not known."""
    told = ((facts[f"accuracy_{key}"], what) for key, what in halves.items())
    return " and ".join(f"{one:.1%} {when} {what}" for one, what in told if one == one)
