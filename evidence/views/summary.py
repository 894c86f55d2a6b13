"""What a run of PROTOCOL.md found, as tables: ``python -m evidence.views.summary FILE``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from drrlhf.files import json_lines
from evidence.shift.findings import SURE, holm, paired
from evidence.views.run import METHODS, SHARES

DOMAINS = {
    "seen": tuple(domain for domain, share in SHARES.items() if share > 0.1),
    "rare": tuple(domain for domain, share in SHARES.items() if share <= 0.1),
    "unseen": ("nyt",),
}
# Measures in points; of the last two, less is better.
POINTS = ("clean", "worst change", "right")
MEASURES = (*POINTS, "nll", "ece")
# What a method is compared with, and which methods are.
AGAINST = {
    "plain": tuple(name for name in METHODS if name != "plain"),
    "augment-long": ("worst", "worst-half", "worst-group"),
}
Values = Mapping[str, np.ndarray]  # by method, (seeds,)


def complete(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Mapping[str, Any]]]:
    """{method: test} of every seed of which all methods are there, in order."""
    by_seed: dict[int, dict[str, Mapping[str, Any]]] = {}
    for record in records:
        by_seed.setdefault(record["seed"], {})[record["method"]] = record["test"]
    return [by_seed[seed] for seed in sorted(by_seed) if by_seed[seed].keys() == METHODS.keys()]


def measured(test: Mapping[str, Any], domains: Sequence[str], measure: str) -> float:
    """A measure of one model, its mean over domains."""
    if measure == "worst change":
        changes = [test[domain]["changes"] for domain in domains]
        return 100 * min(fmean(one[name] for one in changes) for name in changes[0])
    found = fmean(test[domain][measure] for domain in domains)
    return 100 * found if measure in POINTS else found


def values(seeds: Sequence[Mapping[str, Any]], group: str, measure: str) -> Values:
    return {
        method: np.array([measured(seed[method], DOMAINS[group], measure) for seed in seeds])
        for method in METHODS
    }


def difference(found: Values, base: str, methods: Sequence[str]) -> dict[str, str]:
    """The difference of each method to the base with a 95 % interval, bold where it is sure."""
    tests = {name: paired(found[name] - found[base]) for name in methods}
    corrected = holm([p for p, _ in tests.values()])
    digits = 1 if abs(found[base]).mean() > 2 else 3
    cells = {}
    for (name, (_, (low, high))), p in zip(tests.items(), corrected, strict=True):
        mean = f"{(found[name] - found[base]).mean():+.{digits}f}"
        cell = f"**{mean}**" if p < SURE else mean
        cells[name] = f"{cell} [{low:+.{digits}f}, {high:+.{digits}f}]"
    return cells


def tables(records: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: of each group of domains a table, a row a method and base."""
    seeds = complete(records)
    parts = [f"{len(seeds)} seeds."]
    for group in DOMAINS:
        found = {measure: values(seeds, group, measure) for measure in MEASURES}
        plain = [f"{found[m]['plain'].mean():.{1 if m in POINTS else 3}f}" for m in MEASURES]
        lines = [["plain", *plain]]
        for base, methods in AGAINST.items():
            cells = {m: difference(found[m], base, methods) for m in MEASURES}
            lines += [
                [f"{name} over {base}", *(cells[m][name] for m in MEASURES)] for name in methods
            ]
        head = [group, *MEASURES]
        table = [head, ["---"] * len(head), *lines]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in table))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    _, *records = json_lines(parser.parse_args().file)
    print(tables(records))


if __name__ == "__main__":
    main()
