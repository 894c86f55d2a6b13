"""One training run: settings -> checks -> trainer -> training -> what came out."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.util
import platform
import signal
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from drrlhf.ambiguity import Group, parse_ambiguity
from drrlhf.cli import _console, rundir

NEEDED = ("trl", "transformers", "datasets", "accelerate", "matplotlib")
INTERRUPTED = 128  # plus the signal's number, as shells report it
KEPT_CHECKPOINTS = 2  # so that a broken newest one leaves one to go back to


def run(kind: str, options: dict[str, Any], console: Console, resume_command: str) -> int:
    """Check everything, train, report; the exit status of the command.

    Whatever the user can mend is found before the first step: one red line, and neither an earlier
    run nor its record has been touched.
    """
    output_dir = Path(options["output_dir"])
    try:
        with _console.user_errors():
            _check_options(options)
            require(*(["peft"] if options["lora"] else []))
            checkpoint = _check_directory(output_dir, options)
            data, eval_data, settings = _load(kind, options)
            record = _record(settings, data)
            if checkpoint:
                record = _continued(output_dir, record, checkpoint)
            if checkpoint and _finished(checkpoint):
                rundir.promote(checkpoint, output_dir)
                return _report(output_dir, record, console)
            trainer, callbacks = _build(settings, data, eval_data, console)
            if trainer.is_world_process_zero():
                if options["overwrite"]:
                    rundir.clear(output_dir)
                rundir.write_record(output_dir, record)
    except KeyboardInterrupt:
        console.print("Interrupted before the first step: nothing was trained, nothing saved.")
        return INTERRUPTED + signal.SIGINT
    return _train(trainer, callbacks, checkpoint, record, console, resume_command)


# ---- before the model is loaded --------------------------------------------------------------


def require(*more: str) -> None:
    """Refuse early, and with the remedy, when packages of the ``trl`` extra are missing.

    Raises:
        ImportError: names the missing ones among those that all training needs and `more`.
    """
    missing = [name for name in (*NEEDED, *more) if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"this needs {', '.join(missing)}, not installed here: pip install 'drrlhf[trl]'"
        )


def _check_options(options: dict[str, Any]) -> None:
    if options["max_steps"] == 0 or options["max_steps"] < -1:
        raise ValueError(f"--max-steps must be >= 1, or -1 for off; got {options['max_steps']}")
    if options["max_steps"] == -1 and not options["epochs"] > 0:
        raise ValueError(f"--epochs must be > 0; got {options['epochs']}")
    if not options["learning_rate"] > 0:
        raise ValueError(f"--learning-rate must be > 0; got {options['learning_rate']}")
    if options["resume"] and options["overwrite"]:
        raise ValueError("--resume and --overwrite contradict each other: give one of them")


def _check_directory(output_dir: Path, options: dict[str, Any]) -> Path | None:
    """Whether this run may use `output_dir` and `--model`; the checkpoint to go on from, if any."""
    model = options["model"]
    is_path = model.startswith((".", "/", "~")) or model.count("/") > 1 or Path(model).exists()
    if is_path and not Path(model).is_dir():
        raise ValueError(f"--model {model}: no such directory; give one that holds config.json")
    if is_path and Path(model).resolve().is_relative_to(output_dir.resolve()):
        raise ValueError(
            f"--model {model} lies in --output-dir {output_dir}, where the trained model will be "
            "written over it: give another --output-dir"
        )
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"--output-dir {output_dir} is a file; give a directory")
    if options["resume"]:
        rundir.read_record(output_dir)
        if found := rundir.newest_checkpoint(output_dir):
            return found
        raise ValueError(
            f"--resume: {output_dir} has no usable checkpoint; start again with --overwrite"
        )
    occupant = rundir.occupant(output_dir)
    if occupant and not options["overwrite"]:
        raise ValueError(
            f"--output-dir {output_dir} already holds a run or a model ({occupant}): continue it "
            "with --resume, discard it with --overwrite, or give another directory"
        )
    return None


def _load(kind: str, options: dict[str, Any]) -> tuple[Any, Any, rundir.Settings]:
    """Data of both sets, checked to the last row, and the settings with nothing left open."""
    ambiguity = options["ambiguity"].strip()
    groups_from_data = ambiguity == "group" or ambiguity.startswith("group:step_size")
    if not groups_from_data:
        parse_ambiguity(ambiguity)

    from drrlhf.data import load_preference_data

    data = load_preference_data(options["data"], kind=kind)
    eval_data = None
    if options["eval_data"]:
        names = data.group_names
        eval_data = load_preference_data(options["eval_data"], kind=kind, group_names=names)
    options = options | {"kind": kind, "ambiguity": _resolve(ambiguity, data, groups_from_data)}
    options["dtype"] = options["dtype"] or _default_dtype()
    fields = {field.name for field in dataclasses.fields(rundir.Settings)}
    return data, eval_data, rundir.Settings(**{k: v for k, v in options.items() if k in fields})


def _resolve(ambiguity: str, data: Any, groups_from_data: bool) -> str:
    """The canonical string of the set, its number of groups taken from or checked with `data`."""
    if not ambiguity.startswith("group"):
        return str(parse_ambiguity(ambiguity))
    if "group" not in data.dataset.column_names:
        raise ValueError(f"--ambiguity {ambiguity}: the data has no column 'group'; add one")
    found = len(data.group_names or ()) or max(data.dataset.unique("group")) + 1
    if groups_from_data:
        rest = ambiguity.removeprefix("group").removeprefix(":")
        ambiguity = f"group:{found}" + (f",{rest}" if rest else "")
    parsed = parse_ambiguity(ambiguity)
    assert isinstance(parsed, Group)
    if parsed.num_groups != found:
        names = f" ({', '.join(data.group_names)})" if data.group_names else ""
        raise ValueError(
            f"--ambiguity {ambiguity}: the data has {found} groups{names}; write group:{found}, or "
            "group alone to take the number from the data"
        )
    return str(parsed)


def _default_dtype() -> str:
    import torch

    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"


def _record(settings: rundir.Settings, data: Any) -> dict[str, Any]:
    names = ("drrlhf", "torch", "trl", "transformers", "datasets", "peft", "accelerate")
    versions = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "settings": dataclasses.asdict(settings),
        "data": {
            "source": settings.data,
            "rows": len(data.dataset),
            "columns": data.dataset.column_names,
            "group_names": data.group_names,
            "sha256": rundir.data_fingerprint(data.dataset),
        },
        "model_fingerprint": rundir.model_fingerprint(settings.model),
        "versions": versions,
        "started": _now(),
        "resumed": [],
    }


def _continued(output_dir: Path, record: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """`record` as the continuation of the run in `output_dir`, which must be the same run."""
    earlier = rundir.read_record(output_dir)
    rundir.check_same_run(earlier, record)
    step = rundir.checkpoint_state(checkpoint)["global_step"]
    resumed = {"step": step, "at": _now(), "versions": record["versions"]}
    return earlier | {
        "settings": record["settings"],
        "resumed": [*earlier["resumed"], resumed],
    }


def _finished(checkpoint: Path) -> bool:
    state = rundir.checkpoint_state(checkpoint)
    return state["global_step"] >= state["max_steps"]


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


# ---- the trainer -----------------------------------------------------------------------------


def _build(settings: rundir.Settings, data: Any, eval_data: Any, console: Console) -> Any:
    """The trainer and our callbacks on it; loads the model and tokenizes the data."""
    from transformers import AutoTokenizer, PrinterCallback

    from drrlhf import trl
    from drrlhf.callbacks import InterruptCallback, MetricsCallback, ProgressCallback

    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    train, held_out = (
        _tokenized(part.dataset, tokenizer, settings) if part else None
        for part in (data, eval_data)
    )
    arguments = _arguments(settings, tokenizer, eval_data is not None, console)
    config: Any
    make: Any
    if settings.kind == "reward":
        make = trl.RewardTrainer
        arguments["center_rewards_coefficient"] = settings.center_rewards_coefficient or None
        config = trl.RewardConfig(**arguments)
    else:
        make = trl.DPOTrainer
        arguments |= {
            "beta": settings.beta,
            "loss_type": [settings.loss_type],
            "label_smoothing": settings.label_smoothing,
            "precompute_ref_log_probs": settings.precompute_ref,
        }
        config = trl.DPOConfig(**arguments)
    callbacks = (
        MetricsCallback(Path(settings.output_dir) / rundir.METRICS_FILE),
        InterruptCallback(),
        ProgressCallback(console),
    )
    # MetricsCallback comes last: it must see that a checkpoint was asked for, whoever asked.
    trainer = make(
        model=settings.model,
        args=config,
        processing_class=tokenizer,
        train_dataset=train,
        eval_dataset=held_out,
        callbacks=list(callbacks[::-1]),
        peft_config=_adapters(settings),
    )
    trainer.remove_callback(PrinterCallback)
    _tell_left_out(len(data.dataset), len(trainer.train_dataset), config.max_length, console)
    return trainer, callbacks


def _tokenized(dataset: Any, tokenizer: Any, settings: rundir.Settings) -> Any:
    """`dataset` as it is, or tokenized here when TRL could not: encoders end texts their own way.

    TRL appends the end-of-sequence token to every text, and most encoders have none.
    """
    if tokenizer.eos_token is not None:
        return dataset
    if settings.kind == "dpo":
        raise ValueError(
            f"--model {settings.model}: its tokenizer has no eos_token to end a completion with"
        )
    if not isinstance(dataset[0]["chosen"], str):
        raise ValueError(
            f"--model {settings.model}: its tokenizer has no eos_token, so it reads plain text "
            "only, and the data is conversational"
        )

    def tokenize(row: dict[str, Any]) -> dict[str, Any]:
        texts = (row.get("prompt", "") + row[name] for name in ("chosen", "rejected"))
        chosen, rejected = (tokenizer(text)["input_ids"] for text in texts)
        return {"chosen_ids": chosen, "rejected_ids": rejected}

    return dataset.map(tokenize, desc="Tokenizing")


def _arguments(
    settings: rundir.Settings, tokenizer: Any, evaluate: bool, console: Console
) -> dict[str, Any]:
    """What both configurations take from `settings`, under transformers' names."""
    import torch

    accelerated = torch.cuda.is_available()
    return {
        "ambiguity": settings.ambiguity,
        "output_dir": settings.output_dir,
        "num_train_epochs": settings.epochs,
        "max_steps": settings.max_steps,
        "per_device_train_batch_size": settings.batch_size,
        "per_device_eval_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation,
        "learning_rate": settings.learning_rate,
        "max_length": _fitting_length(settings, tokenizer, console),
        "seed": settings.seed,
        "bf16": settings.dtype == "bf16",
        "use_cpu": not accelerated,
        "gradient_checkpointing": accelerated,  # buys memory with time: no bargain on a CPU
        "save_steps": settings.save_steps,
        "save_total_limit": KEPT_CHECKPOINTS,
        "logging_steps": settings.logging_steps,
        "logging_nan_inf_filter": False,  # a loss that is NaN must show
        "eval_strategy": "steps" if evaluate else "no",
        "eval_steps": settings.save_steps,
        "report_to": "none",
        "disable_tqdm": True,
    }


