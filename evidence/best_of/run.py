"""Run PROTOCOL.md: ``python -m evidence.best_of.run --output FILE``.

A line a seed and domain; a run that was stopped goes on where it stood.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch

from drrlhf.demo import embeddings, material, sentiment
from drrlhf.stress.best_of import COMBINED, best_of_curves
from drrlhf.transformations import BIAS, TRANSFORMATIONS
from evidence.shift.methods import Config, train_head
from evidence.shift.run import load
from evidence.shift.tasks import done_already, parser, run_tasks

DIGITS = 4
POOLS = ("real", "gamed")
BIASES = [name for name, one in TRANSFORMATIONS.items() if one.kind == BIAS]
POOLED = "one of all pairs"


@dataclass(frozen=True)
class Sizes:
    """Reward models, pairs that each is trained on, texts that candidates are drawn from, prompts
    of a test, and candidates of each."""

    models: int = 8
    pairs: int = 100
    pool: int = 600
    prompts: int = 64
    candidates: int = 256
    lr: float = 1e-3


QUICK = Sizes(models=2, pairs=40, pool=20, prompts=3, candidates=16)


def one(task: tuple[int, str, Sizes]) -> dict[str, Any]:
    """Reward models that never saw a domain, and what each, and all together, pick in it."""
    seed, domain, sizes = task
    texts, vectors = load()
    rows = {text.text: row for row, text in enumerate(texts)}
    splits = sentiment.split_texts(texts, seed)
    draw = random.Random(f"{seed}/{domain}")
    tested = splits["test"][domain]
    pool = draw.sample(tested, min(sizes.pool, len(tested)))
    changed = embeddings.encode([added(text.text, draw) for text in pool], material.fetch("minilm"))
    others = [name for name in sentiment.DOMAINS if name != domain]
    known = vectors[[rows[text.text] for name in others for text in splits["train"][name]]]
    mean, spread = known.mean(0), known.std()
    scaled, changed = ((one - mean) / spread for one in (vectors, changed))
    picked = np.array(
        [draw.sample(range(len(pool)), sizes.candidates) for _ in range(sizes.prompts)]
    )
    gold = np.array([text.rating for text in pool])[picked]
    own = torch.tensor([rows[text.text] for text in pool])
    every_second = np.arange(sizes.candidates) % 2 == 1

    def rewards(pairs: Sequence[sentiment.Pair], number: int) -> dict[str, np.ndarray]:
        """Of the candidates of each pool, by a head trained on these pairs."""
        places = torch.tensor([[rows[pair.chosen], rows[pair.rejected]] for pair in pairs])
        groups = torch.zeros(len(pairs), dtype=torch.long)
        head = train_head(scaled, places, groups, Config("erm", sizes.lr), 1000 * seed + number)
        with torch.no_grad():
            real, gamed = (head(of).squeeze(-1).double().numpy() for of in (scaled[own], changed))
        return {"real": real[picked], "gamed": np.where(every_second, gamed[picked], real[picked])}

    shown = [
        votes(
            splits["train"], sorted(combinations(others, 2))[i % len(others)], sizes.pairs, seed, i
        )
        for i in range(sizes.models)
    ]
    by_model = {f"model {i}": rewards(pairs, i) for i, pairs in enumerate(shown)}
    pooled = rewards([pair for pairs in shown for pair in pairs], sizes.models)
    found = {}
    for name in POOLS:
        several = {which: list(of[name]) for which, of in by_model.items()}
        curves = best_of_curves(several, list(gold), resamples=20)
        curves |= best_of_curves({POOLED: list(pooled[name])}, list(gold), resamples=20)
        found[name] = {
            which: {point["n"]: round(point["gold"]["value"], DIGITS) for point in curve["points"]}
            for which, curve in curves.items()
        }
        best = {p["n"]: round(p["best_possible"], DIGITS) for p in curves["mean"]["points"]}
        found[name]["best possible"] = best
    return {"seed": seed, "domain": domain, "gold": found}


def added(text: str, draw: random.Random) -> str:
    """A text with one of the additions without substance that changes it; `listed` needs two
    sentences."""
    tried = draw.sample(BIASES, len(BIASES))
    changed = (TRANSFORMATIONS[name].apply(text, draw=draw) for name in tried)
    return next(new for new in changed if new != text)


def votes(
    splits: Mapping[str, Sequence[sentiment.Text]],
    domains: Sequence[str],
    pairs: int,
    seed: int,
    number: int,
) -> list[sentiment.Pair]:
    """What a model is trained on: pairs of some domains, their labels single votes."""
    return [
        pair
        for domain in domains
        for pair in sentiment.make_pairs(
            splits[domain],
            pairs // len(domains),
            seed=1000 * seed + number,
            gap=0.25,
            noisy=True,
        )
    ]


def own_facts(sizes: Sizes) -> dict[str, Any]:
    """What a run may only be continued under."""
    return {"sizes": asdict(sizes), "combined": list(COMBINED)}


def main() -> None:
    options = parser(__doc__).parse_args()
    sizes = QUICK if options.quick else Sizes()
    own = own_facts(sizes)
    done = {(r["seed"], r["domain"]) for r in done_already(options.output, own)}
    todo = [
        (seed, domain, sizes)
        for seed in range(options.seeds)
        for domain in sentiment.DOMAINS
        if (seed, domain) not in done
    ]
    material.fetch("sentiment")
    load()
    run_tasks(options.output, own, todo, one, options.workers)


if __name__ == "__main__":
    main()
