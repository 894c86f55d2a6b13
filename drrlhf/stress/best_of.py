"""Best of n: what the answer that a model ranks first is worth, in gold scores.

All numbers over the n that are drawn are exact: of N candidates, n of them drawn without
replacement, the one of ascending rank k by the model's score is the first with probability

    w_k = C(k - 1, n - 1) / C(N, n),

so no sample of draws is needed. Bands are 95 % percentile intervals of bootstrap samples of prompts
(`drrlhf.stress.resample`).
"""

from __future__ import annotations

import itertools
from bisect import bisect_right, insort
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from drrlhf.files.tables import DataError
from drrlhf.stress.resample import FEW_PROMPTS, Array, Bootstrap, band
from drrlhf.stress.scores import Scores
from drrlhf.stress.student import above_zero

# How the scores of several models become one, for `drrlhf.robust_reward`.
COMBINED = ("min", "mean", "kl:temperature=1", "uwo:1")
SUBSET = "subset"
Ragged = Sequence[ArrayLike]


def best_of_curve(
    scores: Ragged,
    gold: Ragged,
    counts: Sequence[int] | None = None,
    *,
    resamples: int = 200,
    seed: int = 0,
) -> dict[str, Any]:
    """The expected gold score of the first of n by the model's score, over n (best of n; Gao et
    al., arXiv 2210.10760).

    With the gold scores g_k of a prompt in ascending order of the model's scores, and w_k as above,
    it is sum_k w_k g_k, and the mean of that over prompts. Candidates of equal model score stand
    for their mean gold score: each of them is as often the first. As n grows a model that is
    optimised too far turns over: gold falls while the model's own score still rises.

    Args:
        scores: the model's scores, an array (N_i,) for each of P prompts.
        gold: the gold scores, of the same shapes.
        counts: the n, each from 1 to the smallest N_i; by default 1, 2, 4, ... and the smallest
            N_i.
        resamples: bootstrap samples of prompts, at least 20.
        seed: of the resampling.

    Returns:
        - "points", one for each n: "n"; "kl", log n - (n - 1) / n, which bounds from above how far
          best of n is from one draw (Beirami et al., arXiv 2401.01879); "gold" with "value", "low",
          "high"; "best_possible", the value where the gold score itself ranks;
        - "turns_over": "n" of the largest mean gold; "difference", the gold at the largest n minus
          that, with the band of this paired difference; "beyond_band", whether the band lies below
          0, and Student's interval as well, at a level divided by the number of smaller n: the
          largest was found on the same prompts, so the difference leans to the low side;
        - "prompts" and "left_out", prompts with a score that is not finite; "candidates", the
          smallest and the largest N_i; "notes", sentences for the reader.

    Raises:
        ValueError: shapes that differ, no prompt left, n or resamples out of range.
    """
    _check_resamples(resamples)
    ranked, values, left_out = _finite(scores, gold)
    sizes = [len(one) for one in ranked]
    taken = _counts(counts, min(sizes))
    weights = {size: first_of(size, taken) for size in {*sizes}}
    both = [
        np.array([weights[len(g)] @ _in_order(order, g) for order, g in zip(first, values)])
        for first in (ranked, values)
    ]
    means, drawn = _bootstrap(np.hstack([both[0], both[1]]), resamples, seed)
    model, oracle = means[: len(taken)], means[len(taken) :]
    peak = int(model.argmax())
    fall = drawn[:, len(taken) - 1] - drawn[:, peak]
    difference = band(float(model[-1] - model[peak]), fall.tolist())
    falls = both[0][:, peak] - both[0][:, -1]
    return {
        "points": [
            {
                "n": n,
                "kl": float(np.log(n) - (n - 1) / n),
                "gold": band(float(model[i]), drawn[:, i].tolist()),
                "best_possible": float(oracle[i]),
            }
            for i, n in enumerate(taken)
        ],
        "turns_over": {
            "n": taken[peak],
            "difference": difference,
            "beyond_band": difference["high"] < 0
            and above_zero(falls, np.arange(len(sizes)), max(len(taken) - 1, 1)),
        },
        "prompts": len(sizes),
        "left_out": left_out,
        "candidates": {"smallest": min(sizes), "largest": max(sizes)},
        "notes": [*_notes(len(sizes), left_out), *(_cut_short(sizes) if counts is None else ())],
    }


