"""What is measured of a model, from the marks that a run keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

# Measures in points; of the last two, less is better.
POINTS = ("clean", "worst change", "right")
MEASURES = (*POINTS, "nll", "ece")


def by_seed(records: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, Mapping[str, Any]]]:
    """{seed: {method: test}}, seeds in order."""
    found: dict[int, dict[str, Mapping[str, Any]]] = {}
    for record in sorted(records, key=lambda record: record["seed"]):
        found.setdefault(record["seed"], {})[record["method"]] = record["test"]
    return found


def measured(test: Mapping[str, Any], domains: Sequence[str], measure: str) -> float:
    """A measure of one model, its mean over domains."""
    if measure == "worst change":
        changes = [test[domain]["changes"] for domain in domains]
        return 100 * min(fmean(one[name] for one in changes) for name in changes[0])
    found = fmean(test[domain][measure] for domain in domains)
    return 100 * found if measure in POINTS else found
