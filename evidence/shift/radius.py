"""Try the radius chooser as the protocol says, on the models of a finished run:
``python -m evidence.shift.radius --reward evidence/shift/results/reward.jsonl
--output evidence/shift/results/radius.jsonl``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

import drrlhf as dr
from drrlhf.demo import sentiment
from drrlhf.stress import Attribute, Scores, suggest_radius
from drrlhf.stress.curves import RADII, losses_of, worst_case
from drrlhf.stress.radius import strength_of
from evidence.shift import run
from evidence.shift.findings import BASE, FAMILY_OF, Record, by_seed, chosen, measures, read
from evidence.shift.methods import METHODS, marks, train_head
from evidence.shift.shifts import SCENARIOS, Drawing, Drawn, Sizes, draw
from evidence.shift.tasks import DIGITS, done_already, run_tasks

RULES = ("groups", "bootstrap")
FAMILIES = tuple(RADII)


def one(scenario_name: str, seed: int, index: int, sizes: Sizes) -> dict[str, Any]:
    """What both rules suggest from `erm` in its configuration ``index``, and what it covers."""
    scenario = next(one for one in SCENARIOS if one.name == scenario_name)
    texts, vectors = run.load()
    rows = {text.text: row for row, text in enumerate(texts)}
    splits = sentiment.split_texts(texts, seed)
    scaled = run.standardised(vectors, scenario, splits, rows)
    drawing = draw(scenario, splits, rows, seed, sizes)
    config = METHODS[BASE][index]
    head = train_head(scaled, drawing.train.rows, drawing.groups, config, seed)
    with torch.no_grad():
        rewards = head(scaled).squeeze(-1)
    held_out = _validation(rewards, drawing)
    sets = {
        "groups": suggest_radius(held_out, group_by="domain")["groups"]["sets"],
        "bootstrap": suggest_radius(_training(rewards, drawing))["bootstrap"]["sets"],
    }
    losses = losses_of(held_out.margin)
    out = fmean(
        marks(rewards, of)["nll"] for name, of in drawing.test.items() if name.endswith("/out")
    )
    return {
        "scenario": scenario.name,
        "seed": seed,
        "validation loss": round(float(losses.mean()), DIGITS),
        "out loss": round(out, DIGITS),
        "rules": {
            rule: {
                family: {
                    "set": text,
                    "worst": None
                    if text is None
                    else round(worst_case(losses, None, dr.parse_ambiguity(text)), DIGITS),
                }
                for family, text in found.items()
            }
            for rule, found in sets.items()
        },
    }


def _margins(rewards: Tensor, drawn: Drawn) -> np.ndarray:
    return (rewards[drawn.rows[:, 0]] - rewards[drawn.rows[:, 1]]).double().numpy()


def _validation(rewards: Tensor, drawing: Drawing) -> Scores:
    """The validation pairs, each a prompt of its own, with their domain."""
    margins = [_margins(rewards, of) for of in drawing.val.values()]
    codes = np.repeat(np.arange(len(margins)), [len(of) for of in margins])
    together = np.concatenate(margins)
    domains = {"domain": Attribute(codes, tuple(drawing.val))}
    return Scores(together, np.arange(len(together)), domains)


def _training(rewards: Tensor, drawing: Drawing) -> Scores:
    """The training pairs; those of one chosen text stand or fall together."""
    _, prompts = np.unique(drawing.train.rows[:, 0].numpy(), return_inverse=True)
    return Scores(_margins(rewards, drawing.train), prompts)


def nearest(method: str, text: str | None) -> str:
    """Of the strengths that a method was tried with, the one nearest in the logarithm to a
    suggested set; the strongest where there was none."""
    tried = {config.ambiguity: _strength(config.ambiguity) for config in METHODS[method]}
    if text is None:
        return max(tried, key=lambda name: tried[name])
    wanted = max(_strength(text), 1e-9)
    return min(tried, key=lambda name: abs(np.log(tried[name] / wanted)))


def _strength(text: str) -> float:
    return strength_of(dr.parse_ambiguity(text))


def losses(suggestions: Sequence[Record], shift: str | None) -> tuple[float, float]:
    """Mean loss of erm on validation pairs and under shift, in a family of shifts (None: all)."""
    mine = [one for one in suggestions if shift in (None, FAMILY_OF[one["scenario"]])]
    return fmean(one["validation loss"] for one in mine), fmean(one["out loss"] for one in mine)


def coverage(
    suggestions: Sequence[Record], shift: str | None, rule: str, family: str
) -> tuple[float, str]:
    """In what share of the runs of a family of shifts (None: of all) the loss under shift was
    covered, and the median suggestion."""
    mine = [one for one in suggestions if shift in (None, FAMILY_OF[one["scenario"]])]
    found = [one["rules"][rule][family] for one in mine]
    covered = fmean(
        of["worst"] is not None and of["worst"] >= one["out loss"] for one, of in zip(mine, found)
    )
    order = {"none": np.inf} | {of["set"]: _strength(of["set"]) for of in found if of["set"]}
    ranked = sorted((of["set"] or "none" for of in found), key=lambda text: order[text])
    return covered, ranked[len(ranked) // 2]


def suggested(
    records: Sequence[Record], suggestions: Sequence[Record], shift: str, measure: str
) -> dict[str, np.ndarray]:
    """{"erm", "groups tv", ...: (seeds,)}, each set at its tried strength nearest to the
    suggestion, averaged over the scenarios of a family of shifts."""
    of_run = {(one["scenario"], one["seed"]): one["rules"] for one in suggestions}
    values: dict[str, dict[int, list[float]]] = {}
    for record in records:
        if FAMILY_OF[record["scenario"]] != shift:
            continue
        configs = {BASE: record["methods"][BASE][chosen(record["methods"][BASE])]}
        for rule, sets in of_run[record["scenario"], record["seed"]].items():
            for family in FAMILIES:
                name = nearest(family, sets[family]["set"])
                there = zip(METHODS[family], record["methods"][family])
                kept = [found for config, found in there if config.ambiguity == name]
                configs[f"{family} by {rule}"] = kept[chosen(kept)]
        for name, config in configs.items():
            found = measures(config)[measure]
            values.setdefault(name, {}).setdefault(record["seed"], []).append(found)
    return by_seed(values)


def _task(task: tuple[str, int, int, Sizes]) -> dict[str, Any]:
    return one(*task)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reward", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    header, records = read(options.reward)
    sizes = Sizes(**header["sizes"])
    own = {"sizes": header["sizes"]}
    done = {(r["scenario"], r["seed"]) for r in done_already(options.output, own)}
    tasks = [
        (r["scenario"], r["seed"], chosen(r["methods"][BASE]), sizes)
        for r in records
        if (r["scenario"], r["seed"]) not in done
    ]
    run.load()
    run_tasks(options.output, own, tasks, _task, options.workers)


if __name__ == "__main__":
    main()
