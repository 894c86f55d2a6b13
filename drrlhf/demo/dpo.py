"""DPO on a real language model: plain and with worst-case weights, everything else the same.

The model is the first layers of SmolLM2-135M-Instruct, small enough for two CPU cores; the pairs
are those of `drrlhf.demo.sentiment`, 95 % of one domain and 5 % of another. Both runs start from
the same weights and adapters and see the same pairs in the same order; held-out pairs of these
domains, and of two that were never trained on, tell them apart. What comes out is reported as it
is. `drrlhf.demo.grpo` has its model, its domains and its frame from here.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
)
from transformers.utils import logging

from drrlhf import linear_token_logprobs, parse_ambiguity, sequence_logprobs
from drrlhf.callbacks import MetricsCallback, ProgressCallback
from drrlhf.demo.material import cache_dir, fetch, put
from drrlhf.demo.sentiment import (
    DERIVED,
    MAIN,
    RARE,
    RARE_SHARE,
    TESTED,
    mixture_sizes,
    preference_rows,
)
from drrlhf.files import json_lines, write_text
from drrlhf.precision import fast_dtype
from drrlhf.report import plot_comparison
from drrlhf.trl import DPOConfig, DPOTrainer

LAYERS = 8
BATCH = 8
HELD_OUT = 96  # pairs a domain

Rows = Sequence[Mapping[str, Any]]


def run(
    output_dir: str | Path,
    *,
    steps: int = 24,
    ambiguity: str = "tv:0.1",
    seed: int = 0,
    console: Console | None = None,
) -> dict[str, Any]:
    """Fetch, cut, train twice, print the table; write ``dpo.json`` and ``dpo.png``.

    Returns what ``dpo.json`` holds, see `compare`.

    Raises:
        MaterialError: the model or the texts could not be fetched.
        ValueError: an unknown ambiguity set, or ``steps`` < 1.
    """
    console = console or Console()
    parse_ambiguity(ambiguity)
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps}")
    quiet()
    train, held_out = mixture(steps * BATCH, seed), held_out_rows(HELD_OUT, seed)
    model_dir, folder = cut_model(LAYERS, console), Path(output_dir)
    options: dict[str, Any] = {"ambiguity": ambiguity, "steps": steps, "seed": seed}
    result = compare(model_dir, train, held_out, folder, console=console, **options)
    return finish(result, DERIVED, folder, "dpo", plot_comparison, table, console)


def mixture(n: int, seed: int) -> list[dict[str, Any]]:
    """n training pairs of the two domains."""
    found = (preference_rows("train", [d], k, seed) for d, k in mixture_sizes(n).items())
    return [row for rows in found for row in rows]


def held_out_rows(n: int, seed: int) -> dict[str, list[dict[str, Any]]]:
    """n test pairs of every domain: the frequent one, the rare one, and those never trained on."""
    return {name: preference_rows("test", [name], n, seed) for name in TESTED}


def cut_model(layers: int, console: Console) -> Path:
    """A clean model directory with SmolLM2's first `layers` layers; made once, then cached.

    The fetched file is quantised and its model is flagged so, which forbids training; a state that
    is copied into a fresh model is not.
    """
    source = fetch("smollm2", say=console.print)
    folder = cache_dir() / f"{source.name}-{layers}-layers"
    if not (folder / "config.json").is_file():
        console.print(f"Cutting SmolLM2 down to {layers} layers (once) ...")
        with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="cut-") as temporary:
            _cut(source, Path(temporary) / "model", layers)
            put(Path(temporary) / "model", folder, ("config.json",))
    return folder


def _cut(source: Path, target: Path, layers: int) -> None:
    gguf = next(source.glob("*.gguf")).name
    whole = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=torch.float32)
    settings = whole.config.to_dict()
    settings.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**settings | {"num_hidden_layers": layers}))
    state = whole.state_dict()
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=gguf).save_pretrained(target)


def compare(
    model_dir: str | Path,
    train: Rows,
    held_out: Mapping[str, Rows],
    output_dir: str | Path,
    *,
    ambiguity: str = "tv:0.1",
    steps: int = 24,
    learning_rate: float = 5e-4,
    max_length: int = 96,
    seed: int = 0,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train `model_dir` on `train` with ``erm`` and with `ambiguity`, and score both on `held_out`.

    Every setting gets a folder of `output_dir` with its adapter and ``metrics.jsonl``. A result
    has ``settings`` and ``runs``; a run has ``ambiguity``, ``final_loss`` (mean over the last
    quarter of the steps of what the run minimised, so plain and worst-case values are different
    quantities; None when not finite), ``seconds_per_step`` (median) and ``held_out``: per domain
    ``accuracy`` (share of pairs with a margin > 0) and ``margin`` (mean of beta times the
    difference of the log-ratios to the start model, in nats), each with its standard error over
    ``pairs``.

    Raises:
        ValueError: ``steps`` < 1, or no pairs to train or to score on.
    """
    if steps < 1 or not train or not all(held_out.values()):
        raise ValueError(
            f"need steps >= 1, training pairs and held-out pairs; got steps={steps}, {len(train)} "
            f"and { {name: len(rows) for name, rows in held_out.items()} }"
        )
    console = console or Console()
    settings = {"steps": steps, "learning_rate": learning_rate, "max_length": max_length}
    settings |= {"batch_size": BATCH, "seed": seed, "training_pairs": len(train)}
    runs: list[dict[str, Any]] = []
    start: dict[str, torch.Tensor] = {}
    for title, name in (("plain", "erm"), ("robust", str(parse_ambiguity(ambiguity)))):
        config = _config(Path(output_dir) / title, name, settings)
        label = f"{title} ({name})"
        runs.append(_train(model_dir, config, train, held_out, start, label, console))
    return {"settings": settings, "runs": runs}


