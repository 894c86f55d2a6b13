"""What a run of PROTOCOL.md found, as tables: ``python -m evidence.best_of.summary FILE``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from drrlhf.bench.table import markdown
from drrlhf.demo.sentiment import DOMAINS
from drrlhf.stress.best_of import COMBINED
from evidence.best_of.run import POOLED, POOLS
from evidence.tables import difference, print_tables

SINGLE, POSSIBLE = "single", "best possible"
MEASURES = ("gold at the largest n", "fall")
Curves = Mapping[str, np.ndarray]  # by pick, (seeds, domains, models or 1, n)


def curves(records: Sequence[Mapping[str, Any]], pool: str) -> tuple[list[int], Curves]:
    """The n, and gold scores, of the seeds of which all domains are there; each single model has a
    curve of its own."""
    by_seed: dict[int, list[Mapping[str, Any]]] = {}
    for record in records:
        by_seed.setdefault(record["seed"], []).append(record["gold"][pool])
    whole = [by_seed[seed] for seed in sorted(by_seed) if len(by_seed[seed]) == len(DOMAINS)]
    counts = [int(n) for n in whole[0][0][POSSIBLE]]

    def of(found: Mapping[str, Any], pick: str) -> list[list[float]]:
        names = [name for name in found if name.startswith("model ")] if pick == SINGLE else [pick]
        return [[found[name][str(n)] for n in counts] for name in names]

    return counts, {
        pick: np.array([[of(one, pick) for one in domains] for domains in whole])
        for pick in (SINGLE, POOLED, *COMBINED, POSSIBLE)
    }


def measured(of: Curves, measure: str) -> dict[str, np.ndarray]:
    """By pick, (seeds,): of every curve for itself, then the mean over models and domains."""
    if measure == MEASURES[0]:
        return {pick: curve[..., -1].mean((1, 2)) for pick, curve in of.items()}
    return {pick: (curve.max(-1) - curve[..., -1]).mean((1, 2)) for pick, curve in of.items()}


def tables(records: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a table of numbers and one of curves for each pool."""
    parts = []
    for pool in POOLS:
        counts, of = curves(records, pool)
        found = {measure: measured(of, measure) for measure in MEASURES}
        lines = []
        for base, called, them in ((SINGLE, "single models", "them"), (POOLED, POOLED, "it")):
            lines.append([called, *(f"{found[m][base].mean():.3f}" for m in MEASURES)])
            cells = [difference(found[m], base, COMBINED) for m in MEASURES]
            lines += [[f"`{name}` over {them}", *(one[name] for one in cells)] for name in COMBINED]
        head = [f"{pool}, {len(of[SINGLE])} seeds", *MEASURES]
        over_n = [
            [pick, *(f"{x:.2f}" for x in curve.mean((0, 1, 2)))] for pick, curve in of.items()
        ]
        for title, body in ((head, lines), ([f"{pool}: gold at n", *map(str, counts)], over_n)):
            parts.append(markdown(title, body))
    return "\n\n".join(parts)


def main() -> None:
    print_tables(__doc__, tables)


if __name__ == "__main__":
    main()
