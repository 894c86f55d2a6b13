"""``drrlhf stress --generate``: answers of policies with their rewards, and what is printed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drrlhf import models
from drrlhf.cli import _console, reward_function

if TYPE_CHECKING:
    from rich.console import Console

    from drrlhf.cli.stress import Options


def check(options: Options) -> None:
    """`ValueError` where options do not go together."""
    if not options.generate:
        if options.reward is not None:
            raise ValueError(
                "--reward belongs to --generate DIR, a policy whose answers it is asked about"
            )
        return
    for name in ("scores", "model", "reference", "best_of"):
        if getattr(options, name):
            raise ValueError(
                f"--generate makes answers of its own and takes no --{name.replace('_', '-')}; "
                "give one of the two"
            )
    if options.reward is None:
        raise ValueError(
            "--generate needs --reward: module:function, or the directory of a reward model"
        )
    if options.data is None:
        raise ValueError("--generate needs --data, a file of prompts or a `datasets` name")
    for directory in options.generate:
        kind = models.kind_of(directory)
        if kind != models.POLICY:
            raise ValueError(
                f"--generate {directory}: expected a causal language model, got a reward model, "
                "which is for --reward"
            )


def file_of(options: Options, name: str) -> Path:
    """Where the answers of a policy are kept."""
    return options.output_dir / f"{name.strip(os.sep).replace(os.sep, '_')}.completions.jsonl"


def interrupted(options: Options, names: list[str]) -> str:
    """What is said when a run was stopped: how it goes on."""
    kept = [str(file_of(options, name)) for name in names if file_of(options, name).is_file()]
    if not kept:
        return "Interrupted; no report was written, and no batch of answers was finished."
    return (
        f"Interrupted; no report was written. The answers so far are in {', '.join(kept)}: the "
        "same command goes on from there."
    )


def stressed(options: Options, names: list[str], console: Console) -> dict[str, Any]:
    """Answers and rewards of every policy, as the dictionary that the report shows."""
    from drrlhf.cli.run import require

    require()
    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars
    from transformers.utils import logging

    from drrlhf.stress import RewardModel, generate_scores, stress_generated
    from drrlhf.stress.generated import check_generated_options

    given: dict[str, Any] = {
        "require": options.require or [],
        "resamples": options.resamples,
        "min_support": options.min_support,
        "max_nan": options.max_nan,
        "seed": options.seed,
    }
    check_generated_options(**given)  # before a model is loaded
    logging.disable_progress_bar()
    _console.ignore_upstream_deprecations()
    dtype = None if options.dtype == "as-saved" else getattr(torch, options.dtype.value)
    reward = reward_function.find(str(options.reward))
    if isinstance(reward, str):
        reward = RewardModel(reward, max_length=options.max_length, dtype=dtype)
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn())
    found = {}
    for name, directory in zip(names, options.generate or [], strict=True):
        file = file_of(options, name)
        with Bars(*columns, TimeRemainingColumn(), console=console, transient=True) as bars:
            task = bars.add_task("", total=None)

            def show(what: str, done: int, total: int, bars: Any = bars, task: Any = task) -> None:
                bars.update(task, description=what, completed=done, total=total)

            found[name] = generate_scores(
                directory,
                reward,
                str(options.data),
                split=options.split or "train",
                completions=options.completions,
                max_new_tokens=options.max_new_tokens,
                temperature=options.temperature,
                changes=options.changes,
                changed_prompts=options.changed_pairs,
                batch_size=options.batch_size,
                seed=options.seed,
                dtype=dtype,
                file=file,
                on_progress=show,
            )
        console.print(f"Answers: {file}", soft_wrap=True, highlight=False, markup=False)
    return stress_generated(found, **given)


def show(result: dict[str, Any], console: Console) -> None:
    """The numbers at a glance, findings and gates."""
    from rich import box
    from rich.table import Table

    title = "Mean reward of own answers, under the worst change of prompts, and the worst case"
    table = Table(box=box.SIMPLE_HEAD, title=title)
    worst = next(iter(result["models"].values()))["worst"]
    for head in ("policy", "prompts", "reward", "changed", *worst):
        table.add_column(head, justify="left" if head == "policy" else "right", no_wrap=True)
    for name, model in result["models"].items():
        changed = model["worst_change"]
        cells = [
            model["reward"],
            *([changed["reward"]] if changed else []),
            *model["worst"].values(),
        ]
        numbers = [f"{one['value']:.3f}" for one in cells]
        if not changed:
            numbers.insert(1, "–")
        table.add_row(name, f"{model['prompts']:,}", *numbers)
    console.print(table)
    for name, model in result["models"].items():
        if model["dropped"]:
            console.print(
                f"{name}: {model['dropped']} answers without a finite reward were left out."
            )
        for sentence in [*model["notes"], *(one["text"] for one in model["findings"])]:
            console.print(f"  {sentence}", highlight=False, markup=False)
        for group in [one for one in model["groups"]["single"] if one["below"]][:3]:
            what = ", ".join(f"{key} = {value}" for key, value in group["group"].items())
            reward = group["reward"]
            console.print(
                f"  Below the whole: {what}, {reward['value']:.3f} [{reward['low']:.3f}, "
                f"{reward['high']:.3f}] of {group['prompts']} prompts.",
                highlight=False,
                markup=False,
            )
