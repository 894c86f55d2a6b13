"""Run the DPO part of the protocol:
``python -m evidence.shift.dpo --output evidence/shift/results/dpo.jsonl``.

A line a scenario, seed and method; a run that was stopped goes on where it stood.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import drrlhf as dr
from drrlhf.batching import by_length
from drrlhf.demo import material, sentiment
from drrlhf.demo.dpo import LAYERS, cut_model
from drrlhf.precision import fast_dtype
from evidence.shift.methods import marks
from evidence.shift.shifts import DPO_SCENARIOS, Drawn, Scenario, Sizes, Splits, draw
from evidence.shift.tasks import done_already, parser, rounded, run_tasks

# One configuration each; G is the number of training domains.
DPO_METHODS = {
    "erm": "erm",
    "tv": "tv:0.1",
    "kl": "kl:0.05",
    "cvar": "cvar:0.7",
    "group": "group:G,step_size=0.1",
    "optimistic": "kl:temperature=-1",
}
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MAX_TOKENS = 96
# Batches through the model are cut by tokens, padding included, and are of like lengths.
FORWARD_TOKENS = 1024


@dataclass(frozen=True)
class Settings:
    """How every method is trained, and on how many texts a domain it is tested."""

    pairs: int = 256
    epochs: int = 2
    batch: int = 16
    lr: float = 5e-4
    beta: float = 0.1
    rank: int = 16
    adapted_layers: int = 4  # the last ones
    test_texts: int = 100
    test_pairs: int = 1000

    @property
    def sizes(self) -> Sizes:
        return Sizes(train=self.pairs, val=0, test=self.test_pairs)


QUICK = Settings(pairs=32, epochs=1, test_texts=20, test_pairs=50)


@dataclass(frozen=True)
class Answer:
    """Tokens of a prompt and of a text in answer to it, which begins at ``start``."""

    ids: tuple[int, ...]
    start: int


@cache
def load() -> tuple[list[sentiment.Text], Path]:
    return sentiment.load_texts(material.fetch("sentiment")), cut_model(LAYERS, Console())


@cache
def _reference() -> Tensor:
    """log p(text | prompt) by the start model (texts,); NaN where nobody asked yet."""
    return torch.full((len(load()[0]),), torch.nan)


class Policy:
    """The cut model with fresh adapters; log-probs of completions are of all their tokens. It is
    held in ``dtype``, by default the fast one."""

    def __init__(
        self, model_dir: Path, settings: Settings, seed: int, dtype: torch.dtype | None = None
    ) -> None:
        self.dtype = dtype or fast_dtype()
        self.tokenizer = AutoTokenizer.from_pretrained(model_dir)
        base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=self.dtype)
        layers = base.config.num_hidden_layers
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=2 * settings.rank,
            target_modules=list(ADAPTED),
            layers_to_transform=list(range(max(0, layers - settings.adapted_layers), layers)),
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model: Any = get_peft_model(base, config)
        self.head: Tensor = base.lm_head.weight

    def answer(self, text: sentiment.Text) -> Answer:
        prompt = self.tokenizer(sentiment.PROMPTS[text.domain])["input_ids"]
        words = self.tokenizer(f" {text.text}")["input_ids"]
        end = [self.tokenizer.eos_token_id]
        return Answer(tuple((prompt + words + end)[:MAX_TOKENS]), len(prompt))

    def hidden(self, answers: Sequence[Answer]) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states (T, d) that predict the completions, their tokens (T,) and the boundaries
        (answers + 1,)."""
        found: dict[int, Tensor] = {}
        for batch in by_length([len(one.ids) for one in answers], FORWARD_TOKENS):
            length = max(len(answers[i].ids) for i in batch)
            ids = torch.zeros(len(batch), length, dtype=torch.long)
            mask = torch.zeros(len(batch), length, dtype=torch.long)
            for row, i in enumerate(batch):
                n = len(answers[i].ids)
                ids[row, :n], mask[row, :n] = torch.tensor(answers[i].ids), 1
            with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
                states = self.model.get_base_model().model(ids, mask).last_hidden_state
            for row, i in enumerate(batch):
                one = answers[i]
                found[i] = states[row, one.start - 1 : len(one.ids) - 1]
        tokens = [torch.tensor(one.ids[one.start :]) for one in answers]
        ends = torch.tensor([0, *(len(of) for of in tokens)]).cumsum(0)
        return torch.cat([found[i] for i in range(len(answers))]), torch.cat(tokens), ends

    @torch.no_grad()
    def logps(self, answers: Sequence[Answer], chunk: int = 64) -> Tensor:
        """log p(completion | prompt) (answers,)."""
        parts = []
        for start in range(0, len(answers), chunk):
            hidden, tokens, ends = self.hidden(answers[start : start + chunk])
            logps = dr.linear_token_logprobs(hidden, self.head, tokens)
            parts.append(dr.sequence_logprobs(logps, tokens, cu_seqlens=ends))
        return torch.cat(parts)


