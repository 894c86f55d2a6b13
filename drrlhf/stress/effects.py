"""What changes of the text do to a model: accuracy lost, attacks that succeed, the worst change of
each pair, and which additions without substance it likes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from drrlhf.stress.changes import margins_under, named
from drrlhf.stress.curves import ERRORS, Array, band, error_codes
from drrlhf.stress.resample import counts
from drrlhf.stress.scores import Scores
from drrlhf.transformations import ATTACK, BIAS, FORM, PROMPT

NAMED = 5


class Bootstrap(NamedTuple):
    """The blocks (n,) of prompts that pairs lie in, and how often each is drawn (B, J)."""

    blocks: NDArray[np.int64]
    draws: Array

    def mean(self, values: Array) -> dict[str, float]:
        """The mean of values (n,) that are not NaN, with its band; NaN where there are none."""
        known = np.isfinite(values)
        if not known.any():
            return dict.fromkeys(("value", "low", "high"), float("nan"))
        nowhere = np.zeros(int(known.sum()), dtype=np.int64)
        sums = np.zeros((2, self.draws.shape[1]))
        for row, weights in enumerate((None, values[known])):
            found = counts(self.blocks[known], nowhere, 1, weights)[:, 0]
            sums[row, : len(found)] = found
        drawn = (self.draws @ sums[1]) / np.maximum(self.draws @ sums[0], 1)
        return band(float(values[known].mean()), drawn.tolist())


def effects(scores: Scores, bootstrap: Bootstrap) -> dict[str, Any]:
    """Of every change: the pairs that it touches, their accuracy before and after, what is lost,
    and the share of right pairs that are right no more ("success" of who would mislead). Then the
    worst change of each pair, the best attack on each rejected answer, and how often an answer is
    preferred to itself for an addition. The gravest come first."""
    table = [
        _effect(scores.margin, new, bootstrap)
        | {
            "change": change.name,
            "sides": side,
            "kind": change.kind,
            "what": change.what,
            "keeps": change.keeps,
        }
        for change, side, new in margins_under(
            scores.margin, scores.rewards, scores.forms, scores.counterfactuals
        )
        if np.isfinite(new).any()
    ]
    return {
        "changes": sorted(table, key=lambda one: -one["lost"]["value"]),
        "worst_change": _worst_change(scores, bootstrap),
        "attacks": _attacks(scores, bootstrap),
        "biases": _biases(scores, bootstrap),
    }


def _effect(margin: Array, new: Array, bootstrap: Bootstrap) -> dict[str, Any]:
    known = np.isfinite(new)
    old_error, new_error = (
        np.where(known, ERRORS[error_codes(np.where(known, one, 0.0))], np.nan)
        for one in (margin, new)
    )
    return {
        "pairs": int(known.sum()),
        "accuracy_before": 1 - float(old_error[known].mean()),
        "accuracy": bootstrap.mean(1 - new_error),
        "lost": bootstrap.mean(new_error - old_error),
        "success": bootstrap.mean(np.where(known & (margin > 0), new <= 0, np.nan)),
        "flipped": float((np.sign(margin[known]) != np.sign(new[known])).mean()),
    }


def _least(rewards: Array, forms: Mapping[str, Array], side: int) -> tuple[Array, NDArray[Any]]:
    """The least reward (n,) of an answer over its forms and itself, and which of them has it (n,),
    0 for itself and then in the order of ``forms``."""
    table = np.column_stack([rewards[:, side], *(form[:, side] for form in forms.values())])
    table = np.where(np.isnan(table), np.inf, table)
    return table.min(1), table.argmin(1)


def worst_margin(scores: Scores) -> tuple[Array, Array, list[str]]:
    """The least margin (n,) of each pair over all changes that keep the meaning, on either answer
    or both, or on the prompt; whether any was tried (n,); and the names of these changes.

    With forms f of the chosen answer and g of the rejected one it is min_f r(f) - max_g r(g).
    """
    names = [name for name in scores.forms if named(name).kind == FORM]
    answers = {name: scores.forms[name] for name in names if named(name).on != PROMPT}
    worst, tried = scores.margin.copy(), np.zeros(len(scores), dtype=bool)
    if scores.rewards is not None and answers:
        mirrored = {name: -form for name, form in answers.items()}
        chosen = _least(scores.rewards, answers, 0)[0]
        worst = chosen + _least(-scores.rewards, mirrored, 1)[0]
        tried |= np.isfinite(np.column_stack(list(answers.values()))).any(1)
    for change, side, new in margins_under(
        scores.margin, scores.rewards, scores.forms, scores.counterfactuals
    ):
        if change.kind == FORM and (side == PROMPT or change.name in scores.counterfactuals):
            worst = np.fmin(worst, new)
            tried |= np.isfinite(new)
    return worst, tried, [*names, *scores.counterfactuals]


def _worst_change(scores: Scores, bootstrap: Bootstrap) -> dict[str, Any] | None:
    worst, tried, names = worst_margin(scores)
    if not tried.any():
        return None
    effect = _effect(scores.margin, np.where(tried, worst, np.nan), bootstrap)
    found: dict[str, Any] = effect | {"changes": names, "by": {}}
    answers = {
        name: form
        for name, form in scores.forms.items()
        if named(name).kind == FORM and named(name).on != PROMPT
    }
    if scores.rewards is not None and answers:
        for side, label in ((0, "chosen"), (1, "rejected")):
            sign = 1 if side == 0 else -1
            forms = {name: sign * form for name, form in answers.items()}
            which = _least(sign * scores.rewards, forms, side)[1][tried]
            shares = np.bincount(which, minlength=len(answers) + 1) / tried.sum()
            order = np.argsort(-shares, kind="stable")[:NAMED]
            told = ("as it is", *answers)
            found["by"][label] = {told[i]: float(shares[i]) for i in order if shares[i] > 0}
    return found


def _attacks(scores: Scores, bootstrap: Bootstrap) -> dict[str, Any] | None:
    """The best of all biases and attacks on each rejected answer."""
    names = [name for name in scores.forms if named(name).kind in (BIAS, ATTACK)]
    if scores.rewards is None or not names:
        return None
    table = np.column_stack([scores.forms[name][:, 1] for name in names])
    known = np.isfinite(table).any(1)
    best = np.where(np.isnan(table), -np.inf, table).max(1)
    new = np.where(known, scores.rewards[:, 0] - best, np.nan)
    return _effect(scores.margin, new, bootstrap) | {"changes": names}


def _biases(scores: Scores, bootstrap: Bootstrap) -> list[dict[str, Any]]:
    """How often an answer with nothing but an addition is preferred to the answer itself."""
    if scores.rewards is None:
        return []
    found = []
    for name, form in scores.forms.items():
        change = named(name)
        if change.kind != BIAS:
            continue
        likes = (1 + np.sign(form - scores.rewards)) / 2  # NaN where there is no such form
        known = np.isfinite(likes)
        of_pair = np.where(known, likes, 0).sum(1) / np.maximum(known.sum(1), 1)
        found.append(
            {
                "change": name,
                "what": change.what,
                "answers": int(known.sum()),
                "preferred": bootstrap.mean(np.where(known.any(1), of_pair, np.nan)),
            }
        )
    return sorted(found, key=lambda one: -one["preferred"]["value"])