def best_of_curves(
    scores_by_model: Mapping[str, Ragged],
    gold: Ragged,
    counts: Sequence[int] | None = None,
    *,
    combinations: Sequence[str] = COMBINED,
    resamples: int = 200,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """`best_of_curve` of every model, by name, and of their `combined` scores, by how.

    Every curve is over the same prompts: those that all models have scored. With one model there is
    nothing to combine.

    Raises:
        ValueError: as `best_of_curve` and `combined`, or a model that is named as a combination.
    """
    clash = sorted({*scores_by_model} & {*combinations})
    if clash:
        raise ValueError(
            f"scores_by_model: expected names other than those of combinations, got {clash[0]!r}; "
            "rename the model"
        )
    if len(scores_by_model) > 1:
        mixed = {how: combined(scores_by_model, how) for how in combinations}
        whole = [bool(np.isfinite(one).all()) for one in combined(scores_by_model, "mean")]
    else:
        mixed, whole = {}, [True] * len(gold)
    found = {}
    for name, scores in {**scores_by_model, **mixed}.items():
        _check_shapes({name: scores, "gold": gold})
        kept = [
            one if fine else np.full(np.shape(one), np.nan)
            for one, fine in zip(scores, whole, strict=True)
        ]
        found[name] = best_of_curve(kept, gold, counts, resamples=resamples, seed=seed)
    return found


def combined(scores_by_model: Mapping[str, Ragged], how: str = "min") -> list[Array]:
    """One score of several models' (Coste et al., arXiv 2310.02743): `drrlhf.robust_reward` of the
    standardised ones, a row for each candidate and a column for each model.

    Scores of different models have no common scale, so each model's are standardised over the whole
    file: (s - mean) / standard deviation. Candidates that all models score alike stay tied.

    Args:
        scores_by_model: {name: an array (N_i,) for each of P prompts}, at least one model.
        how: "min", "mean", "kl:temperature=1", "uwo:1" or another set of `drrlhf.robust_reward`.

    Returns:
        P arrays (N_i,), float64; NaN where a model's score is not finite.

    Raises:
        ValueError: no model, shapes that differ, a model whose scores are all equal, or a set that
            `drrlhf.robust_reward` does not know.
    """
    # Beside numpy's work above, this is the one function that needs them.
    import torch

    import drrlhf as dr

    if not scores_by_model:
        raise ValueError("scores_by_model: expected the scores of at least one model, got none")
    given = _check_shapes(scores_by_model)
    table = np.stack([_standardised(name, np.concatenate(one)) for name, one in given.items()], 1)
    values, known = np.full(len(table), np.nan), np.isfinite(table).all(1)
    weights = torch.full((len(given),), 1 / len(given), dtype=torch.float64)
    values[known] = dr.robust_reward(torch.from_numpy(table[known]), how, weights).numpy()
    sizes = [len(one) for one in next(iter(given.values()))]
    return np.split(values, np.cumsum(sizes)[:-1])


def best_of_right(
    scores: Ragged,
    right: Ragged,
    subsets: Sequence[str | None] | None = None,
    *,
    resamples: int = 200,
    seed: int = 0,
) -> dict[str, Any]:
    """The share of prompts whose first answer by the model's score is a right one (RewardBench 2,
    arXiv 2506.01937).

    Where several share the first place, the prompt counts as the share of right ones among them.

    Args:
        scores: the model's scores, an array (N_i,) for each of P prompts.
        right: of the same shapes, 1 or True for right answers, 0 or False for wrong ones; at least
            one of each in every prompt.
        subsets: the name of each prompt's subset (P,), None for none.
        resamples: bootstrap samples of prompts, at least 20.
        seed: of the resampling.

    Returns:
        "share" with "value", "low", "high"; "chance", what a model without a clue would have;
        "prompts"; "left_out", those with a score that is not finite; "subsets", {name: the same
        numbers}; "notes".

    Raises:
        ValueError: shapes that differ, values of ``right`` that are neither 0 nor 1, a prompt
            without a right or without a wrong answer, no prompt left.
    """
    _check_resamples(resamples)
    given = _check_shapes({"scores": scores, "right": right})
    shares, chances = np.full((2, len(given["scores"])), np.nan)
    for i, (score, of_right) in enumerate(zip(given["scores"], given["right"])):
        if {*np.unique(of_right).tolist()} != {0.0, 1.0}:
            raise ValueError(
                f"right: expected 1 for right and 0 for wrong answers, and at least one of each in "
                f"every prompt; got {np.unique(of_right).tolist()} in prompt {i}; leave it out"
            )
        if np.isfinite(score).all():
            shares[i], chances[i] = of_right[score == score.max()].mean(), of_right.mean()
    return _right(shares, chances, subsets, resamples, seed)


def best_of_right_of_pairs(
    scores: Scores, by: str | None = None, *, resamples: int = 200, seed: int = 0
) -> dict[str, Any]:
    """`best_of_right` from the margins of every right answer of a prompt to every wrong one.

    The first answer is right where the right answer i of the largest min_j m_ij has it above 0; at
    0 the right answers that have it and the wrong ones that they tie with share the first place.

    Args:
        scores: pairs with ``answers``, as `load_scores` reads them of RewardBench 2 and of what
            `score_table` makes of a benchmark.
        by: the attribute of prompts that names their subset; by default "subset", if there is one.
        resamples: bootstrap samples of prompts, at least 20.
        seed: of the resampling.

    Returns:
        As `best_of_right`; "left_out" counts the prompts of which a pair is missing.

    Raises:
        ValueError: scores without answers, prompts that hold a pair of answers twice, an attribute
            that is not there or differs within a prompt, no prompt left.
    """
    _check_resamples(resamples)
    if scores.answers is None:
        raise ValueError(
            "scores: expected pairs that say which answers of the prompt they are made of, got "
            "none; give columns chosen_answer and rejected_answer, or a list of scores for each "
            "prompt"
        )
    if by is not None and by not in scores.attributes:
        found = ", ".join(scores.attributes) or "none"
        raise ValueError(f"by: expected one of the attributes of the scores, {found}; got {by!r}")
    order = np.argsort(scores.prompts, kind="stable")
    starts = np.flatnonzero(np.diff(scores.prompts[order], prepend=-1))
    groups = np.split(order, starts[1:])
    shares, chances = np.full((2, len(groups)), np.nan)
    for i, pairs in enumerate(groups):
        margins = _margins(scores.margin[pairs], *(one[pairs] for one in scores.answers))
        if margins is not None:
            shares[i], chances[i] = _share(margins), margins.shape[0] / sum(margins.shape)
    subsets = _subsets(scores, by or SUBSET, groups)
    return _right(shares, chances, subsets, resamples, seed)


def kendall_tau(
    scores: Ragged, gold: Ragged, *, resamples: int = 200, seed: int = 0
) -> dict[str, Any]:
    """Kendall's tau-b between the model's scores and gold, by prompt, averaged over prompts.

    Of the pairs of candidates of a prompt with c in the same order by both, d in the opposite one,
    and x and y without a tie in the scores and in gold, tau_b = (c - d) / sqrt(x y) (Kendall 1945).

    Args:
        scores: the model's scores, an array (N_i,) for each of P prompts.
        gold: the gold scores, of the same shapes.
        resamples: bootstrap samples of prompts, at least 20.
        seed: of the resampling.

    Returns:
        "tau" with "value", "low", "high"; "prompts"; "left_out", with a score that is not finite;
        "equal_gold", left out too, since all gold scores are equal; "constant_scores", prompts
        whose model scores are all equal, which count as 0: the model orders nothing; "notes".

    Raises:
        ValueError: shapes that differ, no prompt left.
    """
    _check_resamples(resamples)
    ranked, values, left_out = _finite(scores, gold)
    ordered = [(s, g) for s, g in zip(ranked, values) if g.min() < g.max()]
    if not ordered:
        raise ValueError(
            "gold: expected different gold scores in at least one prompt, got equal ones in all "
            f"{len(values)}; there is no order to compare with"
        )
    taus = np.array([[_tau_b(s, g)] for s, g in ordered])
    means, drawn = _bootstrap(taus, resamples, seed)
    return {
        "tau": band(float(means[0]), drawn[:, 0].tolist()),
        "prompts": len(ordered),
        "left_out": left_out,
        "equal_gold": len(values) - len(ordered),
        "constant_scores": sum(bool(s.min() == s.max()) for s, _ in ordered),
        "notes": [*_notes(len(ordered), left_out), *_equal_gold(len(ordered), len(values))],
    }


def check_left_out(source: str, left_out: int, prompts: int, max_nan: float) -> None:
    """`DataError` where more than a share ``max_nan`` of the ``prompts`` are ``left_out``: those
    that are left say little of all."""
    if left_out > max_nan * prompts:
        raise DataError(
            f"{source}: expected a share of {max_nan:g} at most of the prompts with a score that "
            f"is missing, or is no finite number; got {left_out:,} of {prompts:,}; score them "
            "again, leave them out, or raise --max-nan"
        )


def first_of(size: int, counts: Sequence[int]) -> Array:
    """The probability (counts, size) that the candidate of ascending rank 1, ..., ``size`` is the
    first of n drawn without replacement: C(k - 1, n - 1) / C(size, n), for each n in ``counts``.

    By the ratio of neighbours, w_{k-1} / w_k = (k - n) / (k - 1), from w_size = n / size down: no
    binomial is ever large, n = 1 and n = size are exact, and an error is that of a product of
    factors in [0, 1].
    """
    n = np.asarray(counts, dtype=np.float64)[:, None]
    k = np.arange(size, 1, -1, dtype=np.float64)
    # Behind k = n, where the ratio is 0, nothing is left: ranks below n are never the first.
    ratios = np.maximum((k - n) / (k - 1), 0.0)
    return np.cumprod(np.hstack([n / size, ratios]), axis=1)[:, ::-1]


# ---- what is given -------------------------------------------------------------------------------


def _check_resamples(resamples: int) -> None:
    if resamples < 20:
        raise ValueError(f"resamples: expected at least 20, for a band; got {resamples!r}")


def _check_shapes(given: Mapping[str, Ragged]) -> dict[str, list[Array]]:
    """The ragged arrays as float64; they must be of the same shapes, and hold something."""
    # Adding 0 makes -0.0 and 0.0 the same, also where rows are compared byte by byte.
    made = {name: [np.asarray(one, float) + 0.0 for one in many] for name, many in given.items()}
    first, shapes = None, []
    for name, arrays in made.items():
        found = [one.shape for one in arrays]
        odd = next((i for i, one in enumerate(found) if len(one) != 1 or not one[0]), None)
        if odd is not None or not found:
            what = "no prompt" if odd is None else f"shape {found[odd]} for prompt {odd}"
            raise ValueError(
                f"{name}: expected an array of at least one number for each prompt; got {what}"
            )
        if first is None:
            first, shapes = name, found
        if len(found) != len(shapes):
            raise ValueError(
                f"{name}: expected {len(shapes)} prompts, as in {first}; got {len(found)}"
            )
        odd = next((i for i, (a, b) in enumerate(zip(found, shapes)) if a != b), None)
        if odd is not None:
            raise ValueError(
                f"{name}: expected {shapes[odd][0]} candidates for prompt {odd}, as in {first}; "
                f"got {found[odd][0]}; give both for the same candidates"
            )
    return made


def _finite(scores: Ragged, gold: Ragged) -> tuple[list[Array], list[Array], int]:
    """Scores and gold of the prompts in which all are finite, and how many prompts are not."""
    given = _check_shapes({"scores": scores, "gold": gold})
    both = [*zip(given["scores"], given["gold"])]
    kept = [(s, g) for s, g in both if np.isfinite(s).all() and np.isfinite(g).all()]
    if not kept:
        raise ValueError(
            f"scores: expected a prompt whose scores and gold are all finite, got none of "
            f"{len(both)}; score them again"
        )
    return [s for s, _ in kept], [g for _, g in kept], len(both) - len(kept)


def _counts(counts: Sequence[int] | None, smallest: int) -> list[int]:
    if counts is None:
        powers = itertools.takewhile(lambda n: n < smallest, (2**i for i in itertools.count()))
        return [*powers, smallest]
    taken = sorted({int(n) for n in counts})
    if not taken or taken[0] < 1 or taken[-1] > smallest or {*taken} != {*counts}:
        raise ValueError(
            f"counts: expected whole numbers from 1 to {smallest}, the candidates of the prompt "
            f"that has fewest; got {list(counts)}"
        )
    return taken


def _standardised(name: str, scores: Array) -> Array:
    known = scores[np.isfinite(scores)]
    if not len(known) or known.min() == known.max():
        raise ValueError(
            f"scores_by_model: expected scores of {name!r} that differ, got "
            f"{'none that is finite' if not len(known) else f'{known[0]:g} everywhere'}; leave the "
            "model out"
        )
    return (scores - known.mean()) / known.std()


# ---- numbers of one prompt -----------------------------------------------------------------------


def _in_order(scores: Array, gold: Array) -> Array:
    """Gold (N,) in ascending order of the scores; of equal scores, their mean gold."""
    _, codes, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    return (np.bincount(codes, weights=gold) / sizes).repeat(sizes)


def _margins(margin: Array, chosen: NDArray[np.int64], rejected: NDArray[np.int64]) -> Array | None:
    """(right, wrong) of one prompt; None where one is missing, or an answer is not known."""
    right, wrong = np.unique(chosen), np.unique(rejected)
    known = np.union1d(right, wrong)
    if known[0] < 0 or known[-1] != len(known) - 1 or len(np.intersect1d(right, wrong)):
        return None
    places = np.searchsorted(right, chosen), np.searchsorted(wrong, rejected)
    table = np.full((len(right), len(wrong)), np.nan)
    table[places] = margin
    if len(margin) > len(np.unique(places[0] * len(wrong) + places[1])):
        raise ValueError(
            f"scores: expected every pair of answers once in a prompt, got {len(margin)} pairs of "
            f"{table.size}; tell prompts apart by their prompt_id"
        )
    return None if np.isnan(table).any() else table


def _share(margins: Array) -> float:
    """The share of right answers in the first place, from margins (right, wrong)."""
    least = margins.min(1)
    if least.max() != 0:
        return float(least.max() > 0)
    right, wrong = (least == 0).sum(), (margins[least.argmax()] == 0).sum()
    return float(right / (right + wrong))


def _tau_b(scores: Array, gold: Array) -> float:
    """Kendall's tau-b; 0 where all scores are equal. Opposite pairs are counted by insertion into a
    sorted list, N log N comparisons."""
    order = np.lexsort((gold, scores))
    seen: list[float] = []
    opposite = 0
    # Equal scores come by ascending gold, so none of their pairs counts as opposite.
    for value in gold[order].tolist():
        opposite += len(seen) - bisect_right(seen, value)
        insort(seen, value)
    pairs = len(gold) * (len(gold) - 1) // 2
    in_scores, in_gold = _ties(scores), _ties(gold)
    in_both = _ties(np.stack([scores, gold], 1))
    if in_scores == pairs:
        return 0.0
    untied = pairs - in_scores - in_gold + in_both
    return (untied - 2 * opposite) / float(np.sqrt(pairs - in_scores) * np.sqrt(pairs - in_gold))


def _ties(values: Array) -> int:
    """How many pairs of the values, or of rows, are equal."""
    sizes = np.unique(values, axis=0, return_counts=True)[1]
    return int((sizes * (sizes - 1) // 2).sum())


# ---- numbers over prompts ------------------------------------------------------------------------


def _bootstrap(values: Array, resamples: int, seed: int) -> tuple[Array, Array]:
    """Means (C,) over prompts of values (P, C), and those of resampled prompts (resamples, C)."""
    return values.mean(0), Bootstrap.of(np.arange(len(values)), resamples, seed).drawn(values)


def _right(
    shares: Array,
    chances: Array,
    subsets: Sequence[str | None] | None,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """What `best_of_right` returns, from the share (P,) of each prompt, NaN for those left out."""
    if subsets is not None and len(subsets) != len(shares):
        raise ValueError(f"subsets: expected {len(shares)} names, got {len(subsets)}")
    known = ~np.isnan(shares)
    if not known.any():
        raise ValueError(
            f"scores: expected a prompt with all its scores, got none of {len(shares)}; score them "
            "again, or tell prompts apart by their prompt_id"
        )

    def summary(which: NDArray[np.bool_]) -> dict[str, Any]:
        means, drawn = _bootstrap(shares[which][:, None], resamples, seed)
        return {
            "share": band(float(means[0]), drawn[:, 0].tolist()),
            "chance": float(chances[which].mean()),
            "prompts": int(which.sum()),
        }

    names = np.array([None] * len(shares) if subsets is None else list(subsets), dtype=object)
    there = dict.fromkeys(name for name in names[known].tolist() if name is not None)
    left_out = int((~known).sum())
    return summary(known) | {
        "left_out": left_out,
        "subsets": {name: summary(known & (names == name)) for name in there},
        "notes": _notes(int(known.sum()), left_out),
    }


def _subsets(
    scores: Scores, by: str, groups: Sequence[NDArray[np.int64]]
) -> list[str | None] | None:
    """The name of each prompt's subset, where there are subsets."""
    if by not in scores.attributes:
        return None
    attribute = scores.attributes[by]
    mixed = next((one for one in groups if len({*attribute.codes[one].tolist()}) > 1), None)
    if mixed is not None:
        raise ValueError(
            f"by: expected an attribute of prompts, got {by!r}, of which pairs of one prompt have "
            f"{len({*attribute.codes[mixed].tolist()})} values"
        )
    codes = (int(attribute.codes[one[0]]) for one in groups)
    return [None if code < 0 else attribute.names[code] for code in codes]


def _cut_short(sizes: Sequence[int]) -> list[str]:
    """A note where a tenth of the prompts at most keeps a curve from going on to twice its n."""
    last, reach = min(sizes), int(np.quantile(sizes, 0.1, method="higher"))
    if reach < 2 * last:
        return []
    return [
        f"The curve ends at n = {last}: {sum(size < reach for size in sizes):,} of {len(sizes):,} "
        f"prompts have fewer candidates than the {reach} that it would reach without them."
    ]


def _notes(prompts: int, left_out: int) -> list[str]:
    few = f"Only {prompts} prompt{'s' * (prompts > 1)}: bands rest on so few, and are rough."
    lost = (
        f"{left_out:,} of {prompts + left_out:,} prompts are left out: a score of theirs is "
        "missing, or is no finite number."
    )
    return [few] * (prompts < FEW_PROMPTS) + [lost] * (left_out > 0)


def _equal_gold(ordered: int, prompts: int) -> list[str]:
    if ordered == prompts:
        return []
    return [
        f"In {prompts - ordered:,} of {prompts:,} prompts all gold scores are equal: there is no "
        "order to compare with."
    ]
