"""The stress test of scored pairs: everything that the report shows, as one dictionary."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from drrlhf.ambiguity import AmbiguitySet
from drrlhf.stress import adversary, curves, groups, resample
from drrlhf.stress.best_of import (
    best_of_curves,
    best_of_right_of_pairs,
    check_left_out,
    kendall_tau,
)
from drrlhf.stress.candidates import Candidates
from drrlhf.stress.effects import effects
from drrlhf.stress.findings import findings, verdict
from drrlhf.stress.require import Requirement, check, example_set, facts, requirements
from drrlhf.stress.resample import FEW_PROMPTS
from drrlhf.stress.scores import Scores, load_scores
from drrlhf.stress.styles import styles_of
from drrlhf.version import __version__

Source = Scores | str | os.PathLike[str]


def stress_test(
    scores: Source | Mapping[str, Source],
    *,
    require: Sequence[str | Requirement] = (),
    floor: float = 0.5,
    ambiguity: str | AmbiguitySet = "cvar:0.2",
    resamples: int = 200,
    min_support: int = 30,
    max_nan: float = 0.01,
    seed: int = 0,
    best_of: Mapping[str, Candidates] | None = None,
    on_progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """How ranking accuracy and loss hold when the prompts are not those that were scored.

    Of pairs with margins m_i (chosen reward minus rejected one), the 0/1 error is 1 for m < 0,
    1/2 for m = 0, else 0, and the loss is -log sigmoid(m). The worst case over a ball around the
    sample is exact, its adversary reweighs examples; bands are 95 % percentile intervals of
    ``resamples`` bootstrap samples of prompts.

    Args:
        scores: `Scores`, or a file for `load_scores`; several models as {name: one of these}.
        require: gates such as ``"tv:0.1 accuracy>=0.75"`` or ``"typos accuracy>=0.8"``, judged by
            the number itself; see `drrlhf.stress.require`.
        floor: the accuracy that the robustness radius is asked for, in [0, 1].
        ambiguity: the set whose reweighting is described in words.
        resamples: bootstrap samples, at least 20.
        min_support: prompts that a group must have to be ranked, at least 2.
        max_nan: share that may have no finite score, of the pairs of files that are read here and
            of the prompts whose answers are ranked; they are left out.
        seed: of the resampling.
        best_of: candidates with gold scores, scored by each of the models, by name.
        on_progress: is told what begins.

    Returns:
        What ``report.json`` holds: "settings", "models", "best_of" (None without candidates) and
        "passed" (all gates of all models).

    Raises:
        ValueError: an argument out of range, a requirement that cannot be parsed.
        DataError: see `load_scores`; more prompts of candidates without a finite score.
    """
    required, described = check_options(
        require, floor, ambiguity, resamples, min_support, max_nan, seed
    )
    sources = scores if isinstance(scores, Mapping) else {"model": scores}
    check("scores", dict(sources), bool(sources), "hold at least one model")
    pressure = (
        None if best_of is None else _best_of(best_of, list(sources), resamples, max_nan, seed)
    )
    settings = {
        "floor": floor,
        "ambiguity": str(described),
        "resamples": resamples,
        "min_support": min_support,
        "confidence": resample.CONFIDENCE,
        "seed": seed,
    }
    models = {}
    for name, source in sources.items():
        on_progress(f"{name}: reading")
        loaded = source if isinstance(source, Scores) else load_scores(source, max_nan=max_nan)
        on_progress(f"{name}: stressing {len(loaded)} pairs")
        of_best = [pressure and pressure[key][name] for key in ("curves", "kendall")]
        models[name] = _model(loaded, described, settings, max_nan, required, *of_best)
    return {
        "drrlhf": __version__,
        "settings": settings,
        "models": models,
        "best_of": pressure,
        "passed": all(one["met"] for model in models.values() for one in model["requirements"]),
    }


def check_options(
    require: Sequence[str | Requirement],
    floor: float,
    ambiguity: str | AmbiguitySet,
    resamples: int,
    min_support: int,
    max_nan: float,
    seed: int,
) -> tuple[list[Requirement], AmbiguitySet]:
    """The requirements and the set that was asked for; `ValueError` as `stress_test` says."""
    check("floor", floor, 0 <= floor <= 1, "lie in [0, 1]")
    check("max_nan", max_nan, 0 <= max_nan < 1, "lie in [0, 1)")
    required = requirements(require, resamples, min_support, seed)
    return required, example_set(ambiguity, "ambiguity")


def _best_of(
    candidates: Mapping[str, Candidates],
    names: Sequence[str],
    resamples: int,
    max_nan: float,
    seed: int,
) -> dict[str, Any]:
    """Best of n by every model and by their worst case, and how their order agrees with gold's."""
    if [*candidates] != [*names]:
        raise ValueError(
            f"best_of: expected the candidates scored by {', '.join(names)}, got those of "
            f"{', '.join(candidates)}"
        )
    first = next(iter(candidates.values()))
    for one in candidates.values():
        same = one.ids == first.ids and len(one) == len(first)
        if not same or any(not np.array_equal(a, b) for a, b in zip(one.gold, first.gold)):
            raise ValueError(
                f"best_of: expected the same candidates with the same gold scores for every model, "
                f"in one order; {one.source} has others than {first.source}"
            )
    by_model = {}
    for name, one in candidates.items():
        if one.scores is None:
            raise ValueError(
                f"best_of: {one.source} has no scores of {name!r}; give a column 'scores' beside "
                "'gold', or a model to score the candidates"
            )
        lost = sum(not np.isfinite(of_prompt).all() for of_prompt in one.scores)
        check_left_out(one.source, lost, len(one), max_nan)
        by_model[name] = one.scores
    curves_of = best_of_curves(by_model, first.gold, resamples=resamples, seed=seed)
    taus = {
        name: kendall_tau(scores, first.gold, resamples=resamples, seed=seed)
        for name, scores in by_model.items()
    }
    notes = [
        f"{name}: {note}"
        for name, curve in curves_of.items()
        for note in dict.fromkeys([*curve["notes"], *taus.get(name, {"notes": ()})["notes"]])
    ]
    return {"source": first.source, "curves": curves_of, "kendall": taus, "notes": notes}