def one(scenario: Scenario, seed: int, method: str, settings: Settings) -> dict[str, Any]:
    """Train a method in one scenario and seed, and give its marks on every test."""
    texts, model_dir = load()
    rows = {text.text: row for row, text in enumerate(texts)}
    splits = fewer(sentiment.split_texts(texts, seed), settings.test_texts)
    drawing = draw(scenario, splits, rows, seed, settings.sizes)
    policy = Policy(model_dir, settings, seed)
    tested = rows_of(*drawing.test.values())
    needed = rows_of(drawing.train, *drawing.test.values())
    answers = {row: policy.answer(texts[row]) for row in needed}
    reference = reference_logps(policy, answers, needed)
    _train(policy, answers, reference, drawing, DPO_METHODS[method], settings, seed)
    policy.model.eval()
    rewards = torch.full((len(texts),), torch.nan)
    after = policy.logps([answers[row] for row in tested]).float()
    rewards[tested] = settings.beta * (after - reference[tested])
    test = {name: rounded(marks(rewards, drawn)) for name, drawn in drawing.test.items()}
    return {"scenario": scenario.name, "seed": seed, "method": method, "test": test}


def reference_logps(policy: Policy, answers: Mapping[int, Answer], needed: list[int]) -> Tensor:
    """log p(text | prompt) by the start model (texts,), of the rows ``needed`` at least; ``policy``
    has fresh adapters, which add nothing, so that it still is that model."""
    reference = _reference()
    unknown = [row for row in needed if reference[row].isnan()]
    if unknown:
        policy.model.eval()
        reference[unknown] = policy.logps([answers[row] for row in unknown]).float()
    return reference


def rows_of(*drawn: Drawn) -> list[int]:
    """The different texts of some pairs."""
    return sorted({row for one in drawn for row in one.rows.flatten().tolist()})


def _train(
    policy: Policy,
    answers: Mapping[int, Answer],
    reference: Tensor,
    drawing: Any,
    ambiguity: str,
    settings: Settings,
    seed: int,
) -> None:
    groups = drawing.groups
    parsed = dr.parse_ambiguity(ambiguity.replace("G", str(int(groups.max()) + 1)))
    state = dr.GroupState(parsed.num_groups) if isinstance(parsed, dr.Group) else None
    parameters: Iterable[nn.Parameter] = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, settings.lr, weight_decay=0.0)
    order = torch.Generator().manual_seed(seed)
    policy.model.train()
    for _ in range(settings.epochs):
        shuffled = torch.randperm(len(groups), generator=order)
        for batch in shuffled[: len(groups) // settings.batch * settings.batch].split(
            settings.batch
        ):
            stacked = drawing.train.rows[batch].T.flatten()  # [chosen..., rejected...]
            hidden, tokens, ends = policy.hidden([answers[row] for row in stacked.tolist()])
            loss = dr.linear_preference_loss(
                hidden,
                policy.head,
                tokens,
                reference[stacked],
                cu_seqlens=ends,
                beta=settings.beta,
                ambiguity=parsed,
                groups=None if state is None else groups[batch],
                group_state=state,
            ).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def fewer(splits: Splits, n: int) -> Splits:
    """The first ``n`` test texts of each domain, in the split's random order of documents."""
    test = {domain: texts[:n] for domain, texts in splits["test"].items()}
    return {**splits, "test": test}


def _methods(scenario: Scenario) -> list[str]:
    """Groups of one size are what every other method trains on too."""
    even = len(set(scenario.train.values())) == 1
    return [method for method in DPO_METHODS if not (even and method == "group")]


def own_facts(settings: Settings) -> dict[str, Any]:
    """What a run may only be continued under."""
    return {"settings": asdict(settings), "methods": DPO_METHODS}


def _task(task: tuple[str, int, str, Settings]) -> dict[str, Any]:
    name, seed, method, settings = task
    return one(next(s for s in DPO_SCENARIOS if s.name == name), seed, method, settings)


def main() -> None:
    options = parser(__doc__).parse_args()
    settings = QUICK if options.quick else Settings()
    own = own_facts(settings)
    done = {(r["scenario"], r["seed"], r["method"]) for r in done_already(options.output, own)}
    tasks = [
        (scenario.name, seed, method, settings)
        for seed in range(options.seeds)
        for scenario in DPO_SCENARIOS
        for method in _methods(scenario)
        if (scenario.name, seed, method) not in done
    ]
    load()
    run_tasks(options.output, own, tasks, _task, options.workers)


if __name__ == "__main__":
    main()
