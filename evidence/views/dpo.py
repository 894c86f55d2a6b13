"""Run the DPO part of PROTOCOL.md:
``python -m evidence.views.dpo --output evidence/views/results/dpo.jsonl``.

A line a seed and method; a run that was stopped goes on where it stood.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import PrinterCallback

from drrlhf.demo import sentiment
from drrlhf.trl import DPOConfig, DPOTrainer
from evidence.shift import dpo
from evidence.shift.dpo import Answer, Policy, Settings
from evidence.shift.tasks import parser
from evidence.views import run
from evidence.views.run import WORST, Method, Task, marks

MAX_TOKENS = 128
METHODS = {
    "plain": Method(),
    # Four passes a step with the reference's; four forms are scored by both, the taken one once.
    "augment-long": Method(WORST | {"view_ambiguity": "mean"}, longer=11 / 4),
    "worst": Method(WORST),
    "worst-half": Method(WORST | {"views_scored": 0.5}),
    # Run after all seeds of those above: what steps alone buy, and forms without more steps.
    "augment": Method(WORST | {"view_ambiguity": "mean"}),
    "plain-long": Method(longer=11 / 4),
}


@dataclass(frozen=True)
class Sizes:
    """Settings of the policy, of which a step has ``policy.batch`` pairs; steps of training; and
    pairs to test on in each domain."""

    policy: Settings = field(default_factory=Settings)
    steps: int = 32
    test: int = 50


QUICK = Sizes(Settings(pairs=16, batch=4), steps=2, test=4)


class Reference:
    """What the start model says of answers, each asked for once."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], float] = {}

    def logps(self, policy: Policy, answers: Sequence[Answer]) -> Tensor:
        """log p (answers,)."""
        new = list({one.ids: one for one in answers if one.ids not in self._known}.values())
        if new:
            with policy.model.disable_adapter():
                found = policy.logps(new).tolist()
            self._known |= {one.ids: value for one, value in zip(new, found, strict=True)}
        return torch.tensor([self._known[one.ids] for one in answers])


_REFERENCE = Reference()


def prompt(domain: str) -> str:
    """What a text of a domain answers; it ends so that texts begin with a token of their own."""
    return f"{sentiment.PROMPTS[domain]}\n"


def answer(policy: Policy, domain: str, text: str) -> Answer:
    """The tokens that TRL trains on."""
    asked, said = (policy.tokenizer(part)["input_ids"] for part in (prompt(domain), text))
    ids = (*asked, *said, policy.tokenizer.eos_token_id)
    return Answer(ids[:MAX_TOKENS], len(asked))


def rewards(policy: Policy, beta: float, domain: str, texts: Sequence[str]) -> Tensor:
    """beta times the log-ratios (n,) of texts."""
    answers = [answer(policy, domain, text) for text in texts]
    reference = _REFERENCE.logps(policy, answers)
    return (beta * (policy.logps(answers) - reference)).double()


def one(task: Task) -> dict[str, Any]:
    """Train by a method and test what comes out."""
    texts, folder = dpo.load()
    splits = sentiment.split_texts(texts, task.seed)
    policy = Policy(folder, task.sizes.policy, task.seed, task.dtype)
    train(policy, splits["train"], task)
    tests = {
        domain: marks(
            sentiment.make_pairs(splits["test"][domain], task.sizes.test, seed=task.seed),
            partial(rewards, policy, task.sizes.policy.beta, domain),
        )
        for domain in sentiment.DOMAINS
    }
    return run.record(task, tests)


def train(policy: Policy, splits: Mapping[str, Sequence[sentiment.Text]], task: Task) -> None:
    """Train the policy's adapters by `DPOTrainer`; after that it is a policy in float32."""
    settings, seed, method = task.sizes.policy, task.seed, METHODS[task.method]
    rows = [
        {"prompt": prompt(domain), "chosen": pair.chosen, "rejected": pair.rejected}
        for domain, share in run.SHARES.items()
        for pair in sentiment.make_pairs(splits[domain], round(share * settings.pairs), seed=seed)
    ]
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as out:
        config = DPOConfig(
            out,
            per_device_train_batch_size=settings.batch,
            max_steps=round(task.sizes.steps * method.longer),
            learning_rate=settings.lr,
            lr_scheduler_type="constant",
            beta=settings.beta,
            max_length=MAX_TOKENS,
            **run.told(task, method),
        )
        data = datasets.Dataset.from_list(rows)
        trainer = DPOTrainer(
            policy.model, args=config, train_dataset=data, processing_class=policy.tokenizer
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    policy.model, policy.dtype = run.tested_model(trainer), torch.float32


def main() -> None:
    arguments = parser(__doc__).parse_args()
    dpo.load()  # fetched once, before there are workers to wait for it
    run.run_missing(arguments, QUICK if arguments.quick else Sizes(), METHODS, one)


if __name__ == "__main__":
    main()
