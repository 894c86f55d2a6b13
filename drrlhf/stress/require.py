"""Gates in words: ``"tv:0.1 accuracy>=0.75"``, ``"typos accuracy>=0.8"``,
``"best-of-64 gold>=best-of-1"``."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from drrlhf.ambiguity import SETS, AmbiguitySet, Group, parse_ambiguity
from drrlhf.stress.groups import by_subject
from drrlhf.transformations import BIAS, TRANSFORMATIONS

# What is judged, and which side of the bound is good.
SENSES = {
    "accuracy": ">=",
    "loss": "<=",
    "lost": "<=",
    "success": "<=",
    "preferred": "<=",
    "gold": ">=",
    "tau": ">=",
    "reward": ">=",
}
OF_SETS = ("accuracy", "loss", "reward")  # have a worst case
REAL = ("gold", "tau", "lost", "reward")  # may lie below 0
SHARES = ("accuracy", "success", "preferred")  # lie in [0, 1]
_FORM = re.compile(rf"\s*(\S.*?)\s+({'|'.join(SENSES)})\s*(>=|<=)\s*(\S.*?)\s*")
_SUBJECTS = ("easy", "normal", "hard", "attacks", "kendall")
EXAMPLE = (
    'expected for example "tv:0.1 accuracy>=0.75", "kl:0.1 loss<=0.6", "typos accuracy>=0.8", '
    '"worst-change accuracy>=0.6" or "subset=code accuracy>=0.7"'
)
Number = Mapping[str, float] | None  # None where a gate cannot say which number is meant
Facts = Mapping[str, Mapping[str, Number]]


@dataclass(frozen=True)
class Requirement:
    """A number of the report and its bound, which is a number, or the same of another subject.

    subject: an `AmbiguitySet`, whose worst case over examples is meant, or the name of what has
    the number in the report: see `facts`.
    """

    subject: AmbiguitySet | str
    metric: str
    bound: float | str

    def __str__(self) -> str:
        bound = self.bound
        if isinstance(bound, float) and float(short := f"{bound:g}") == bound:
            bound = short  # else with all its digits: another bound would be told than is judged
        return f"{self.subject} {self.metric}{SENSES[self.metric]}{bound}"

    def judge(self, sample: Any, known: Facts) -> dict[str, Any]:
        """The number with its band, and whether it is good enough. ``sample`` has a method of each
        metric that has a worst case, as `Sample` does.

        Raises:
            ValueError: there is no such number in the report.
        """
        if isinstance(self.subject, AmbiguitySet):
            worst = getattr(sample, self.metric, None)
            if worst is None:
                has = " and ".join(one for one in OF_SETS if hasattr(sample, one))
                raise ValueError(
                    f"requirement {str(self)!r}: the report has no worst case of {self.metric}; it "
                    f"has that of {has}"
                )
            found = worst(self.subject)
        else:
            found = self._look_up(self.subject, known)
        bound = self.bound
        if isinstance(bound, str):
            bound = self._look_up(bound, known)["value"]
        distance = found["value"] - bound
        met = distance >= -1e-12 if SENSES[self.metric] == ">=" else distance <= 1e-12
        return {"requirement": str(self), "found": dict(found), "met": bool(met)}

    def _look_up(self, subject: str, known: Facts) -> Mapping[str, float]:
        if self.metric in known.get(subject, {}):
            found = known[subject][self.metric]
            if found is not None:
                return found
            sides = [name for name in known if name.startswith(f"{subject}/")]
            raise ValueError(
                f"requirement {str(self)!r}: "
                + (
                    f"no pair has both answers changed; expected one of {', '.join(sides)}"
                    if sides
                    else "expected one group that is called so, got several; rename a column, or "
                    "its values"
                )
            )
        with_metric = [name for name, found in known.items() if self.metric in found]
        near = difflib.get_close_matches(subject, with_metric, 3, 0.5) or with_metric[:8]
        raise ValueError(
            f"requirement {str(self)!r}: the report has no {self.metric} of {subject!r}; "
            + (f"it has that of {', '.join(near)}" if near else "it has that of nothing")
        )


def parse_requirement(text: str) -> Requirement:
    """Read ``"<subject> <metric>>=<bound>"``, or ``<=`` for what should be small.

    Raises:
        ValueError: another form, a set that cannot be parsed or has groups, a bound that cannot be.
    """
    match = _FORM.fullmatch(text)
    if match is None:
        raise ValueError(f"requirement {text!r} cannot be parsed: {EXAMPLE}")
    name, metric, sense, given = match.groups()
    if sense != SENSES[metric]:
        raise ValueError(f"requirement {text!r}: {metric} takes {SENSES[metric]}; {EXAMPLE}")
    try:
        bound: float | str = float(given)
    except ValueError:
        if not _is_subject(given):
            raise ValueError(
                f"requirement {text!r}: {given!r} is not a number; {EXAMPLE}"
            ) from None
        bound = given
    if isinstance(bound, float):
        low = 0.0 if metric not in REAL else -math.inf
        high = 1.0 if metric in SHARES else math.inf
        if not math.isfinite(bound) or not low <= bound <= high:
            inside = "[0, 1]" if metric in SHARES else "[0, inf)" if low == 0 else "(-inf, inf)"
            raise ValueError(
                f"requirement {text!r}: the bound of {metric} must lie in {inside}, got {given}"
            )
    if _is_set(name):
        if metric not in OF_SETS:
            raise ValueError(
                f"requirement {text!r}: a set has accuracy and loss, or reward; {EXAMPLE}"
            )
        return Requirement(example_set(name, f"requirement {text!r}"), metric, bound)
    return Requirement(name, metric, bound)


def requirements(
    require: Sequence[str | Requirement], resamples: int, min_support: int, seed: int
) -> list[Requirement]:
    """What is required; `ValueError` for what cannot be parsed, and for numbers out of range."""
    check("resamples", resamples, resamples >= 20, "be at least 20, for a band")
    check("min_support", min_support, min_support >= 2, "be at least 2")
    check("seed", seed, seed >= 0, "be at least 0")
    return [parse_requirement(one) if isinstance(one, str) else one for one in require]


def check(name: str, value: Any, fine: bool, wanted: str) -> None:
    """`ValueError` for an argument that is not ``fine``."""
    if not fine:
        raise ValueError(f"{name} must {wanted}; got {value!r}")


def _is_set(name: str) -> bool:
    """Whether a set is meant: by its name, or by one that is nearly that and has a number."""
    beginning, colon, _ = name.partition(":")
    near = difflib.get_close_matches(beginning, SETS, 1, 0.5)
    another = "=" in beginning or _is_change(beginning)  # "group=math:algebra" is a group
    return beginning in SETS or bool(colon and near and not another)


def _is_subject(name: str) -> bool:
    """Whether a bound is the number of something else, as in "best-of-64 gold>=best-of-1"."""
    return (
        _is_change(name.partition(":")[0])
        or name in _SUBJECTS
        or any(mark in name.lstrip("-") for mark in "-=/@:")
    )


def _is_change(name: str) -> bool:
    return name.partition("/")[0] in TRANSFORMATIONS


def example_set(text: str | AmbiguitySet, owner: str) -> AmbiguitySet:
    """An ambiguity set whose adversary reweighs examples; `ValueError` for one over groups."""
    ambiguity = parse_ambiguity(text)
    if isinstance(ambiguity, Group):
        raise ValueError(
            f"{owner}: the adversary of {str(ambiguity)!r} reweighs groups in training; give one "
            "over examples (tv, kl, chi2, cvar, erm), groups are ranked in any case"
        )
    return ambiguity


def facts(
    model: Mapping[str, Any],
    curve: Mapping[str, Any] | None = None,
    kendall: Mapping[str, Any] | None = None,
) -> dict[str, dict[str, Number]]:
    """Every number of a model's report that can be required, by subject and metric.

    A change is "NAME/SIDES", and NAME alone is its use on both answers, or on the one part that it
    acts on; None where it acts on either answer and in no pair on both. A group is "COLUMN=VALUE".
    "best-of-N" has a gold score where there is a ``curve``, "kendall" a tau, and "best-answer" the
    accuracy of the first of all answers. Where a change is called as something else is, the change
    is meant.
    """
    found: dict[str, dict[str, Number]] = {}
    for name in ("easy", "normal", "hard"):
        if model["styles"] and name in model["styles"]:
            found[name] = {"accuracy": model["styles"][name]}
    for point in () if curve is None else curve["points"]:
        found[f"best-of-{point['n']}"] = {"gold": point["gold"]}
    if kendall is not None:
        found["kendall"] = {"tau": kendall["tau"]}
    if model["best_answer"] is not None:
        found["best-answer"] = {"accuracy": model["best_answer"]["share"]}
    for subject, metric, number in _numbers(model):
        found.setdefault(subject, {})[metric] = number
    for subject, group in by_subject(model["groups"], "accuracy"):
        found.setdefault(subject, {}).setdefault("accuracy", group)
    return found


def _numbers(model: Mapping[str, Any]) -> Iterator[tuple[str, str, Number]]:
    acts_on: dict[str, set[str]] = {}
    for change in model["changes"]:
        acts_on.setdefault(change["change"], set()).add(change["sides"])
    for change in model["changes"]:
        name, side = change["change"], change["sides"]
        for metric in ("accuracy", "lost", "success"):
            yield f"{name}/{side}", metric, change[metric]
            if change["kind"] == BIAS:
                if side == "rejected":
                    yield name, metric, change[metric]
            elif side == "both" or acts_on[name] == {side}:
                yield name, metric, change[metric]
            elif "both" not in acts_on[name]:
                yield name, metric, None
    for subject, key in (("worst-change", "worst_change"), ("attacks", "attacks")):
        for metric in ("accuracy", "lost", "success") if model[key] else ():
            yield subject, metric, model[key][metric]
    for bias in model["biases"]:
        yield bias["change"], "preferred", bias["preferred"]