def _config(folder: Path, ambiguity: str, settings: Mapping[str, Any]) -> DPOConfig:
    return DPOConfig(
        output_dir=str(folder),
        ambiguity=ambiguity,
        max_steps=settings["steps"],
        learning_rate=settings["learning_rate"],
        max_length=settings["max_length"],
        seed=settings["seed"],
        per_device_train_batch_size=BATCH,
        logging_nan_inf_filter=False,
        **machine(),
    )


def _train(
    model_dir: str | Path,
    config: DPOConfig,
    train: Rows,
    held_out: Mapping[str, Rows],
    start: dict[str, torch.Tensor],
    title: str,
    console: Console,
) -> dict[str, Any]:
    """One run; `start` keeps the start model's margins by domain from the first run to the next."""
    folder = Path(str(config.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    metrics, progress = MetricsCallback(folder / "metrics.jsonl"), ProgressCallback(console, title)
    columns = ("prompt", "chosen", "rejected")  # the adversary is told no domains
    sets = {
        name: Dataset.from_list([{column: row[column] for column in columns} for row in rows])
        for name, rows in {"": train, **held_out}.items()
    }
    trainer = DPOTrainer(
        model=str(model_dir),
        args=config,
        processing_class=AutoTokenizer.from_pretrained(model_dir),
        train_dataset=sets.pop(""),
        eval_dataset=sets,
        callbacks=[progress, metrics],
        peft_config=lora(),
    )
    train_alone(trainer, progress)
    scores = {}
    tokenized: Any = trainer.eval_dataset
    for name, rows in tokenized.items():
        if name not in start:
            with trainer.model.disable_adapter():
                start[name] = _margins(trainer, rows, f"start model on {name}", console)
        margins = _margins(trainer, rows, f"{title} on {name}", console)
        scores[name] = _score(config.beta * (margins - start[name]))
    return {"ambiguity": config.ambiguity, **_speed_and_loss(folder), "held_out": scores}


@torch.no_grad()
def _margins(trainer: DPOTrainer, rows: Dataset, title: str, console: Console) -> torch.Tensor:
    """log p(chosen) - log p(rejected) (n,) of tokenized `rows`, by the trainer's model."""
    model = trainer.model.eval()
    lm = model.get_base_model()
    margins = []
    batches = DataLoader(rows, batch_size=BATCH, collate_fn=trainer.data_collator)
    quiet = not console.is_terminal
    for batch in track(batches, f"scoring {title}", console=console, transient=True, disable=quiet):
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        with trainer.accelerator.autocast():
            hidden = lm.model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
            wanted = batch["completion_mask"][:, 1:].bool()
            labels = batch["input_ids"][:, 1:][wanted]
            logps = linear_token_logprobs(hidden[:, :-1][wanted], lm.lm_head.weight, labels)
        ends = functional.pad(wanted.sum(1).cumsum(0), (1, 0))
        chosen, rejected = sequence_logprobs(logps, labels, cu_seqlens=ends).chunk(2)
        margins.append((chosen - rejected).cpu())
    return torch.cat(margins)


def _score(margins: torch.Tensor) -> dict[str, Any]:
    n = len(margins)
    accuracy = (margins > 0).float().mean().item()
    return {
        "accuracy": accuracy,
        "accuracy_error": math.sqrt(accuracy * (1 - accuracy) / n),
        "margin": margins.mean().item(),
        "margin_error": (margins.var(correction=0) / n).sqrt().item(),
        "pairs": n,
    }


def _speed_and_loss(folder: Path) -> dict[str, Any]:
    lines = [line for line in json_lines(folder / "metrics.jsonl") if line["event"] == "train"]
    last = [line["loss"] for line in lines[-max(1, len(lines) // 4) :]]
    ends = [line["seconds"] for line in lines]
    return {
        "final_loss": None if None in last else sum(last) / len(last),
        "seconds_per_step": median(b - a for a, b in zip([0.0, *ends], ends, strict=False)),
    }


def table(result: Mapping[str, Any]) -> Table:
    """One row a setting: held-out accuracy ± standard error and mean margin by domain."""
    settings = result["settings"]
    shown = table_of(
        result,
        f"DPO on {result['model']}, {settings['steps']} steps of {settings['batch_size']} pairs",
        "Held-out accuracy in % and mean margin, ± standard error over pairs; one seed. "
        "Loss: what each run minimised at its end, plain mean or worst case.",
        "final\nloss",
        "s per\nstep",
    )
    for one in result["runs"]:
        cells = [
            f"{100 * s['accuracy']:.1f} ± {100 * s['accuracy_error']:.1f}\n"
            f"{s['margin']:+.3f} ± {s['margin_error']:.3f}"
            for s in one["held_out"].values()
        ]
        loss = "not finite" if one["final_loss"] is None else f"{one['final_loss']:.3f}"
        shown.add_row(one["ambiguity"], *cells, loss, f"{one['seconds_per_step']:.2f}")
    return shown


# ---- what the demonstration of GRPO shares ----------------------------------------------------


def quiet() -> None:
    """Leaves the progress bars to us."""
    logging.disable_progress_bar()
    disable_progress_bars()


def machine() -> dict[str, Any]:
    """Arguments of a trainer that this machine and a demonstration ask for."""
    accelerated = torch.cuda.is_available()
    return {
        "bf16": accelerated or fast_dtype() == torch.bfloat16,
        "use_cpu": not accelerated,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def lora() -> LoraConfig:
    """Adapters on every linear layer."""
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def train_alone(trainer: Any, progress: ProgressCallback) -> None:
    """Train under our progress bar alone, and save what was trained."""
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train()
    finally:
        progress.stop()
    trainer.save_model()


def finish(
    result: dict[str, Any],
    data: str,
    folder: Path,
    name: str,
    draw: Callable[[dict[str, Any], Path], object],
    table: Callable[[dict[str, Any]], Table],
    console: Console,
) -> dict[str, Any]:
    """The result with what it was found on; written, drawn and printed."""
    shares = {MAIN: f"{1 - RARE_SHARE:.0%} of training", RARE: f"{RARE_SHARE:.0%} of training"}
    result |= {
        "data": data,
        "model": f"the first {LAYERS} layers of SmolLM2-135M-Instruct, LoRA",
        "domains": {domain: shares.get(domain, "unseen") for domain in TESTED},
    }
    as_json, picture = folder / f"{name}.json", folder / f"{name}.png"
    write_text(as_json, json.dumps(result, indent=2) + "\n")
    draw(result, picture)
    console.print(table(result))
    console.print(f"Written: {as_json}, {picture}", soft_wrap=True)
    return result


def table_of(result: Mapping[str, Any], title: str, caption: str, *columns: str) -> Table:
    """An empty table: the set, a column a domain, and these."""
    shown = Table(
        title=title,
        caption=f"{caption}\n{result['data']}",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    shown.add_column("ambiguity")
    domains = [f"{name}\n({role})" for name, role in result["domains"].items()]
    for name in (*domains, *columns):
        shown.add_column(name, justify="right")
    return shown
