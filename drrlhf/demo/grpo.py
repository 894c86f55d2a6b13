"""GRPO on a real language model: plain and against the worst prompts, everything else the same.

Model and mixture are those of `drrlhf.demo.dpo`. A prompt is the beginning of a rated text of
one of its domains; the reward is that of a sentiment model trained on the preference pairs of these
texts, for the beginning and what the policy makes of it. So prompts differ in what can be had from
them: the adversary turns to those that begin badly. Plain and robust training start from the same
weights and see the same prompts; beginnings that were held out, of the two domains and of two that
were never trained on, tell them apart. What comes out is reported as it is.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PrinterCallback,
    set_seed,
)

from drrlhf import parse_ambiguity
from drrlhf.callbacks import MetricsCallback, ProgressCallback
from drrlhf.demo import dpo
from drrlhf.demo.material import fetch
from drrlhf.demo.sentiment import TESTED, load_split, mixture_sizes, preference_rows
from drrlhf.files import json_lines
from drrlhf.report import plot_rewards
from drrlhf.seeds import mean_and_error
from drrlhf.trl import GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer

DATA = (
    "Reward: a model of human sentiment ratings (Hutto & Gilbert 2014), by preferences that were "
    "derived from them; the prompts are beginnings of the rated texts."
)
BEGINNING = 8  # words
PROMPTS, COMPLETIONS, TOKENS = 8, 4, 20  # of a step; of a prompt; of a completion
HELD_OUT = 48  # prompts a domain
REWARD_PAIRS, REWARD_BATCH = 768, 16

Rows = Sequence[Mapping[str, Any]]


def run(
    output_dir: str | Path,
    *,
    steps: int = 24,
    ambiguity: str = "tv:0.1",
    seeds: int = 3,
    console: Console | None = None,
) -> dict[str, Any]:
    """Fetch, train the reward model, train every policy, print the table; write ``grpo.json`` and
    ``grpo.png``.

    Returns what ``grpo.json`` holds, see `compare`.

    Raises:
        MaterialError: a model or the texts could not be fetched.
        ValueError: an unknown ambiguity set, or ``steps`` or ``seeds`` < 1.
    """
    console = console or Console()
    parse_ambiguity(ambiguity)
    if steps < 1 or seeds < 1:
        raise ValueError(f"steps and seeds must be >= 1, got {steps} and {seeds}")
    dpo.quiet()
    folder = Path(output_dir)
    models = dpo.cut_model(dpo.LAYERS, console), str(reward_model(folder / "reward", console))
    held_out = {domain: beginnings("test", domain, HELD_OUT, 0) for domain in TESTED}
    options: dict[str, Any] = {"ambiguity": ambiguity, "steps": steps, "seeds": seeds}
    result = compare(
        *models,
        lambda seed: mixture(steps * PROMPTS, seed),
        held_out,
        folder,
        console=console,
        **options,
    )
    return dpo.finish(result, DATA, folder, "grpo", plot_rewards, table, console)


def beginnings(split: str, domain: str, n: int, seed: int) -> list[dict[str, Any]]:
    """n prompts: the first words of rated texts of a domain that are longer."""
    texts = (text.text.split() for text in load_split(split, domain))
    longer = [words for words in texts if len(words) > BEGINNING]
    if n > len(longer):
        raise ValueError(
            f"expected at most {len(longer)} prompts of {domain}, which has no more texts of over "
            f"{BEGINNING} words; got {n}; take fewer steps"
        )
    chosen = random.Random(seed).sample(longer, n)
    return [{"prompt": " ".join(words[:BEGINNING]), "domain": domain} for words in chosen]


def mixture(n: int, seed: int) -> list[dict[str, Any]]:
    """n training prompts of the two domains."""
    found = (beginnings("train", domain, k, seed) for domain, k in mixture_sizes(n).items())
    return [row for rows in found for row in rows]


def reward_model(folder: Path, console: Console) -> Path:
    """A sentiment reward model in `folder`; trained once, on pairs of all four domains."""
    if (folder / "config.json").is_file():
        console.print(f"Reward model: {folder}, from an earlier run", soft_wrap=True)
        return folder
    encoder = fetch("minilm", say=console.print)
    tokenizer = AutoTokenizer.from_pretrained(encoder)

    def tokens(row: Mapping[str, Any], name: str) -> list[int]:
        return tokenizer(row[name].strip())["input_ids"]

    rows = [
        {"chosen_ids": tokens(row, "chosen"), "rejected_ids": tokens(row, "rejected")}
        for row in preference_rows("train", n=REWARD_PAIRS)
    ]
    config = RewardConfig(
        output_dir=str(folder),
        per_device_train_batch_size=REWARD_BATCH,
        num_train_epochs=1,
        learning_rate=1e-4,
        max_length=128,
        center_rewards_coefficient=0.01,
        **dpo.machine(),
    )
    progress = ProgressCallback(console, "reward model")
    set_seed(0)
    trainer = RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=1),
        args=config,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
        callbacks=[progress],
    )
    dpo.train_alone(trainer, progress)
    return folder


def compare(
    model_dir: str | Path,
    reward: Any,
    prompts: Any,
    held_out: Mapping[str, Rows],
    output_dir: str | Path,
    *,
    ambiguity: str = "tv:0.1",
    steps: int = 24,
    seeds: int = 3,
    learning_rate: float = 5e-4,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train `model_dir` on ``prompts(seed)`` with ``erm`` and with `ambiguity`, for every seed, and
    score the start model and all of them on `held_out`.

    Every run gets a folder of `output_dir` with its adapter and ``metrics.jsonl``. A result has
    ``settings``, ``start`` (mean held-out reward by domain, a list over seeds), and ``runs``, one
    for each set: ``ambiguity``, ``rewards`` as ``start``, ``training`` (mean reward of each step,
    by seed) and ``seconds_per_step``.

    reward: what TRL takes as a reward function.
    """
    console = console or Console()
    settings = {"steps": steps, "seeds": seeds, "learning_rate": learning_rate}
    settings |= {"prompts": PROMPTS, "completions": COMPLETIONS, "tokens": TOKENS}
    start: dict[str, list[float]] = {domain: [] for domain in held_out}
    runs: list[dict[str, Any]] = []
    for title, name in (("plain", "erm"), ("robust", str(parse_ambiguity(ambiguity)))):
        one: dict[str, Any] = {"ambiguity": name, "training": [], "seconds_per_step": []}
        one["rewards"] = {domain: [] for domain in held_out}
        for seed in range(seeds):
            label = f"{title} ({name}), seed {seed}"
            config = _config(Path(output_dir) / f"{title}-{seed}", name, settings, seed)
            trainer = _trainer(model_dir, config, reward, prompts(seed), label, console)
            if title == "plain":
                _score(trainer, held_out, seed, start, console, f"start model, seed {seed}")
            lines = _train(trainer, config)
            one["training"].append([line["reward"] for line in lines])
            one["seconds_per_step"].append(lines[-1]["seconds"] / len(lines))
            _score(trainer, held_out, seed, one["rewards"], console, label)
        runs.append(one)
    return {"settings": settings, "start": start, "runs": runs}