def _fitting_length(settings: rundir.Settings, tokenizer: Any, console: Console) -> int:
    """--max-length, or what the model has positions for when that is less."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(settings.model).get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or settings.max_length
    limit = min(positions, tokenizer.model_max_length)
    if limit < settings.max_length:
        console.print(f"--max-length is {limit} here: the model reads no more.")
    return min(limit, settings.max_length)


def _adapters(settings: rundir.Settings) -> Any:
    if not settings.lora:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=settings.lora_r,
        lora_alpha=2 * settings.lora_r,
        target_modules="all-linear",
        task_type="SEQ_CLS" if settings.kind == "reward" else "CAUSAL_LM",
    )


def _tell_left_out(rows: int, kept: int, max_length: int, console: Console) -> None:
    if not kept:
        raise ValueError(
            f"no pair fits: all {rows} are longer than {max_length} tokens; raise --max-length"
        )
    if kept < rows:
        console.print(
            f"{rows - kept} of {rows} pairs left out: longer than --max-length {max_length} tokens."
        )


# ---- training and after ----------------------------------------------------------------------


def _train(
    trainer: Any,
    callbacks: Any,
    checkpoint: Path | None,
    record: dict[str, Any],
    console: Console,
    resume_command: str,
) -> int:
    from transformers.utils import logging

    logging.disable_progress_bar()  # one for every file written would tear ours apart
    _, interrupt, progress = callbacks
    output_dir = Path(trainer.args.output_dir)
    at_once = False
    try:
        with interrupt.installed():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except KeyboardInterrupt:
        at_once = True
    finally:
        progress.stop()
    if at_once or trainer.state.global_step < trainer.state.max_steps:
        return _stopped(output_dir, interrupt.signum, console, resume_command)
    trainer.save_model()
    return _report(output_dir, record, console) if trainer.is_world_process_zero() else 0


def _stopped(output_dir: Path, signum: int, console: Console, resume_command: str) -> int:
    """After Ctrl-C: the curves so far, where to go on from, and how."""
    _plot(output_dir)
    found = rundir.newest_checkpoint(output_dir)
    if found is None:
        console.print("Stopped before a checkpoint was written; start again with --overwrite.")
    else:
        console.print(f"Stopped. Checkpoint: {found}\nContinue with:", soft_wrap=True, markup=False)
        console.print(resume_command, soft_wrap=True, markup=False, highlight=False)
    return INTERRUPTED + signum


def _plot(output_dir: Path) -> Path | None:
    """The curves, when at least one step was logged."""
    from drrlhf.report import plot_training, read_metrics

    metrics = output_dir / rundir.METRICS_FILE
    if not any(line["event"] == "train" for line in read_metrics(metrics)):
        return None
    record = rundir.read_record(output_dir)
    settings = record["settings"]
    title = f"{settings['kind']}, ambiguity {settings['ambiguity']}, {settings['model']}"
    names = record["data"]["group_names"]
    return plot_training(metrics, output_dir / rundir.PLOT_FILE, title=title, group_names=names)


def _report(output_dir: Path, record: dict[str, Any], console: Console) -> int:
    """Complete ``run.json``, draw the curves and print the table of what came out."""
    from drrlhf.report import read_metrics

    lines = read_metrics(output_dir / rundir.METRICS_FILE)
    train = [line for line in lines if line["event"] == "train"]
    evaluations = [line for line in lines if line["event"] == "eval"]
    record = record | {"finished": _now(), "result": {"train": train[-1]}}
    if evaluations:
        record["result"]["eval"] = evaluations[-1]
    rundir.write_record(output_dir, record)
    plot = _plot(output_dir)
    console.print(_table(record, train, evaluations))
    console.print(f"Model: {output_dir}\nCurves: {plot}", soft_wrap=True, markup=False)
    lost = [line["step"] for line in train if line.get("loss") is None]
    if lost:
        console.print(f"The loss was not finite from step {lost[0]} on.", style="bold red")
    return 0


# Title, and the column of metrics.jsonl by the name that each trainer gives it.
_ROWS = (
    ("loss", ("loss",)),
    ("preference accuracy", ("rewards/accuracies", "accuracy")),
    ("reward margin", ("rewards/margins", "margin")),
    ("effective sample size (share)", ("robust/effective_sample_size",)),
    ("largest weight (1 = uniform)", ("robust/max_weight",)),
)


def _table(record: dict[str, Any], train: list[Any], evaluations: list[Any]) -> Table:
    settings, last = record["settings"], train[-1]
    table = Table(
        title=f"{settings['kind']}, ambiguity {settings['ambiguity']}",
        caption=f"{record['data']['rows']} pairs, {last['step']} steps, {last['seconds']:.1f} s",
    )
    tenth = max(1, len(train) // 10)  # one batch alone says little
    parts = [(train[:tenth], ""), (train[-tenth:], "")]
    if evaluations:
        parts.append((evaluations[-1:], "eval_"))
    table.add_column("")
    for lines, prefix in parts:
        steps = sorted({lines[0]["step"], lines[-1]["step"]})
        table.add_column(
            "held out" if prefix else "step " + "-".join(map(str, steps)), justify="right"
        )
    for title, names in _ROWS:
        cells = [_mean(lines, [prefix + name for name in names]) for lines, prefix in parts]
        if any(cells):
            table.add_row(title, *cells)
    return table


def _mean(lines: list[dict[str, Any]], names: list[str]) -> str:
    found = [line[name] for line in lines for name in names if name in line]
    if None in found:
        return "not finite"
    return f"{sum(found) / len(found):.4f}" if found else ""
