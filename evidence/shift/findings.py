"""From marks to findings: the configuration that validation chose, differences to erm, words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from drrlhf.files import json_lines
from evidence.shift.shifts import DPO_SCENARIOS, SCENARIOS

BASE = "erm"
SURE = 0.05
# What is compared of a chosen configuration; of the last three, less is better.
MEASURES = ("out", "worst", "in", "out nll", "out ece", "out brier")
FAMILIES = tuple(dict.fromkeys(scenario.family for scenario in SCENARIOS))
DPO_FAMILIES = tuple(scenario.family for scenario in DPO_SCENARIOS)
FAMILY_OF = {scenario.name: scenario.family for scenario in (*SCENARIOS, *DPO_SCENARIOS)}

Record = Mapping[str, Any]


class Finding(NamedTuple):
    """A method's mean on a measure, and its difference to erm, seed by seed, with a 95 % interval;
    ``p`` is corrected by Holm over the methods."""

    mean: float
    difference: float
    low: float
    high: float
    p: float

    @property
    def word(self) -> str:
        """What PROTOCOL.md calls it, for a measure of which more is better."""
        if self.p >= SURE:
            return "nothing"
        return "helps" if self.difference > 0 else "hurts"


def read(path: Path) -> tuple[dict[str, Any], list[Record]]:
    """The header and the records of a finished run."""
    first, *rest = json_lines(path)
    return first, list[Record](rest)


def by_method(lines: Sequence[Record]) -> list[Record]:
    """Lines of one method each, put together into a record a scenario and seed."""
    together: dict[tuple[str, int], dict[str, Any]] = {}
    for line in lines:
        scenario, seed = line["scenario"], line["seed"]
        record = together.setdefault(
            (scenario, seed), {"scenario": scenario, "seed": seed, "methods": {}}
        )
        record["methods"][line["method"]] = [{"test": line["test"]}]
    return list(together.values())


def chosen(configs: Sequence[Record]) -> int:
    """The configuration of the highest validation accuracy in the worst training domain; of equals
    the first. Where there is only one, it is that."""
    if len(configs) == 1:
        return 0
    return max(range(len(configs)), key=lambda i: (min(configs[i]["val"].values()), -i))


def measures(config: Record) -> dict[str, float]:
    """`MEASURES` of one configuration's test marks."""

    def of(side: str, mark: str) -> list[float]:
        return [one[mark] for name, one in config["test"].items() if name.endswith(f"/{side}")]

    accuracy = {"in": of("in", "accuracy"), "out": of("out", "accuracy")}
    return {
        "in": fmean(accuracy["in"]),
        "out": fmean(accuracy["out"]),
        "worst": min(accuracy["in"] + accuracy["out"]),
        **{f"out {mark}": fmean(of("out", mark)) for mark in ("nll", "ece", "brier")},
    }


def table(
    records: Sequence[Record], family: str, measure: str, pick: Mapping[str, int] | None = None
) -> dict[str, np.ndarray]:
    """{method: (seeds,)}, averaged over the family's scenarios.

    ``pick`` names methods and a fixed configuration of each in place of the chosen one
    (exploration).
    """
    values: dict[str, dict[int, list[float]]] = {}
    for record in records:
        if FAMILY_OF[record["scenario"]] == family:
            for method, configs in record["methods"].items():
                if pick is not None and method not in pick:
                    continue
                index = chosen(configs) if pick is None else pick[method]
                found = measures(configs[index])[measure]
                values.setdefault(method, {}).setdefault(record["seed"], []).append(found)
    return by_seed(values)


def gain_of(
    records: Sequence[Record],
    family: str,
    method: str,
    index: int,
    grid: Mapping[str, Sequence[Mapping[str, Any]]],
) -> np.ndarray:
    """Of one configuration, (seeds,): accuracy under shift minus that of plain training with the
    same learning rate and weight decay, so that the difference is the set's alone (exploration)."""

    def rates(config: Mapping[str, Any]) -> tuple[float, float]:
        return config["lr"], config["weight_decay"]

    plain = [rates(config) for config in grid[BASE]].index(rates(grid[method][index]))
    values = {
        name: table(records, family, "out", {name: place})[name]
        for name, place in ((method, index), (BASE, plain))
    }
    return values[method] - values[BASE]


def by_seed(values: Mapping[str, Mapping[int, Sequence[float]]]) -> dict[str, np.ndarray]:
    """{name: {seed: numbers}} to {name: (seeds,)}, their means."""
    return {
        name: np.array([fmean(of_seed[seed]) for seed in sorted(of_seed)])
        for name, of_seed in values.items()
    }


def findings(values: Mapping[str, np.ndarray]) -> dict[str, Finding]:
    """Every method beside erm: paired t intervals, p values corrected by Holm."""
    others = [method for method in values if method != BASE]
    raw, intervals = {}, {}
    for method in others:
        raw[method], intervals[method] = paired(values[method] - values[BASE])
    corrected = dict(zip(others, holm([raw[method] for method in others])))
    return {
        method: Finding(
            float(values[method].mean()),
            float((values[method] - values[BASE]).mean()),
            *intervals[method],
            corrected[method],
        )
        for method in others
    }


def paired(differences: np.ndarray) -> tuple[float, tuple[float, float]]:
    """p of the two-sided t test that the mean is 0, and the 95 % interval of the mean."""
    mean = float(differences.mean())
    if len(differences) < 2:  # one seed says nothing of others
        return 1.0, (-float("inf"), float("inf"))
    if differences.std() == 0:  # all equal: a difference for certain, or none
        return (1.0 if mean == 0 else 0.0), (mean, mean)
    found = stats.ttest_1samp(differences, 0.0)
    low, high = found.confidence_interval(0.95)
    return float(found.pvalue), (float(low), float(high))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction, in the order given."""
    corrected, worst = [0.0] * len(p), 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        worst = max(worst, min(1.0, (len(p) - rank) * p[index]))
        corrected[index] = worst
    return corrected
