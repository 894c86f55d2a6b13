"""``drrlhf stress --generate``: answers of policies with their rewards, and what is printed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drrlhf import models
from drrlhf.cli import _console, reward_function
from drrlhf.cli._options import chosen

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


def file_of(options: Options, name: str, what: str = "completions.jsonl") -> Path:
    """Where the answers of a policy, or something else of a model, are kept."""
    return options.output_dir / f"{name.strip(os.sep).replace(os.sep, '_')}.{what}"


def check_files(options: Options, names: list[str]) -> None:
    """`ValueError` where two models would be kept in one file."""
    models: dict[Path, str] = {}
    for name in names:
        if other := models.get(path := file_of(options, name, "")):
            raise ValueError(
                f"expected a file name for each model, but {other} and {name} are both kept in "
                f"{path}*; rename one of the directories"
            )
        models[path] = name


def interrupted(options: Options, names: list[str]) -> str:
    """What is said when a run was stopped: how it goes on."""
    kept = [str(file_of(options, name)) for name in names if file_of(options, name).is_file()]
    if not kept:
        return "Interrupted; no report was written, and no batch of answers was finished."
    return (
        f"Interrupted; no report was written. The answers so far are in {', '.join(kept)}: the "
        "same command goes on from there."
    )


def remove_answers(options: Options, names: list[str], console: Console) -> None:
    """Of a run that is complete: the files from which it would have gone on are texts."""
    for name in names:
        file_of(options, name).unlink(missing_ok=True)
    console.print("Answers: not kept, as --no-texts asks.")


def stressed(options: Options, names: list[str], console: Console) -> dict[str, Any]:
    """Answers and rewards of every policy, as the dictionary that the report shows."""
    from drrlhf.cli.run import require

    require()
    import torch
    from transformers.utils import logging

    from drrlhf.stress import RewardModel, generate_scores, stress_generated
    from drrlhf.stress.generated import check_generated_options
    from drrlhf.stress.private import generated_without_texts

    given = chosen(options, "resamples", "min_support", "max_nan", "seed")
    given["require"] = options.require or []
    check_generated_options(**given)  # before a model is loaded
    logging.disable_progress_bar()
    _console.ignore_upstream_deprecations()
    dtype = None if options.dtype == "as-saved" else getattr(torch, options.dtype.value)
    reward = reward_function.find(str(options.reward))
    if isinstance(reward, str):
        reward = RewardModel(reward, max_length=options.max_length, dtype=dtype)
    asked, found = ("completions", "max_new_tokens", "temperature"), {}
    for name, directory in zip(names, options.generate or [], strict=True):
        file = file_of(options, name)
        with _console.progress(console) as show:
            made = generate_scores(
                directory,
                reward,
                str(options.data),
                split=options.split or "train",
                changed_prompts=options.changed_pairs,
                dtype=dtype,
                file=file,
                on_progress=show,
                **chosen(options, *asked, "changes", "batch_size", "seed"),
            )
        found[name] = made if options.texts else generated_without_texts(made)
        if options.texts:
            console.print(f"Answers: {file}", soft_wrap=True)
    if isinstance(reward, RewardModel) and reward.cut:
        console.print(
            f"{options.reward}: {reward.cut} texts were longer than --max-length "
            f"{options.max_length} tokens; their last ones were read.",
            soft_wrap=True,
        )
    return stress_generated(found, **given)


def below(model: dict[str, Any], number: str, digits: str, of: str) -> list[str]:
    """The worst groups that lie below the whole, in words; ``of`` is what they hold."""
    from drrlhf.stress.groups import in_words

    found = [(one, one[number]) for one in model["groups"]["single"] if one["below"]]
    return [
        f"Below the whole: {in_words(group)}, {one['value']:{digits}} "
        f"[{one['low']:{digits}}, {one['high']:{digits}}] of {group[of]} {of}."
        for group, one in found[:3]
    ]


def show(result: dict[str, Any], console: Console) -> None:
    """The numbers at a glance, findings and gates."""
    title = "Mean reward of own answers, under the worst change of prompts, and the worst case"
    worst = next(iter(result["models"].values()))["worst"]
    rows = []
    for name, model in result["models"].items():
        changed = model["worst_change"]
        cells = [model["reward"], changed and changed["reward"], *model["worst"].values()]
        numbers = [f"{one['value']:.3f}" if one else "–" for one in cells]
        rows.append([name, f"{model['prompts']:,}", *numbers])
    heads = ["policy", "prompts", "reward", "changed", *worst]
    _console.print_table(console, title, heads, rows)
    for name, model in result["models"].items():
        if model["dropped"]:
            console.print(
                f"{name}: {model['dropped']} answers without a finite reward were left out."
            )
        findings = [one["text"] for one in model["findings"]]
        for line in [*model["notes"], *findings, *below(model, "reward", ".3f", "prompts")]:
            console.print(f"  {line}")
