"""What a run of PROTOCOL.md found, as tables: ``python -m evidence.views.summary FILE``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from drrlhf.bench.table import markdown
from evidence.tables import Values, compared, print_tables
from evidence.views.run import LATER, METHODS, SHARES

DOMAINS = {
    "seen": tuple(domain for domain, share in SHARES.items() if share > 0.1),
    "rare": tuple(domain for domain, share in SHARES.items() if share <= 0.1),
    "unseen": ("nyt",),
}
SEEDS = 10  # of the protocol
# Measures in points; of the last two, less is better.
POINTS = ("clean", "worst change", "right")
MEASURES = (*POINTS, "nll", "ece")
# What a method is compared with, and which methods are.
AGAINST = {
    "plain": tuple(name for name in METHODS if name != "plain"),
    "augment-long": (
        *("worst", "worst-group", "worst-consistent", "worst-half"),
        *("worst-late", "worst-quarter"),
    ),
    "augment": ("worst", "worst-half"),
    "worst": ("worst-consistent",),
    "augment-wide": ("worst-wide",),
}
Seeds = Sequence[Mapping[str, Mapping[str, Any]]]


def complete(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Mapping[str, Any]]]:
    """{method: test} of every seed of which all methods are there, in order; those that run later
    than all others are left out until all seeds have them."""
    by_seed: dict[int, dict[str, Mapping[str, Any]]] = {}
    for record in records:
        by_seed.setdefault(record["seed"], {})[record["method"]] = record["test"]
    needed = {record["method"] for record in records} - set(LATER)
    whole = [by_seed[seed] for seed in sorted(by_seed) if needed <= by_seed[seed].keys()]
    shared = set.intersection(*(set(seed) for seed in whole)) if whole else set()
    return [{name: seed[name] for name in METHODS if name in shared} for seed in whole]


def measured(test: Mapping[str, Any], domains: Sequence[str], measure: str) -> float:
    """A measure of one model, its mean over domains."""
    if measure == "worst change":
        changes = [test[domain]["changes"] for domain in domains]
        return 100 * min(fmean(one[name] for one in changes) for name in changes[0])
    found = fmean(test[domain][measure] for domain in domains)
    return 100 * found if measure in POINTS else found


def values(seeds: Seeds, group: str, measure: str) -> Values:
    """By method (seeds,)."""
    return {
        method: np.array([measured(seed[method], DOMAINS[group], measure) for seed in seeds])
        for method in seeds[0]
    }


def tables(records: Sequence[Mapping[str, Any]], needed: int = SEEDS) -> str:
    """Markdown: of each group of domains a table, a row a method and base; of fewer seeds than are
    ``needed`` how many there are, and no table that could be taken for a finding."""
    seeds = complete(records)
    if len(seeds) < needed:
        return f"{len(seeds)} of {needed} seeds so far; the tables come when all are there."
    parts = [f"{len(seeds)} seeds."]
    for group in DOMAINS:
        found = {measure: values(seeds, group, measure) for measure in MEASURES}
        plain = [f"{found[m]['plain'].mean():.{1 if m in POINTS else 3}f}" for m in MEASURES]
        against = {
            base: [name for name in methods if name in seeds[0]]
            for base, methods in AGAINST.items()
            if base in seeds[0]
        }
        rows = [("plain", *plain), *compared(found, against)]
        parts.append(markdown((group, *MEASURES), rows))
    return "\n\n".join(parts)


def main() -> None:
    print_tables(__doc__, tables)


if __name__ == "__main__":
    main()
