"""What a run of PROTOCOL.md found, as tables: ``python -m evidence.views.summary FILE``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from drrlhf.bench.table import markdown
from evidence.tables import Values, compared, print_tables
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


def tables(records: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: of each group of domains a table, a row a method and base."""
    seeds = complete(records)
    parts = [f"{len(seeds)} seeds."]
    for group in DOMAINS:
        found = {measure: values(seeds, group, measure) for measure in MEASURES}
        plain = [f"{found[m]['plain'].mean():.{1 if m in POINTS else 3}f}" for m in MEASURES]
        rows = [("plain", *plain), *compared(found, AGAINST)]
        parts.append(markdown((group, *MEASURES), rows))
    return "\n\n".join(parts)


def main() -> None:
    print_tables(__doc__, tables)


if __name__ == "__main__":
    main()
