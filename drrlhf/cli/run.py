"""One training run: settings -> checks -> trainer -> training -> what came out."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import platform
import signal
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console

from drrlhf import models
from drrlhf.ambiguity import Group, parse_ambiguity
from drrlhf.cli import _console, build, outcome, reward_function, rundir
from drrlhf.cli.settings import LEARNING_RATES, LORA_R, Settings
from drrlhf.groups import from_data, short, with_count
from drrlhf.version import __version__

NEEDED = ("trl", "transformers", "datasets", "accelerate", "matplotlib")
INTERRUPTED = 128  # plus the signal's number, as shells report it


def run(kind: str, options: dict[str, Any], console: Console, resume_command: str) -> int:
    """Check everything, train, report; the exit status of the command.

    Whatever the user can mend is found before the first step: one red line, and neither an earlier
    run nor its record has been touched.
    """
    output_dir = Path(options["output_dir"])
    try:
        with _console.user_errors():
            _check_options(options)
            require()
            checkpoint = _check_directory(output_dir, options)
            options = _with_model(kind, options, console)
            if kind == "grpo":
                reward_function.find(options["reward"])
            data, eval_data, settings = _load(kind, options)
            record = _record(settings, data)
            if checkpoint:
                record = _continued(output_dir, record, checkpoint)
            if checkpoint and _finished(checkpoint):
                return _finish(output_dir, record, console) if _first_process() else 0
            trainer, callbacks = build.build(settings, data, eval_data, console)
            if checkpoint:
                trainer.check_resume(checkpoint)
            if trainer.is_world_process_zero():
                rundir.sweep(output_dir)
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


def _with_model(kind: str, options: dict[str, Any], console: Console) -> dict[str, Any]:
    """The options with those settled that depend on the model, which must be of use for `kind`."""
    name = options["model"]
    described = models.describe(name)
    if kind != "reward" and described.kind == models.REWARD:
        raise ValueError(
            f"--model {name}: a reward model ({described.found}), and train {kind} needs a causal "
            "language model; a reward model goes to train reward, or to --reward of train grpo"
        )
    if kind == "reward" and described.labels not in (None, 1):
        raise ValueError(
            f"--model {name}: a classifier of {described.labels} labels, and a reward model has "
            "one; give a reward model, or a base model, which gets a new head"
        )
    lora, rank = options["lora"], options["lora_r"]
    if (adapters := described.adapters) is not None:
        if lora is False:
            raise ValueError(
                f"--no-lora: --model {name} holds adapters, which are trained on; to train the "
                "whole model, merge them into it first (merge_and_unload of peft)"
            )
        own = adapters.get("r")
        if rank not in (None, own):
            raise ValueError(
                f"--lora-r {rank}: the adapters of --model {name} have rank {own}; leave it out"
            )
        lora, rank = True, own
        console.print(
            f"Training on the adapters of {name}.", soft_wrap=True, highlight=False, markup=False
        )
    if kind == "reward" and described.kind != models.REWARD:
        console.print(
            f"{name} ({described.found}) is no reward model: its head is new and begins at random.",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )
    if lora:
        require("peft")
    rate = options["learning_rate"]
    return options | {
        "lora": bool(lora),
        "lora_r": LORA_R if rank is None else rank,
        "learning_rate": LEARNING_RATES[kind, bool(lora)] if rate is None else rate,
    }


def _check_options(options: dict[str, Any]) -> None:
    if options["max_steps"] == 0 or options["max_steps"] < -1:
        raise ValueError(f"--max-steps must be >= 1, or -1 for off; got {options['max_steps']}")
    if options["max_steps"] == -1 and not options["epochs"] > 0:
        raise ValueError(f"--epochs must be > 0; got {options['epochs']}")
    if options["learning_rate"] is not None and not options["learning_rate"] > 0:
        raise ValueError(f"--learning-rate must be > 0; got {options['learning_rate']}")
    if options.get("temperature") is not None and not options["temperature"] > 0:
        raise ValueError(f"--temperature must be > 0; got {options['temperature']}")
    if options["resume"] and options["overwrite"]:
        raise ValueError("--resume and --overwrite contradict each other: give one of them")


def _check_directory(output_dir: Path, options: dict[str, Any]) -> Path | None:
    """Whether this run may use `output_dir` and `--model`; the checkpoint to go on from, if any."""
    model = options["model"]
    is_path = models.is_path(model)
    if is_path and not Path(model).is_dir():
        raise ValueError(
            f"--model {model}: no such directory; give one that holds config.json, or adapters"
        )
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
    if occupant and not (output_dir / rundir.RUN_FILE).is_file():
        raise ValueError(
            f"--overwrite: --output-dir {output_dir} holds {occupant} but no {rundir.RUN_FILE}, so "
            "it is no run of drrlhf and will not be discarded: give another directory"
        )
    return None


def _load(kind: str, options: dict[str, Any]) -> tuple[Any, Any, Settings]:
    """Data of both sets, checked to the last row, and the settings with nothing left open."""
    ambiguity = options["ambiguity"].strip()
    groups_from_data = from_data(ambiguity)
    if groups_from_data:
        with_count(ambiguity, 1)  # refuses what else is wrong
    else:
        parse_ambiguity(ambiguity)
    grouped = groups_from_data or isinstance(parse_ambiguity(ambiguity), Group)
    by_pass_rate = options.get("group_by") == "pass_rate"

    from drrlhf.data import load_preference_data, load_prompt_data

    def load(source: str, split: str | None, **groups: Any) -> Any:
        chosen = {"split": split or "train"} | groups
        if kind == "grpo":
            loaded = load_prompt_data(source, **chosen)
            reward_function.check_columns(source, loaded.dataset.column_names)
            return loaded
        return load_preference_data(source, kind=kind, **chosen)

    data, eval_data = load(options["data"], options["split"]), None
    held_out = options["eval_data"] or (options["eval_split"] and options["data"])
    if held_out:
        # Groups that the adversary weighs are those of training; a metric may be of others.
        data, eval_data = _same_groups(
            data,
            load(
                held_out,
                options["eval_split"],
                group_names=_group_names(data),
                new_groups=not grouped or by_pass_rate,
            ),
        )
    if not by_pass_rate:
        ambiguity = _resolve(ambiguity, data, groups_from_data)
    elif groups_from_data:
        raise ValueError("--group-by pass_rate: say how many groups, as in --ambiguity group:4")
    options = options | {"kind": kind, "ambiguity": ambiguity, "eval_data": held_out or None}
    options["dtype"] = options["dtype"] or _default_dtype()
    return data, eval_data, Settings.of(options)


def _group_names(data: Any) -> list[str] | None:
    """What the groups of loaded data are called; None without groups."""
    if "group" not in data.dataset.column_names:
        return None
    return data.group_names or [str(g) for g in sorted(data.dataset.unique("group"))]


def _own_names(data: Any) -> list[str] | None:
    """What the groups of the training data are called: the first names, before those that held-out
    data alone have, which may be others when a run goes on."""
    if data.group_names is None:
        return None
    return list(data.group_names[: 1 + max(data.dataset.unique("group"))])


def _same_groups(data: Any, eval_data: Any) -> tuple[Any, Any]:
    """Both with the names of the evaluation data, which begin with those of the training data."""
    names = eval_data.group_names
    if names is None or "group" not in data.dataset.column_names:
        return data, eval_data
    feature = eval_data.dataset.features["group"]
    named = data.dataset.cast_column("group", feature)
    return dataclasses.replace(data, dataset=named, group_names=names), eval_data


def _resolve(ambiguity: str, data: Any, groups_from_data: bool) -> str:
    """The canonical string of the set, its number of groups taken from or checked with `data`."""
    if not ambiguity.startswith("group"):
        return str(parse_ambiguity(ambiguity))
    if "group" not in data.dataset.column_names:
        raise ValueError(f"--ambiguity {ambiguity}: the data has no column 'group'; add one")
    found = len(data.group_names or data.dataset.unique("group"))
    if groups_from_data:
        return str(with_count(ambiguity, found))
    parsed = parse_ambiguity(ambiguity)
    assert isinstance(parsed, Group)
    if parsed.num_groups != found:
        names = f" ({short(data.group_names)})" if data.group_names else ""
        raise ValueError(
            f"--ambiguity {ambiguity}: the data has {found} groups{names}; write group:{found}, or "
            "group alone to take the number from the data"
        )
    return str(parsed)


def _default_dtype() -> str:
    import torch

    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"


def _record(settings: Settings, data: Any) -> dict[str, Any]:
    names = ("torch", "trl", "transformers", "datasets", "peft", "accelerate")
    versions = {"drrlhf": __version__, "python": platform.python_version()}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "settings": dataclasses.asdict(settings),
        "data": {
            "source": settings.data,
            "rows": len(data.dataset),
            "columns": data.dataset.column_names,
            "group_names": _own_names(data),
            "sha256": rundir.data_fingerprint(data.dataset),
        },
        "model_fingerprint": rundir.model_fingerprint(settings.model),
        "versions": versions,
        "started": rundir.now(),
        "resumed": [],
    }


def _continued(output_dir: Path, record: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """`record` as the continuation of the run in `output_dir`, which must be the same run."""
    earlier = rundir.read_record(output_dir)
    rundir.check_same_run(earlier, record)
    step = rundir.checkpoint_state(checkpoint)["global_step"]
    resumed = {"step": step, "at": rundir.now(), "versions": record["versions"]}
    return earlier | {"settings": record["settings"], "resumed": [*earlier["resumed"], resumed]}


def _first_process() -> bool:
    """Whether this is the first of those that a launcher started, before torch.distributed is."""
    return os.environ.get("RANK", "0") == "0"


def _finished(checkpoint: Path) -> bool:
    state = rundir.checkpoint_state(checkpoint)
    return state["global_step"] >= state["max_steps"]


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
        if trainer.is_world_process_zero():
            _tell_stopped(output_dir, trainer.args.world_size, console, resume_command)
        return INTERRUPTED + interrupt.signum
    return _finish(output_dir, record, console) if trainer.is_world_process_zero() else 0


def _finish(output_dir: Path, record: dict[str, Any], console: Console) -> int:
    """The model of the last checkpoint, which is whole, and the report."""
    checkpoint = rundir.newest_checkpoint(output_dir)
    assert checkpoint is not None  # the trainer saves after its last step
    rundir.sweep(output_dir)
    rundir.promote(checkpoint, output_dir)
    return outcome.report(output_dir, record, console)


def _tell_stopped(output_dir: Path, processes: int, console: Console, resume_command: str) -> None:
    """After Ctrl-C: the curves so far, where to go on from, and how."""
    outcome.plot(output_dir)
    found = rundir.newest_checkpoint(output_dir)
    if found is None:
        console.print("Stopped before a checkpoint was written; start again with --overwrite.")
    else:
        how = f", by the same launcher on {processes} processes" if processes > 1 else ""
        console.print(
            f"Stopped. Checkpoint: {found}\nContinue with{how}:", soft_wrap=True, markup=False
        )
        console.print(resume_command, soft_wrap=True, markup=False, highlight=False)
