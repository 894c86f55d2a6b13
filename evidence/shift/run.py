"""Run the protocol: ``python -m evidence.shift.run --output evidence/shift/results/reward.jsonl``.

A line a scenario and seed, with every configuration's marks; a run that was stopped goes on where
it stood. The first line says what was run, on what.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from typing import Any

import torch
from torch import Tensor

from drrlhf.demo import embeddings, material, sentiment
from evidence.shift.methods import METHODS, marks, train_head
from evidence.shift.shifts import SCENARIOS, Scenario, Sizes, Splits, draw
from evidence.shift.tasks import done_already, parser, rounded, run_tasks

QUICK = Sizes(train=512, val=100, test=200)


@cache
def load() -> tuple[list[sentiment.Text], Tensor]:
    """All texts and their embeddings (texts, d)."""
    texts = sentiment.load_texts(material.fetch("sentiment"))
    return texts, embeddings.encode([text.text for text in texts], material.fetch("minilm"))


def one(scenario: Scenario, seed: int, sizes: Sizes, configs: int) -> dict[str, Any]:
    """Every method's every configuration in one scenario and seed."""
    texts, vectors = load()
    rows = {text.text: row for row, text in enumerate(texts)}
    splits = sentiment.split_texts(texts, seed)
    scaled = standardised(vectors, scenario, splits, rows)
    drawing = draw(scenario, splits, rows, seed, sizes)
    found: dict[str, list[dict[str, Any]]] = {}
    for method, grid in METHODS.items():
        found[method] = []
        for config in grid[:configs]:
            head = train_head(scaled, drawing.train.rows, drawing.groups, config, seed)
            with torch.no_grad():
                rewards = head(scaled).squeeze(-1)
            found[method].append(
                {
                    "val": {
                        k: rounded(marks(rewards, v))["accuracy"] for k, v in drawing.val.items()
                    },
                    "test": {k: rounded(marks(rewards, v)) for k, v in drawing.test.items()},
                }
            )
    return {"scenario": scenario.name, "seed": seed, "methods": found}


def standardised(
    vectors: Tensor, scenario: Scenario, splits: Splits, rows: Mapping[str, int]
) -> Tensor:
    """Embeddings (texts, d) less the mean, and over the deviation, of the training domains'."""
    seen = [rows[t.text] for domain in scenario.train for t in splits["train"][domain]]
    return (vectors - vectors[seen].mean(0)) / vectors[seen].std()


def own_facts(sizes: Sizes, configs: int) -> dict[str, Any]:
    """What a run may only be continued under."""
    grid = {name: [asdict(c) for c in grid[:configs]] for name, grid in METHODS.items()}
    return {"sizes": asdict(sizes), "grid": grid}


def _task(task: tuple[str, int, Sizes, int]) -> dict[str, Any]:
    name, seed, sizes, configs = task
    return one(next(s for s in SCENARIOS if s.name == name), seed, sizes, configs)


def main() -> None:
    options = parser(__doc__).parse_args()
    sizes, configs = (QUICK, 1) if options.quick else (Sizes(), 6)
    own = own_facts(sizes, configs)
    done = {(record["scenario"], record["seed"]) for record in done_already(options.output, own)}
    tasks = [
        (scenario.name, seed, sizes, configs)
        for seed in range(options.seeds)
        for scenario in SCENARIOS
        if (scenario.name, seed) not in done
    ]
    load()  # once, before there are workers to wait for it
    run_tasks(options.output, own, tasks, _task, options.workers)


if __name__ == "__main__":
    main()
