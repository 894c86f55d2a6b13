"""What a run of PROTOCOL.md found, as tables: ``python -m evidence.labels.summary FILE``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from drrlhf.files import json_lines
from evidence.labels.run import DPO, METHODS, REWARD
from evidence.views.summary import difference

# Accuracy in points; of the others, less is better.
MEASURES = ("accuracy", "nll", "ece", "brier")
# What a method is compared with, and which methods are.
AGAINST = {
    "plain": tuple(name for name in METHODS if name != "plain"),
    "majority": ("soft", "pro", "everyone"),
    "soft": ("pro",),
}
SEEDS = 10  # before which nothing is told
Values = Mapping[str, np.ndarray]  # by method, (seeds,)


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
        lines = [["plain", *plain]]
        for base, methods in AGAINST.items():
            cells = {m: difference(found[m], base, methods) for m in MEASURES}
            lines += [
                [f"{name} over {base}", *(cells[m][name] for m in MEASURES)] for name in methods
            ]
        head = [f"{model}, {seeds} seeds", *MEASURES]
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
