"""What a run of PROTOCOL.md found, as tables: ``python -m evidence.labels.summary FILE``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from drrlhf.bench.table import markdown
from evidence.labels.run import DPO, METHODS, REWARD
from evidence.tables import Values, compared, print_tables

# Accuracy in points; of the others, less is better.
MEASURES = ("accuracy", "nll", "ece", "brier")
# What a method is compared with, and which methods are.
AGAINST = {
    "plain": tuple(name for name in METHODS if name != "plain"),
    "majority": ("soft", "pro", "everyone"),
    "soft": ("pro",),
}
SEEDS = 10  # before which nothing is told


def values(records: Sequence[Mapping[str, Any]], model: str, measure: str) -> Values:
    """Of the seeds of which all methods are there: the mean over domains."""
    by_seed: dict[int, dict[str, float]] = {}
    for record in records:
        if record["model"] == model:
            found = fmean(one[measure] for one in record["test"].values())
            scaled = 100 * found if measure == "accuracy" else found
            by_seed.setdefault(record["seed"], {})[record["method"]] = scaled
    whole = [by_seed[seed] for seed in sorted(by_seed) if by_seed[seed].keys() == METHODS.keys()]
    return {method: np.array([one[method] for one in whole]) for method in METHODS}


def tables(records: Sequence[Mapping[str, Any]], least: int = SEEDS) -> str:
    """Markdown: a table for each model of which there are ``least`` seeds, a row for each method
    and base."""
    parts = []
    for model in (REWARD, DPO):
        found = {measure: values(records, model, measure) for measure in MEASURES}
        seeds = len(found["accuracy"]["plain"])
        if seeds < least:
            continue
        plain = [f"{found[m]['plain'].mean():.{1 if m == 'accuracy' else 3}f}" for m in MEASURES]
        rows = [("plain", *plain), *compared(found, AGAINST)]
        parts.append(markdown((f"{model}, {seeds} seeds", *MEASURES), rows))
    return "\n\n".join(parts)


def main() -> None:
    print_tables(__doc__, tables)


if __name__ == "__main__":
    main()