def _model(
    scores: Scores,
    described: AmbiguitySet,
    settings: Mapping[str, Any],
    max_nan: float,
    required: Sequence[Requirement],
    curve: Mapping[str, Any] | None,
    kendall: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Everything of one model; ``curve`` and ``kendall`` are those of its best of n."""
    resamples, least, seed = (settings[key] for key in ("resamples", "min_support", "seed"))
    bootstrap = resample.Bootstrap.of(scores.prompts, resamples, seed)
    blocks = bootstrap.blocks
    sample = curves.Sample(
        scores.margin, lambda codes, size: resample.counts(blocks, codes, size), bootstrap.draws
    )
    prompts, alone = len(np.unique(scores.prompts)), scores.without_prompt
    notes, best_answer = _notes(len(scores), prompts, alone), None
    if scores.answers is not None:
        try:
            found = best_of_right_of_pairs(scores, resamples=resamples, seed=seed)
            lost = found["left_out"]
            check_left_out(scores.source, lost, lost + found["prompts"], max_nan)
            best_answer = found
            notes += [f"First of all answers: {note}" for note in found["notes"]]
        except ValueError as error:  # columns of that name that are something else, among others
            notes.append(f"Which answer comes first is not told: {error}.")
    model = {
        "source": scores.source,
        "pairs": len(scores),
        "prompts": prompts,
        "pairs_without_prompt": alone,
        "notes": notes,
        "dropped": scores.dropped,
        "ties": int((scores.margin == 0).sum()),
        "accuracy": 1 - float(curves.ERRORS[curves.error_codes(scores.margin)].mean()),
        "ignored_columns": dict(scores.ignored),
        "curves": curves.curves(sample),
        "robustness_radius": {
            family: curves.robustness_radius(sample, family, settings["floor"])
            for family in curves.RADII
        },
        "groups": groups.groups_of(scores, blocks, least),
        **effects(scores, bootstrap),
        "styles": styles_of(scores, bootstrap, least),
        "adversary": adversary.adversary_of(scores, blocks, described, least),
        "best_answer": best_answer,
        "examples": dict(scores.examples),
    }
    known = facts(model, curve, kendall)
    model["requirements"] = [one.judge(sample, known) for one in required]
    model["groups"] = groups.shown(model["groups"])
    model["verdict"] = verdict(model)
    model["findings"] = findings(model, model["examples"], curve)
    return model


def _notes(pairs: int, prompts: int, alone: int) -> list[str]:
    """What a reader must know of the sample before the numbers."""
    notes = []
    if alone:
        notes.append(
            f"{alone:,} of {pairs:,} pairs have no prompt id: each is a prompt of its own."
        )
    if prompts < FEW_PROMPTS:
        notes.append(
            f"Only {prompts} different prompts: bands and intervals rest on these, and are rough; "
            'if pairs stand for themselves, say so with prompt column "none".'
        )
    return notes
