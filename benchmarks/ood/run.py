"""Run the protocol: ``python -m benchmarks.ood.run --output benchmarks/ood/results/reward.jsonl``.

A line a scenario and seed, with every configuration's marks; a run that was stopped goes on where
it stood. The first line says what was run, on what.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

import drrlhf as dr
from benchmarks.ood.methods import METHODS, marks, train_head
from benchmarks.ood.shifts import SCENARIOS, Scenario, Sizes, draw
from drrlhf.demo import embeddings, material, sentiment

DIGITS = 5
QUICK = Sizes(train=512, val=100, test=200)
ROOT = Path(__file__).parent.parent.parent


@cache
def _texts() -> tuple[list[sentiment.Text], Tensor]:
    """All texts and their embeddings (texts, d)."""
    texts = sentiment.load_texts(material.fetch("sentiment"))
    return texts, embeddings.encode([text.text for text in texts], material.fetch("minilm"))


def one(scenario: Scenario, seed: int, sizes: Sizes, configs: int) -> dict[str, Any]:
    """Every method's every configuration in one scenario and seed."""
    texts, vectors = _texts()
    rows = {text.text: row for row, text in enumerate(texts)}
    splits = sentiment.split_texts(texts, seed)
    seen = [rows[t.text] for domain in scenario.train for t in splits["train"][domain]]
    scaled = (vectors - vectors[seen].mean(0)) / vectors[seen].std()
    drawing = draw(scenario, splits, rows, seed, sizes)
    found: dict[str, list[dict[str, Any]]] = {}
    for method, grid in METHODS.items():
        found[method] = []
        for config in grid[:configs]:
            head = train_head(scaled, drawing.train.rows, drawing.groups, config, seed)
            with torch.no_grad():
                rewards = head(scaled).squeeze(-1)
            found[method].append({
                "val": {k: _rounded(marks(rewards, v))["accuracy"] for k, v in drawing.val.items()},
                "test": {k: _rounded(marks(rewards, v)) for k, v in drawing.test.items()},
            })  # fmt: skip
    return {"scenario": scenario.name, "seed": seed, "methods": found}


def _rounded(found: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, DIGITS) for name, value in found.items()}


def header(sizes: Sizes, configs: int) -> dict[str, Any]:
    """What was run, on what; a run may only be continued under the same one (but for the date)."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {
        "preference": sentiment.DERIVED,
        "sizes": asdict(sizes),
        "grid": {name: [asdict(c) for c in grid[:configs]] for name, grid in METHODS.items()},
        "versions": {
            "drrlhf": dr.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "commit": commit.stdout.strip(),
        "date": date.today().isoformat(),
    }


def done_already(path: Path, own: Mapping[str, Any]) -> set[tuple[str, int]]:
    """(scenario, seed) of the whole lines in ``path``; a line cut off by a crash is taken away.

    Raises:
        ValueError: the file was made with other sizes or another grid.
    """
    if not path.is_file():
        return set()
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
        path.write_text("".join(lines), encoding="utf-8")
    if not lines:
        return set()
    first = json.loads(lines[0])
    for name in ("sizes", "grid"):
        if first[name] != own[name]:
            raise ValueError(f"{path} was made with another {name}; give another --output")
    records = map(json.loads, lines[1:])
    return {(record["scenario"], record["seed"]) for record in records}


def _task(task: tuple[str, int, Sizes, int]) -> dict[str, Any]:
    name, seed, sizes, configs = task
    torch.set_num_threads(1)
    return one(next(s for s in SCENARIOS if s.name == name), seed, sizes, configs)


def _results(tasks: list[Any], workers: int) -> Iterator[dict[str, Any]]:
    if workers == 1:
        yield from map(_task, tasks)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap_unordered(_task, tasks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="tiny: proves only that it works")
    options = parser.parse_args()
    sizes, configs = (QUICK, 1) if options.quick else (Sizes(), 6)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    own = header(sizes, configs)
    done = done_already(options.output, own)
    tasks = [(scenario.name, seed, sizes, configs) for seed in range(options.seeds)
             for scenario in SCENARIOS if (scenario.name, seed) not in done]  # fmt: skip
    _texts()  # once, before there are workers to wait for it
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with options.output.open("a", encoding="utf-8") as file, Progress(
        *columns, TimeElapsedColumn()
    ) as progress:  # fmt: skip
        if not file.tell():
            file.write(json.dumps(own) + "\n")
        bar = progress.add_task("scenarios and seeds", total=len(tasks))
        for record in _results(tasks, options.workers):
            file.write(json.dumps(record, separators=(",", ":")) + "\n")
            file.flush()
            progress.advance(bar)


if __name__ == "__main__":
    main()
