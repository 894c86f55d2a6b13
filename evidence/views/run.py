"""Run PROTOCOL.md: ``python -m evidence.views.run --output evidence/views/results/reward.jsonl``.

A line a seed and method; a run that was stopped goes on where it stood.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from random import Random
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PrinterCallback

from drrlhf import reward_inputs
from drrlhf.demo import material, sentiment
from drrlhf.precision import fast_dtype
from drrlhf.transformations import SIDES, TRANSFORMATIONS
from drrlhf.trl import RewardConfig, RewardTrainer
from evidence.shift.findings import paired
from evidence.shift.methods import calibration_error
from evidence.shift.tasks import done_already, parser, rounded, run_tasks
from evidence.views.measures import by_seed, measured

SHARES = {"movie": 0.475, "amazon": 0.475, "tweets": 0.05}
SEEN = tuple(domain for domain, share in SHARES.items() if share > 0.1)
TRAINED = ["typos", "bullets", "sentence", "sentence_order", "bold"]
# Of other kinds than those that are held out.
WIDE = [*TRAINED, "heading", "numbered", "code_fence", "listed", "longer"]
WIDE += ["opener_flattery", "opener_hedging", "opener_jargon", "authority", "vague", "self_praise"]
HELD_OUT = ["dropped_words", "doubled_words", "punctuation", "quotes", "homoglyphs"]
HELD_OUT += ["repeated", "handle", "url"]
CHANGED = (SIDES[:1], SIDES[1:], SIDES)
BATCH = 24
SEEDS = 10
QUIET: dict[str, Any] = {
    "use_cpu": True,
    "gradient_checkpointing": False,
    "report_to": "none",
}
QUIET |= {"save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
SCORED = 64  # texts of one forward pass; of twice as many it takes longer on a CPU


@dataclass(frozen=True)
class Method:
    """What the trainer is told besides, and how many times the steps."""

    options: Mapping[str, Any] = field(default_factory=dict)
    longer: float = 1.0


WORST = {"views": TRAINED, "views_per_pair": 3, "view_ambiguity": "max"}
METHODS = {
    "plain": Method(),
    "bsr": Method({"batch_sum_coefficient": 1e-3}),
    # Three passes a step, and four more for the scores of four forms.
    "augment-long": Method(WORST | {"view_ambiguity": "mean"}, longer=7 / 3),
    "worst": Method(WORST),
    "worst-group": Method(WORST | {"ambiguity": "group"}),
    "worst-consistent": Method(WORST | {"view_consistency_coefficient": 0.25}),
    # Run after all seeds of those above: they say what fewer scores keep.
    "augment": Method(WORST | {"view_ambiguity": "mean"}),
    "worst-half": Method(WORST | {"views_scored": 0.5}),
    # Attempts at the compute of `worst`, whose steps cost seven passes: these cost 5, 4, 7 and 3.
    "worst-late": Method(WORST | {"views_scored_from": 0.5}, longer=7 / 5),
    "worst-quarter": Method(WORST | {"views_scored": 0.25}, longer=7 / 4),
    "worst-wide": Method(WORST | {"views": WIDE}),
    "augment-wide": Method(WORST | {"views": WIDE, "view_ambiguity": "mean"}, longer=7 / 3),
}
ATTEMPTS = ("worst-late", "worst-quarter", "worst-wide")
BASES = {"augment-wide": "worst-wide"}  # run for the sake of an attempt
# Run after all seeds of the others; the third one is of DPO alone.
LATER = ("augment", "worst-half", "plain-long", *ATTEMPTS, *BASES)
# Attempts are tried on these first; one that then shows by the interval of its gain over `plain`
# that it misses the aim ends.
FIRST = range(3, 8)
AIM = 4.0  # points of `right` in seen domains


@dataclass(frozen=True)
class Sizes:
    """Steps of training, and pairs to test on in each domain."""

    steps: int = 150
    test: int = 200
    learning_rate: float = 5e-5


QUICK = Sizes(steps=2, test=6)
Score = Callable[[Sequence[str]], torch.Tensor]
Record = Mapping[str, Any]
Stages = Sequence[Sequence[tuple[int, str]]]  # seeds and methods, in the order of running
Wanted = Callable[[Sequence[Record], Sequence[int], Iterable[str]], Stages]


class Task(NamedTuple):
    """A run: ``dtype`` is that of the products in training."""

    seed: int
    method: str
    dtype: torch.dtype
    sizes: Any


@cache
def texts() -> list[sentiment.Text]:
    return sentiment.load_texts(material.fetch("sentiment"))


def one(task: Task) -> dict[str, Any]:
    """Train by a method and test what comes out."""
    splits = sentiment.split_texts(texts(), task.seed)
    model, tokenizer = trained(splits["train"], task)
    score = partial(scores, model, tokenizer)
    tests = {
        domain: marks(
            sentiment.make_pairs(splits["test"][domain], task.sizes.test, seed=task.seed), score
        )
        for domain in sentiment.DOMAINS
    }
    return record(task, tests)


def record(task: Task, tests: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a run."""
    return {"seed": task.seed, "method": task.method, "dtype": str(task.dtype), "test": tests}


