"""The stress test of a policy's own answers: everything that its report shows, as one dictionary.

The reward of a prompt is V_i, the mean over its K answers, and what is resampled, and what an
adversary reweighs, are prompts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drrlhf.ambiguity import AmbiguitySet, parse_ambiguity
from drrlhf.files.tables import DataError
from drrlhf.stress import groups, resample
from drrlhf.stress.changes import named
from drrlhf.stress.curves import Array, worst_case
from drrlhf.stress.generate import AS_IS, Generated
from drrlhf.stress.generated_findings import examples, findings, verdict
from drrlhf.stress.report import COMPARED, GENERATED
from drrlhf.stress.require import Number, Requirement, check, requirements
from drrlhf.stress.resample import CONFIDENCE, Bootstrap, band
from drrlhf.stress.scores import Attribute
from drrlhf.stress.student import above_zero, students_t
from drrlhf.version import __version__

METRICS = ("reward", "lost")
_SAME = 1e-9  # two mean rewards no further apart than this, relative to their size, are one


@dataclass(frozen=True)
class Prompts:
    """The prompts (n,) with a reward, ``rows`` of all: mean rewards as they are and under changes,
    NaN where a change does nothing, and the bootstrap over prompts."""

    rows: NDArray[np.int64]
    values: Array
    changed: Mapping[str, Array]
    bootstrap: Bootstrap

    def reward(self, ambiguity: AmbiguitySet) -> dict[str, float]:
        """The worst-case mean reward, min over q in the set of sum_i q_i V_i, and its band."""
        losses = -self.values
        masses = self.bootstrap.draws[:, self.bootstrap.blocks]
        drawn = [-worst_case(losses, mass, ambiguity) for mass in masses]
        return band(-worst_case(losses, None, ambiguity), drawn)


def stress_generated(
    generated: Generated | Mapping[str, Generated],
    *,
    require: Sequence[str | Requirement] = (),
    resamples: int = 200,
    min_support: int = 30,
    max_nan: float = 0.01,
    seed: int = 0,
) -> dict[str, Any]:
    """How the reward of a policy's own answers holds over prompts, groups and changed prompts.

    With rewards r_ik of the answers k to prompt i, V_i is their mean, and

    - the mean reward is that of V_i, its worst case min_q sum_i q_i V_i over q in a ball around the
      uniform weights, exact for these V_i. As V_i are means of few answers, chance is part of what
      the adversary finds: with more answers a prompt the worst case comes out higher;
    - a change c of the prompt loses the mean of V_i - V_i^c over the prompts that it changes,
      paired by prompt; a prompt falls where V_i^c < V_i. Chance alone lets about as many fall as
      rise, and ``beyond_chance`` says whether the loss is above 0 where all changes are looked at
      together (Student's interval, Bonferroni);
    - the worst change of a prompt has min_c V_i^c, the prompt as it is among them. The least of
      several means is low by chance too, so it is told beside a ``checked`` one: the change is
      picked by one half of the answers and judged by the other, both ways round.

    Bands are 95 % percentile intervals of ``resamples`` bootstrap samples of prompts. The interval
    of a group is Student's, at a level divided by the number of groups that were looked at.

    Args:
        generated: what `generate_scores` returned, or of several policies {name: that}.
        require: gates such as ``"mean reward>=0.5"``, ``"tv:0.1 reward>=0.2"``,
            ``"prompt_typos lost<=0.1"`` or ``"topic=code reward>=0.3"``.
        min_support: prompts that a group must have to be ranked.
        max_nan: share of answers that may have no finite reward; they are left out.

    Returns:
        What ``report.json`` holds: "kind", "settings", "models" and "passed".

    Raises:
        ValueError: an argument out of range, a requirement of something that is not there.
        DataError: more answers without a finite reward, as they are or under a change.
    """
    required = check_generated_options(require, resamples, min_support, max_nan, seed)
    sources = generated if isinstance(generated, Mapping) else {"model": generated}
    if not sources:
        raise ValueError("generated must hold at least one policy; got none")
    found = {}
    for name, one in sources.items():
        prompts = prompts_of(one, name, resamples, max_nan, seed)
        found[name] = _model(one, prompts, required, min_support)
    return {
        "drrlhf": __version__,
        "kind": GENERATED,
        "settings": {
            "resamples": resamples,
            "min_support": min_support,
            "confidence": CONFIDENCE,
            "seed": seed,
        },
        "models": found,
        "passed": all(one["met"] for model in found.values() for one in model["requirements"]),
    }


def check_generated_options(
    require: Sequence[str | Requirement],
    resamples: int,
    min_support: int,
    max_nan: float,
    seed: int,
) -> list[Requirement]:
    """The requirements that were asked for; `ValueError` as `stress_generated` says."""
    check("max_nan", max_nan, 0 <= max_nan < 1, "lie in [0, 1)")
    found = requirements(require, resamples, min_support, seed)
    for one in found:
        if one.metric not in METRICS:
            raise ValueError(
                f"requirement {str(one)!r}: of a policy's own answers {' and '.join(METRICS)} are "
                'known, as in "mean reward>=0.5" or "prompt_typos lost<=0.1"'
            )
    return found


def _model(
    generated: Generated, prompts: Prompts, required: Sequence[Requirement], min_support: int
) -> dict[str, Any]:
    plain, cut = generated.rewards[AS_IS], generated.cut[AS_IS]
    reward = prompts.bootstrap.mean(prompts.values)
    model: dict[str, Any] = {
        "source": generated.source,
        "prompts": len(prompts.rows),
        "completions": plain.shape[1],
        "dropped": int((~np.isfinite(plain)).sum()),
        "reward": reward,
        "worst": {label: prompts.reward(parse_ambiguity(label)) for label in COMPARED},
        "changes": _changes(prompts),
        "worst_change": _worst_change(generated, prompts),
        "groups": _groups(generated, prompts, reward["value"], min_support),
        "cut": float(cut.mean()),
        "reward_of_cut": _mean(plain[cut]),
        "reward_of_whole": _mean(plain[~cut]),
        "equal_answers": _equal(generated.completions[AS_IS]),
        "notes": _notes(generated, prompts),
        "ignored_columns": dict(generated.ignored),
        "made_with": dict(generated.made_with),
        "examples": examples(generated, prompts),
    }
    known = facts(model)
    model["requirements"] = [one.judge(prompts, known) for one in required]
    model["findings"] = findings(model, generated, prompts)
    model["verdict"] = verdict(model)
    model["groups"] = groups.shown(model["groups"])
    return model


def prompts_of(
    generated: Generated, name: str, resamples: int, max_nan: float, seed: int
) -> Prompts:
    """The mean rewards of prompts; `DataError` where too many answers have none."""
    for change, rewards in generated.rewards.items():
        of_asked = np.isfinite(rewards[generated.asked(change)])
        lost = int((~of_asked).sum())
        if lost > max_nan * of_asked.size or not of_asked.any():
            under = f" under {change!r}" if change else ""
            raise DataError(
                f"{name}: {lost} of {of_asked.size} answers{under} have no finite reward (None, "
                f"NaN or infinite); mend the reward, or raise max_nan (now {max_nan:g})"
            )
    means = {change: _means(rewards) for change, rewards in generated.rewards.items()}
    rows = np.flatnonzero(np.isfinite(means[AS_IS]))
    asked = [generated.prompts[row] for row in rows.tolist()]
    texts = [json.dumps(one, sort_keys=True, default=str) for one in asked]
    numbers: dict[str, int] = {}  # prompts given twice are one
    codes = np.array([numbers.setdefault(text, len(numbers)) for text in texts])
    changed = {change: one[rows] for change, one in means.items() if change != AS_IS}
    return Prompts(rows, means[AS_IS][rows], changed, Bootstrap.of(codes, resamples, seed))


def _means(rewards: Array) -> Array:
    """The mean (P,) of the finite ones of (P, K); NaN where there are none."""
    known = np.isfinite(rewards)
    sums, counted = np.where(known, rewards, 0.0).sum(1), known.sum(1)
    return np.where(counted > 0, sums / np.maximum(counted, 1), np.nan)


def _mean(values: Array) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def _changes(prompts: Prompts) -> list[dict[str, Any]]:
    """What each change does, the gravest first."""
    found = []
    tests = len(prompts.changed)
    for name, new in prompts.changed.items():
        known = np.isfinite(new)
        if not known.any():
            continue
        old = np.where(known, prompts.values, np.nan)
        same = _SAME * (1 + np.abs(old))
        change, mean = named(name), prompts.bootstrap.mean
        found.append(
            {
                "change": name,
                "what": change.what,
                "keeps": change.keeps,
                "prompts": int(known.sum()),
                "reward_before": float(old[known].mean()),
                "reward": mean(new),
                "lost": mean(old - new),
                "beyond_chance": above_zero(old - new, prompts.bootstrap.blocks, tests),
                "falls": mean(np.where(known, new < old - same, np.nan)),
                "rises": mean(np.where(known, new > old + same, np.nan)),
            }
        )
    return sorted(found, key=lambda one: -one["lost"]["value"])


def _worst_change(generated: Generated, prompts: Prompts) -> dict[str, Any] | None:
    """The least mean reward of each prompt over its changed forms and itself."""
    if not prompts.changed:
        return None
    table = np.column_stack([prompts.values, *prompts.changed.values()])
    tried = np.isfinite(table[:, 1:]).any(1)
    if not tried.any():
        return None
    which = np.where(np.isnan(table), np.inf, table).argmin(1)
    least = np.where(tried, np.nanmin(table, axis=1), np.nan)
    old = np.where(tried, prompts.values, np.nan)
    shares = np.bincount(which[tried], minlength=table.shape[1]) / tried.sum()
    told = ("as it is", *prompts.changed)
    order = np.argsort(-shares, kind="stable")
    mean = prompts.bootstrap.mean
    return {
        "prompts": int(tried.sum()),
        "reward_before": float(old[tried].mean()),
        "reward": mean(least),
        "lost": mean(old - least),
        "checked": mean(np.where(tried, _checked(generated, prompts), np.nan)),
        "by": {told[i]: float(shares[i]) for i in order if shares[i] > 0},
    }


def _checked(generated: Generated, prompts: Prompts) -> Array:
    """The reward (n,) under the worst change, which one half of the answers picks and the other
    judges, both ways round; NaN where a half has no reward."""
    changes = [AS_IS, *prompts.changed]
    halves = [
        np.column_stack([_means(generated.rewards[c][prompts.rows][:, part::2]) for c in changes])
        for part in (0, 1)
    ]
    rows, judged = np.arange(len(prompts.rows)), []
    for picks, judges in (halves, halves[::-1]):
        place = np.where(np.isnan(picks), np.inf, picks).argmin(1)
        judged.append(np.where(np.isnan(picks).all(1), np.nan, judges[rows, place]))
    return (judged[0] + judged[1]) / 2


def _groups(
    generated: Generated, prompts: Prompts, overall: float, min_support: int
) -> dict[str, Any]:
    attributes = {
        name: Attribute(one.codes[prompts.rows], one.names)
        for name, one in generated.attributes.items()
    }
    spread = float(prompts.values.var())

    def interval(column: groups.Column, index: int, level: float) -> dict[str, float]:
        mean, effective = float(column.means[index]), float(column.effective[index])
        # A group of prompts that are all alike is taken to spread as all prompts do.
        variance = float(column.variance[index]) or spread / effective
        half = students_t(1 - level / 2, max(effective - 1, 1)) * math.sqrt(variance)
        return {"value": mean, "low": mean - half, "high": mean + half}

    return groups.ranked(
        attributes,
        prompts.values,
        prompts.bootstrap.blocks,
        min_support,
        interval,
        ("reward", overall),
        "prompts",
    )


def _equal(completions: Sequence[Sequence[str]]) -> float:
    """The share of pairs of answers to one prompt that are equal; NaN with one answer each."""
    equal = total = 0
    for some in completions:
        _, counted = np.unique(np.array([*some], dtype=object).astype(str), return_counts=True)
        equal += int((counted * (counted - 1)).sum()) // 2
        total += len(some) * (len(some) - 1) // 2
    return equal / total if total else float("nan")


def _notes(generated: Generated, prompts: Prompts) -> list[str]:
    """What a reader must know before the numbers."""
    notes = []
    different = len(np.unique(prompts.bootstrap.blocks))
    if different < resample.FEW_PROMPTS:
        notes.append(
            f"Only {different} different prompts: bands and intervals rest on these, and are rough."
        )
    if len(prompts.rows) < len(generated):
        left = len(generated) - len(prompts.rows)
        notes.append(f"{left:,} prompts without any finite reward were left out.")
    tried = generated.made_with.get("changed_prompts", len(generated))
    if generated.forms and tried < len(generated):
        notes.append(
            f"Changes were tried on {tried:,} of {len(generated):,} prompts, drawn at random."
        )
    return notes


def facts(model: Mapping[str, Any]) -> dict[str, dict[str, Number]]:
    """Every number that can be required, by subject and metric: "mean", the names of changes,
    "worst-change", and groups as "COLUMN=VALUE"."""
    found: dict[str, dict[str, Number]] = {"mean": {"reward": model["reward"]}}
    for change in model["changes"]:
        found[change["change"]] = {metric: change[metric] for metric in METRICS}
    if model["worst_change"] is not None:
        found["worst-change"] = {metric: model["worst_change"][metric] for metric in METRICS}
    for subject, group in groups.by_subject(model["groups"], "reward"):
        found.setdefault(subject, {}).setdefault("reward", group)
    return found
