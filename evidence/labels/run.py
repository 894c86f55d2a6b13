"""Run PROTOCOL.md: ``python -m evidence.labels.run --output evidence/labels/results/labels.jsonl``.

A line a model, seed and method; a run that was stopped goes on where it stood.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

import drrlhf as dr
from drrlhf.demo import material, reward, sentiment
from evidence.shift import dpo
from evidence.shift.dpo import Policy, Settings
from evidence.shift.methods import marks
from evidence.shift.run import load, standardised
from evidence.shift.shifts import ALL_GAPS, CLEAN, Drawing, Scenario, Sizes, Test, draw
from evidence.shift.tasks import done_already, parser, rounded, run_tasks

LABELS = 3
REWARD, DPO = "reward", "dpo"
SCENARIO = Scenario(
    "labels",
    "labels",
    dict.fromkeys(sentiment.DOMAINS, 1 / len(sentiment.DOMAINS)),
    ALL_GAPS,
    tuple(Test(domain, CLEAN, True) for domain in sentiment.DOMAINS),
)


@dataclass(frozen=True)
class Method:
    """Which of a pair's labels it knows, and what the loss is told besides."""

    label: str = "first"
    options: Mapping[str, Any] = field(default_factory=dict)


METHODS = {
    "plain": Method(),
    "smooth": Method(options={"label_smoothing": 0.2}),
    "unbiased": Method(options={"loss_type": "robust", "label_smoothing": 0.2}),
    "majority": Method("majority"),
    "soft": Method("share"),
    "pro": Method("share", {"label_ambiguity": "chi2:0.1"}),
    "everyone": Method("chance"),
}


@dataclass(frozen=True)
class Scale:
    """How much of everything: pairs and tests of the reward model, and the policy's settings."""

    reward: Sizes = field(default_factory=lambda: Sizes(val=0))
    epochs: int = 12
    batch: int = 256
    lr: float = 1e-3
    weight_decay: float = 0.01
    dpo: Settings = field(default_factory=Settings)


QUICK = Scale(
    Sizes(train=64, val=0, test=50),
    epochs=1,
    batch=32,
    dpo=Settings(pairs=32, epochs=1, test_texts=20, test_pairs=50),
)


def labels(drawing: Drawing, texts: list[sentiment.Text], seed: int) -> dict[str, Tensor]:
    """P(the first text is the better one), (n,), as each kind of label says it."""
    draws = torch.Generator().manual_seed(seed)
    chances = torch.tensor(
        [
            better / (better + worse)
            for a, b in drawing.train.rows.tolist()
            for better, worse in [sentiment.vote_chances(texts[a], texts[b])]
        ]
    )
    votes = torch.rand(len(chances), LABELS, generator=draws) < chances.unsqueeze(1)
    share = votes.float().mean(1)
    return {
        "first": votes[:, 0].float(),
        "majority": (share > 0.5).float(),
        "share": share,
        "chance": chances.float(),
    }


def loss(
    logps: tuple[Tensor, Tensor],
    references: tuple[Tensor, Tensor],
    probs: Tensor,
    method: Method,
    beta: float,
) -> Tensor:
    """`preference_loss` of pairs, whose first text is the better one with ``probs``. Labels that
    are certain make it the chosen one; others are for the loss to weigh."""
    if method.label in ("first", "majority"):
        first = probs > 0.5
        pairs = [
            (torch.where(first, a, b), torch.where(first, b, a)) for a, b in (logps, references)
        ]
        told: dict[str, Any] = {}
    else:
        pairs, told = [logps, references], {"label_probs": probs}
    told |= method.options
    (chosen, rejected), (ref_chosen, ref_rejected) = pairs
    return dr.preference_loss(chosen, rejected, ref_chosen, ref_rejected, beta=beta, **told).loss