def told(task: Task, method: Method) -> dict[str, Any]:
    """What every trainer is told."""
    return {**QUIET, "bf16": task.dtype == torch.bfloat16, "seed": task.seed, **method.options}


def trained(splits: Mapping[str, Sequence[sentiment.Text]], task: Task) -> tuple[Any, Any]:
    """A reward model and its tokenizer."""
    seed, sizes, method = task.seed, task.sizes, METHODS[task.method]
    folder = material.fetch("minilm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(seed)
    # In bfloat16 on a CPU the backward of sdpa takes longer than what it saves.
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, attn_implementation="eager"
    )
    pairs = [
        pair
        for domain, share in SHARES.items()
        for pair in sentiment.make_pairs(
            splits[domain], round(share * sizes.steps * BATCH), seed=seed
        )
    ]
    steps = round(sizes.steps * method.longer)
    with tempfile.TemporaryDirectory() as out:
        config = RewardConfig(
            out,
            per_device_train_batch_size=BATCH,
            max_steps=steps,
            learning_rate=sizes.learning_rate,
            warmup_steps=max(1, steps // 10),
            **told(task, method),
        )
        data = dataset(pairs, tokenizer)
        trainer = RewardTrainer(model, config, train_dataset=data, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return tested_model(trainer), tokenizer


def tested_model(trainer: Any) -> Any:
    """The trained model in float32, without the autocast that training wraps its forward in."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    return model.float().eval()


def dataset(pairs: Sequence[sentiment.Pair], tokenizer: Any) -> datasets.Dataset:
    """Texts with their domains and ids: the tokenizer has no end token that TRL could append."""
    datasets.disable_progress_bars()

    def row(pair: sentiment.Pair) -> dict[str, Any]:
        texts = {side: getattr(pair, side) for side in SIDES}
        return {"group": pair.domain, **texts, **reward_inputs.pair_ids(tokenizer, texts)}

    return datasets.Dataset.from_list([row(pair) for pair in pairs])


@torch.no_grad()
def scores(model: Any, tokenizer: Any, some: Sequence[str]) -> torch.Tensor:
    """The rewards (n,) of texts, in float64."""
    ids = [reward_inputs.reward_ids(tokenizer, None, text) for text in some]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    found = torch.empty(len(ids), dtype=torch.float64)
    for start in range(0, len(order), SCORED):
        part = order[start : start + SCORED]
        found[part] = reward_inputs.scores(model, [ids[i] for i in part], "cpu").double()
    return found


def marks(pairs: Sequence[sentiment.Pair], score: Score) -> dict[str, Any]:
    """Of pairs as they are, under every held-out change, and under all of them."""
    as_is = {side: [getattr(pair, side) for pair in pairs] for side in SIDES}
    reward = {side: score(some) for side, some in as_is.items()}
    margin = reward["chosen"] - reward["rejected"]
    right, changes = margin > 0, {}
    for name in HELD_OUT:
        new = {side: score([changed(name, text) for text in as_is[side]]) for side in SIDES}
        for sides in CHANGED:
            now = {side: (new if side in sides else reward)[side] for side in SIDES}
            wins = now["chosen"] > now["rejected"]
            changes[f"{name}/{'+'.join(sides)}"] = wins.double().mean().item()
            right = right & wins
    won = (margin > 0).double()
    return {
        "clean": won.mean().item(),
        "right": right.double().mean().item(),
        "nll": F.softplus(-margin).mean().item(),
        "ece": calibration_error(torch.sigmoid(margin.abs()), won),
        "spread": margin.std().item(),
        "changes": rounded(changes),
    }


def changed(name: str, text: str) -> str:
    """A text in another form; always the same one."""
    return TRANSFORMATIONS[name].apply(text, draw=Random(f"{name}/{text}"))


def ended(records: Sequence[Record]) -> set[str]:
    """The attempts that have all of the first seeds, and a gain over `plain` whose 95 % interval
    lies below the aim."""
    tests = by_seed([record for record in records if record["seed"] in FIRST])

    def right(seed: int, name: str) -> float:
        return measured(tests[seed][name], SEEN, "right")

    over = set()
    for name in ATTEMPTS:
        if all(name in tests.get(seed, ()) for seed in FIRST):
            gains = np.array([right(seed, name) - right(seed, "plain") for seed in FIRST])
            _, (_, high) = paired(gains)
            if high < AIM:
                over.add(name)
    return over


def stages(records: Sequence[Record], seeds: Sequence[int], methods: Iterable[str]) -> Stages:
    """Seeds and methods: all methods but the later ones; the attempts on the first seeds; the later
    methods, without attempts that ended."""
    over, methods = ended(records), list(methods)
    early = [name for name in ATTEMPTS if name in methods and name not in over]
    later = [
        name
        for name in LATER
        if name in methods and name not in over and BASES.get(name) not in over
    ]
    return (
        [(seed, name) for seed in seeds for name in methods if name not in LATER],
        [(seed, name) for name in early for seed in seeds if seed in FIRST],
        [(seed, name) for name in later for seed in seeds],
    )


def missing(records: Sequence[Record], wanted: Stages, sizes: Any) -> list[Task]:
    """The runs of the first stage of which some lack a record. A seed goes on in the dtype that it
    began in, as methods are compared within it; without one that is slow here."""
    done = {(record["seed"], record["method"]) for record in records}
    fast = fast_dtype()
    begun = {record["seed"]: getattr(torch, record["dtype"][6:]) for record in records}
    for stage in wanted:
        tasks = [
            Task(seed, method, begun.get(seed, fast), sizes)
            for seed, method in stage
            if (seed, method) not in done
        ]
        if here := [task for task in tasks if task.dtype in {fast, torch.float32}]:
            return here
    return []


def run_missing(
    arguments: Any,
    sizes: Any,
    methods: Mapping[str, Method],
    work: Callable[[Task], Any],
    wanted: Wanted = stages,
) -> None:
    """Run what the file lacks of the first stage of ``wanted`` of which it lacks something, then
    of the next one."""
    described = {name: asdict(method) for name, method in methods.items()}
    own = {"sizes": asdict(sizes), "methods": described, "held_out": HELD_OUT}

    def todo() -> list[Task]:
        records = done_already(arguments.output, own)
        found = wanted(records, range(arguments.seeds), methods)
        return missing(records, found, sizes)

    while stage := todo():
        run_tasks(arguments.output, own, stage, work, arguments.workers)


def main(description: str | None = __doc__, wanted: Wanted = stages) -> None:
    arguments = parser(description).parse_args()
    texts()  # fetched once, before there are workers to wait for it
    material.fetch("minilm")
    run_missing(arguments, QUICK if arguments.quick else Sizes(), METHODS, one, wanted)


if __name__ == "__main__":
    main()