def _config(folder: Path, ambiguity: str, settings: Mapping[str, Any], seed: int) -> GRPOConfig:
    return GRPOConfig(
        output_dir=str(folder),
        ambiguity=ambiguity,
        max_steps=settings["steps"],
        learning_rate=settings["learning_rate"],
        per_device_train_batch_size=settings["prompts"] * settings["completions"],
        per_device_eval_batch_size=2 * HELD_OUT,
        num_generations=settings["completions"],
        num_generations_eval=2,
        max_completion_length=settings["tokens"],
        seed=seed,
        logging_nan_inf_filter=False,
        **dpo.machine(),
    )


def _trainer(
    model_dir: str | Path, config: GRPOConfig, reward: Any, rows: Rows, title: str, console: Console
) -> GRPOTrainer:
    folder = Path(str(config.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    trainer = GRPOTrainer(
        model=str(model_dir),
        args=config,
        reward_funcs=reward,
        processing_class=AutoTokenizer.from_pretrained(model_dir),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
        callbacks=[ProgressCallback(console, title)],
        peft_config=dpo.lora(),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _train(trainer: GRPOTrainer, config: GRPOConfig) -> list[dict[str, Any]]:
    """Train, keep the adapter, and give the training lines of ``metrics.jsonl``."""
    path = Path(str(config.output_dir)) / "metrics.jsonl"
    trainer.add_callback(MetricsCallback(path))  # the start model's scores are none of its lines
    (progress,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, ProgressCallback))
    set_seed(config.seed)  # scoring the start model has drawn numbers
    dpo.train_alone(trainer, progress)
    return [line for line in json_lines(path) if line["event"] == "train"]


def _score(
    trainer: GRPOTrainer,
    held_out: Mapping[str, Rows],
    seed: int,
    into: dict[str, list[float]],
    console: Console,
    title: str,
) -> None:
    """Append the mean reward of sampled completions of every domain's prompts; the same draws for
    every policy of a seed."""
    for domain, rows in held_out.items():
        with console.status(f"scoring {title} on {domain}"):
            set_seed(1000 + seed)
            trainer.evaluate(Dataset.from_list([{"prompt": row["prompt"]} for row in rows]))
        logged = [line for line in trainer.state.log_history if "eval_reward" in line]
        into[domain].append(logged[-1]["eval_reward"])


def table(result: Mapping[str, Any]) -> Table:
    """A row a policy: held-out reward by domain ± standard error over seeds; and the gain of robust
    over plain training, seed by seed."""
    settings = result["settings"]
    shown = dpo.table_of(
        result,
        f"GRPO on {result['model']},\n{settings['steps']} steps of {settings['prompts']} "
        f"prompts x {settings['completions']} completions",
        f"Held-out reward, ± standard error over {settings['seeds']} seed(s).",
        "s per\nstep",
    )

    def row(title: str, rewards: Mapping[str, Sequence[float]], sign: str, last: str) -> None:
        cells = (mean_and_error(rewards[name]) for name in result["domains"])
        shown.add_row(
            title, *(f"{m:{sign}.3f}" + (f" ± {e:.3f}" if e == e else "") for m, e in cells), last
        )

    row("start model", result["start"], "", "")
    for one in result["runs"]:
        row(one["ambiguity"], one["rewards"], "", f"{fmean(one['seconds_per_step']):.2f}")
    plain, robust = (one["rewards"] for one in result["runs"])
    gains = {
        name: [r - p for r, p in zip(robust[name], plain[name], strict=True)] for name in plain
    }
    row("robust - plain", gains, "+", "")
    return shown