def reward_marks(seed: int, method: Method, scale: Scale) -> dict[str, Any]:
    """A reward head trained, and its marks on every test."""
    texts, vectors = load()
    rows = {text.text: row for row, text in enumerate(texts)}
    splits = sentiment.split_texts(texts, seed)
    scaled = standardised(vectors, SCENARIO, splits, rows)
    drawing = draw(SCENARIO, splits, rows, seed, scale.reward)
    probs = labels(drawing, texts, seed)[method.label]
    head = reward.new_head(scaled.shape[1], seed)
    optimizer = torch.optim.AdamW(head.parameters(), scale.lr, weight_decay=scale.weight_decay)
    order = torch.Generator().manual_seed(seed)
    for _ in range(scale.epochs):
        for batch in torch.randperm(len(probs), generator=order).split(scale.batch):
            first, second = head(scaled[drawing.train.rows[batch]]).squeeze(-1).unbind(1)
            none = torch.zeros(len(batch))
            value = loss((first, second), (none, none), probs[batch], method, beta=1.0)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    with torch.no_grad():
        found = head(scaled).squeeze(-1)
    return {name: rounded(marks(found, drawn)) for name, drawn in drawing.test.items()}


def dpo_marks(seed: int, method: Method, scale: Scale) -> dict[str, Any]:
    """A policy trained, and its marks on every test."""
    settings = scale.dpo
    texts, model_dir = dpo.load()
    rows = {text.text: row for row, text in enumerate(texts)}
    splits = dpo.fewer(sentiment.split_texts(texts, seed), settings.test_texts)
    drawing = draw(SCENARIO, splits, rows, seed, settings.sizes)
    probs = labels(drawing, texts, seed)[method.label]
    policy = Policy(model_dir, settings, seed)
    tested = dpo.rows_of(*drawing.test.values())
    needed = dpo.rows_of(drawing.train, *drawing.test.values())
    answers = {row: policy.answer(texts[row]) for row in needed}
    reference = dpo.reference_logps(policy, answers, needed)
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, settings.lr, weight_decay=0.0)
    order = torch.Generator().manual_seed(seed)
    policy.model.train()
    for _ in range(settings.epochs):
        for batch in torch.randperm(len(probs), generator=order).split(settings.batch):
            stacked = drawing.train.rows[batch].T.flatten()  # [first..., second...]
            hidden, tokens, ends = policy.hidden([answers[row] for row in stacked.tolist()])
            logps = dr.linear_token_logprobs(hidden, policy.head, tokens)
            first, second = dr.sequence_logprobs(logps, tokens, cu_seqlens=ends).chunk(2)
            before, behind = reference[stacked].chunk(2)
            value = loss((first, second), (before, behind), probs[batch], method, settings.beta)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    policy.model.eval()
    found = torch.full((len(texts),), torch.nan)
    after = policy.logps([answers[row] for row in tested]).float()
    found[tested] = settings.beta * (after - reference[tested])
    return {name: rounded(marks(found, drawn)) for name, drawn in drawing.test.items()}


def one(task: tuple[str, int, str, Scale]) -> dict[str, Any]:
    """Train a model by a method and test it."""
    model, seed, method, scale = task
    measure = reward_marks if model == REWARD else dpo_marks
    test = measure(seed, METHODS[method], scale)
    return {"model": model, "seed": seed, "method": method, "test": test}


def own_facts(scale: Scale) -> dict[str, Any]:
    """What a run may only be continued under."""
    methods = {name: asdict(method) for name, method in METHODS.items()}
    return {"scale": asdict(scale), "methods": methods}


def main() -> None:
    options = parser(__doc__).parse_args()
    scale = QUICK if options.quick else Scale()
    own = own_facts(scale)
    done = {(r["model"], r["seed"], r["method"]) for r in done_already(options.output, own)}
    todo = [
        (model, seed, method, scale)
        for model in (REWARD, DPO)
        for seed in range(options.seeds)
        for method in METHODS
        if (model, seed, method) not in done
    ]
    material.fetch("sentiment")
    load()
    dpo.load()
    run_tasks(options.output, own, todo, one, options.workers)


if __name__ == "__main__":
    main()
