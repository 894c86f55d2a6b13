"""What changes of the text do to a model: accuracy lost, attacks that succeed, the worst change of
each pair, and which additions without substance it likes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from drrlhf.stress.changes import margins_under, named
from drrlhf.stress.curves import ERRORS, Array, error_codes
from drrlhf.stress.resample import Bootstrap
from drrlhf.stress.scores import Scores
from drrlhf.stress.student import above_zero
from drrlhf.transformations import ATTACK, BIAS, FORM, PROMPT

NAMED = 5
AS_IS = "as it is"


def effects(scores: Scores, bootstrap: Bootstrap) -> dict[str, Any]:
    """Of every change: the pairs that it touches, their accuracy before and after, what is lost,
    and the share of right pairs that are right no more ("success" of who would mislead). Then the
    worst change of each pair, the best attack on each rejected answer, and how often an answer is
    preferred to itself for an addition. The gravest come first.

    "beyond_chance" says whether the loss is above 0, and the preference above one half, where all
    of them are looked at together (Student's interval, Bonferroni)."""
    uses = [
        use
        for use in margins_under(
            scores.margin, scores.rewards, scores.forms, scores.counterfactuals
        )
        if np.isfinite(use[2]).any()
    ]
    table = [
        _effect(scores.margin, new, bootstrap)
        | {
            "beyond_chance": above_zero(_lost(scores.margin, new), bootstrap.blocks, len(uses)),
            "change": change.name,
            "sides": side,
            "kind": change.kind,
            "what": change.what,
            "keeps": change.keeps,
        }
        for change, side, new in uses
    ]
    return {
        "changes": sorted(table, key=lambda one: -one["lost"]["value"]),
        "worst_change": _worst_change(scores, bootstrap),
        "attacks": _attacks(scores, bootstrap),
        "biases": _biases(scores, bootstrap),
    }


def _effect(margin: Array, new: Array, bootstrap: Bootstrap) -> dict[str, Any]:
    known = np.isfinite(new)
    right = known & (margin > 0)
    old_error, new_error = _errors(margin, new)
    return {
        "pairs": int(known.sum()),
        "right": int(right.sum()),
        "right_prompts": len(np.unique(bootstrap.blocks[right])),
        "accuracy_before": 1 - float(old_error[known].mean()),
        "accuracy": bootstrap.mean(1 - new_error),
        "lost": bootstrap.mean(new_error - old_error),
        "success": bootstrap.mean(np.where(right, new <= 0, np.nan)),
        "flipped": float((np.sign(margin[known]) != np.sign(new[known])).mean()),
    }


def _errors(margin: Array, new: Array) -> tuple[Array, Array]:
    """The errors (n,) before and after, NaN where there is no margin after."""
    known = np.isfinite(new)
    before, after = (
        np.where(known, ERRORS[error_codes(np.where(known, one, 0.0))], np.nan)
        for one in (margin, new)
    )
    return before, after


def _lost(margin: Array, new: Array) -> Array:
    before, after = _errors(margin, new)
    return after - before


def _least(rewards: Array, forms: Mapping[str, Array], side: int) -> tuple[Array, NDArray[Any]]:
    """The least reward (n,) of an answer over its forms and itself, and which of them has it (n,),
    0 for itself and then in the order of ``forms``."""
    table = np.column_stack([rewards[:, side], *(form[:, side] for form in forms.values())])
    table = np.where(np.isnan(table), np.inf, table)
    return table.min(1), table.argmin(1)


class Worst(NamedTuple):
    """The least ``margin`` (n,) over all changes that keep the meaning, whether any was ``tried``
    (n,), the ``names`` of these changes, and shares of the tried pairs by the form that makes it
    least, of each answer and of the prompt ("by")."""

    margin: Array
    tried: NDArray[np.bool_]
    names: list[str]
    by: dict[str, dict[str, float]]


def worst_change(scores: Scores) -> Worst:
    """With forms f of the chosen answer and g of the rejected one, each answer itself among them,
    the least margin of a pair is min_f r(f) - max_g r(g); or, if that is less, the margin under a
    change of the prompt, or one that a file gives."""
    forms = {name: form for name, form in scores.forms.items() if named(name).kind == FORM}
    answers = {name: form for name, form in forms.items() if named(name).on != PROMPT}
    given = {n: one for n, one in scores.counterfactuals.items() if named(n).kind == FORM}
    worst, tried = scores.margin.copy(), np.zeros(len(scores), dtype=bool)
    places: dict[str, tuple[NDArray[np.int64], list[str]]] = {}
    if scores.rewards is not None and answers:
        told = [AS_IS, *answers]
        chosen, which = _least(scores.rewards, answers, 0)
        mirrored = {name: -form for name, form in answers.items()}
        rejected, other = _least(-scores.rewards, mirrored, 1)
        worst = chosen + rejected
        places = {"chosen": (which, told), "rejected": (other, told)}
        tried |= np.isfinite(np.column_stack(list(answers.values()))).any(1)
    whole = {
        name: form[:, 0] - form[:, 1] for name, form in forms.items() if named(name).on == PROMPT
    } | given
    if whole:
        table = np.column_stack([worst, *whole.values()])
        tried |= np.isfinite(table[:, 1:]).any(1)
        table = np.where(np.isnan(table), np.inf, table)
        which = table.argmin(1)
        worst = table.min(1)
        # Where that is least, no form of an answer is to blame.
        places = {side: (np.where(which > 0, 0, at), told) for side, (at, told) in places.items()}
        places[PROMPT] = (which, [AS_IS, *whole])
    shares = {side: _shares(at[tried], told) for side, (at, told) in places.items()}
    return Worst(worst, tried, [*forms, *given], shares)


def _shares(which: NDArray[np.int64], told: list[str]) -> dict[str, float]:
    """How often each is there, the most frequent first."""
    found = np.bincount(which, minlength=len(told)) / max(len(which), 1)
    order = np.argsort(-found, kind="stable")[:NAMED]
    return {told[i]: float(found[i]) for i in order if found[i] > 0}


def _worst_change(scores: Scores, bootstrap: Bootstrap) -> dict[str, Any] | None:
    worst = worst_change(scores)
    if not worst.tried.any():
        return None
    effect = _effect(scores.margin, np.where(worst.tried, worst.margin, np.nan), bootstrap)
    return effect | {"changes": worst.names, "by": worst.by}


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
    of_answers = Bootstrap(bootstrap.blocks.repeat(2), bootstrap.draws)
    found = []
    biases = {name: form for name, form in scores.forms.items() if named(name).kind == BIAS}
    for name, form in biases.items():
        likes = (1 + np.sign(form - scores.rewards)) / 2  # NaN where there is no such form
        found.append(
            {
                "change": name,
                "what": named(name).what,
                "answers": int(np.isfinite(likes).sum()),
                "preferred": of_answers.mean(likes.ravel()),
                "beyond_chance": above_zero(likes.ravel() - 0.5, of_answers.blocks, len(biases)),
            }
        )
    return sorted(found, key=lambda one: -one["preferred"]["value"])
