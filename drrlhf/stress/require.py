"""Floors in words: ``"tv:0.1 accuracy>=0.75"``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from drrlhf.ambiguity import AmbiguitySet, Group, parse_ambiguity
from drrlhf.stress.curves import Sample

_FORM = re.compile(r"\s*(\S+)\s+(accuracy|loss)\s*(>=|<=)\s*(\S+)\s*")
_SENSE = {"accuracy": ">=", "loss": "<="}


@dataclass(frozen=True)
class Requirement:
    """Worst-case accuracy must be at least ``bound``, worst-case loss at most."""

    ambiguity: AmbiguitySet
    metric: str
    bound: float

    def __str__(self) -> str:
        return f"{self.ambiguity} {self.metric}{_SENSE[self.metric]}{self.bound:g}"

    def judge(self, sample: Sample) -> dict[str, Any]:
        """The number with its band, and whether it is good enough."""
        found = getattr(sample, self.metric)(self.ambiguity)
        distance = found["value"] - self.bound
        met = distance >= -1e-12 if self.metric == "accuracy" else distance <= 1e-12
        return {"requirement": str(self), "found": found, "met": met}


def parse_requirement(text: str) -> Requirement:
    """Read ``"<ambiguity set> accuracy>=<number>"`` or ``"<ambiguity set> loss<=<number>"``.

    Raises:
        ValueError: another form, a set that cannot be parsed or has groups, a bound that cannot be.
    """
    form = 'expected for example "tv:0.1 accuracy>=0.75" or "kl:0.1 loss<=0.6"'
    match = _FORM.fullmatch(text)
    if match is None:
        raise ValueError(f"requirement {text!r} cannot be parsed: {form}")
    name, metric, sense, number = match.groups()
    if sense != _SENSE[metric]:
        raise ValueError(f"requirement {text!r}: {metric} takes {_SENSE[metric]}; {form}")
    try:
        bound = float(number)
    except ValueError:
        raise ValueError(f"requirement {text!r}: {number!r} is not a number; {form}") from None
    if not math.isfinite(bound) or (metric == "accuracy" and not 0 <= bound <= 1) or bound < 0:
        raise ValueError(
            f"requirement {text!r}: the bound of {metric} must lie in "
            f"{'[0, 1]' if metric == 'accuracy' else '[0, inf)'}, got {number}"
        )
    return Requirement(example_set(name, f"requirement {text!r}"), metric, bound)


def example_set(text: str | AmbiguitySet, owner: str) -> AmbiguitySet:
    """An ambiguity set whose adversary reweighs examples; `ValueError` for one over groups."""
    ambiguity = parse_ambiguity(text)
    if isinstance(ambiguity, Group):
        raise ValueError(
            f"{owner}: the adversary of {str(ambiguity)!r} reweighs groups in training; give one "
            "over examples (tv, kl, chi2, cvar, erm), groups are ranked in any case"
        )
    return ambiguity
