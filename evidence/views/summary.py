"""What a run of PROTOCOL.md found, as tables: ``python -m evidence.views.summary FILE``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from drrlhf.bench.table import markdown
from evidence.tables import Values, compared, print_tables
from evidence.views.measures import MEASURES, POINTS, by_seed, measured
from evidence.views.run import FIRST, LATER, METHODS, SEEDS, SEEN, SHARES, ended

DOMAINS = {
    "seen": SEEN,
    "rare": tuple(domain for domain in SHARES if domain not in SEEN),
    "unseen": ("nyt",),
}
NAMES = tuple(dict.fromkeys((*METHODS, *LATER)))  # of all methods, in the order of the tables
# What a method is compared with, and which methods are.
AGAINST = {
    "plain": tuple(name for name in NAMES if name != "plain"),
    "plain-long": ("augment-long", "worst", "worst-half"),
    "augment-long": (
        *("worst", "worst-group", "worst-consistent", "worst-half"),
        *("worst-late", "worst-quarter"),
    ),
    "augment": ("worst", "worst-half"),
    "worst": ("worst-consistent",),
    "augment-wide": ("worst-wide",),
}
Seeds = Sequence[Mapping[str, Mapping[str, Any]]]


def shared(seeds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The seeds with the methods that all of them have."""
    names = set.intersection(*(set(seed) for seed in seeds)) if seeds else set()
    return [{name: seed[name] for name in NAMES if name in names} for seed in seeds]


def complete(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Mapping[str, Any]]]:
    """{method: test} of every seed of which all methods are there, in order; those that run later
    than all others are left out until all seeds have them."""
    needed = {record["method"] for record in records} - set(LATER)
    return shared([seed for seed in by_seed(records).values() if needed <= seed.keys()])


def values(seeds: Seeds, group: str, measure: str) -> Values:
    """By method (seeds,)."""
    return {
        method: np.array([measured(seed[method], DOMAINS[group], measure) for seed in seeds])
        for method in seeds[0]
    }


def compared_with(found: Iterable[str]) -> dict[str, list[str]]:
    """{base: methods} of `AGAINST`, of the methods that are ``found``."""
    found = set(found)
    return {
        base: [name for name in methods if name in found]
        for base, methods in AGAINST.items()
        if base in found
    }


def tables(records: Sequence[Mapping[str, Any]], needed: int = SEEDS) -> str:
    """Markdown: of each group of domains a table, a row a method and base; of fewer seeds than are
    ``needed`` how many there are, and no table that could be taken for a finding."""
    seeds = complete(records)
    if len(seeds) < needed:
        return f"{len(seeds)} of {needed} seeds so far; the tables come when all are there."
    parts = [f"{len(seeds)} seeds.", *(_table(seeds, group, NAMES) for group in DOMAINS)]
    if over := ended(records):
        tests = by_seed(records)
        seeds = shared([tests[seed] for seed in FIRST])
        parts += [f"Of {len(seeds)} seeds, after which they ended:"]
        parts += [_table(seeds, group, tuple(over)) for group in DOMAINS]
    return "\n\n".join(parts)


def _table(seeds: Seeds, group: str, methods: Sequence[str]) -> str:
    """What `plain` reached, and the differences of methods to what they are compared with."""
    found = {measure: values(seeds, group, measure) for measure in MEASURES}
    plain = [f"{found[m]['plain'].mean():.{1 if m in POINTS else 3}f}" for m in MEASURES]
    against = {
        base: [name for name in others if name in methods]
        for base, others in compared_with(seeds[0]).items()
    }
    return markdown((group, *MEASURES), [("plain", *plain), *compared(found, against)])


def main() -> None:
    print_tables(__doc__, tables)


if __name__ == "__main__":
    main()
