"""``drrlhf stress``: the options, the report, the exit status; the work is in drrlhf.stress."""

from __future__ import annotations

import dataclasses
import os
import shlex
import signal
import sys
from collections import Counter
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from drrlhf.cli import _console, stress_generate
from drrlhf.cli._options import MAX_NAN, PROMPT_COLUMN, RESAMPLES, chosen, option, taken_from
from drrlhf.transformations import BY_COLUMN

if TYPE_CHECKING:
    from rich.console import Console

    from drrlhf.stress import Candidates, Scores

    # Of every model, by name; candidates of none or of each.
    Loaded = tuple[dict[str, Scores], dict[str, Candidates]]

FLOOR_MISSED = 1
INTERRUPTED = 128 + signal.SIGINT


class Dtype(str, Enum):
    """What a model computes in."""

    as_saved = "as-saved"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command takes, in the order of its --help."""

    scores: list[Path] | None = option(
        None,
        "Scored pairs, a .jsonl, .json, .csv or .parquet file with chosen_reward and "
        "rejected_reward, or margin, and any columns of attributes; again for more models.",
    )
    model: list[str] | None = option(
        None,
        "Directory of a reward model, or of a policy, whole or as adapters, which scores "
        "the pairs of --data, also after changes of the text that leave its meaning alone; "
        "again for more models.",
    )
    reference: str | None = option(
        None,
        "Directory of the model that a policy was trained from.",
        show_default="for adapters what they began as: those in ref/, or the model under them",
    )
    beta: float = option(0.1, "Of a policy's reward, beta times its log-ratio to --reference.")
    generate: list[str] | None = option(
        None,
        "Directory of a causal language model, whole or as adapters, which answers the prompts "
        "of --data; again for more.",
    )
    reward: str | None = option(
        None,
        "Of the answers of --generate: module:function, or the directory of a reward model.",
    )
    data: str | None = option(
        None,
        "Preference pairs for --model, or prompts for --generate: a .jsonl, .json, .csv or "
        ".parquet file, or a `datasets` name; columns beside chosen, rejected and prompt are "
        "attributes.",
    )
    split: str | None = option(None, "Split of --data, a `datasets` name.", show_default="train")
    changes: str = option(
        "all",
        "Changes of the text under which --model scores the pairs again, such as "
        "typos:0.2,bullets,@NAME, or --generate answers the prompts again, such as "
        "prompt_typos,prompt@NAME; all, or none.",
    )
    best_of: list[Path] | None = option(
        None,
        "Candidate answers of prompts, with gold scores, among which --model picks: prompt, "
        "candidates, gold. With --scores a file for each of these, with scores in it.",
    )
    changed_pairs: int = option(
        1000, "Pairs on which changes are tried, of prompts drawn by --seed.", min=1
    )
    completions: int = option(4, "Answers of --generate to each prompt.", min=1)
    max_new_tokens: int = option(128, "Tokens of an answer of --generate at most.", min=1)
    temperature: float = option(
        1.0, "Of the sampling of --generate; 0 takes the likeliest tokens.", min=0
    )
    batch_size: int = option(32, "Answers that --generate makes at once.", min=1)
    max_length: int = option(
        2048, "Tokens of a text that --model, or the model of --reward, reads at most.", min=2
    )
    dtype: Dtype = option(
        Dtype.as_saved, "Of all models; bfloat16 is the fast one where hardware has it."
    )
    output_dir: Path = option(
        Path("stress"), "Folder for report.html and report.json.", file_okay=False
    )
    texts: bool = option(
        True,
        "Whether the report and the kept scores show examples, and the answers of --generate are "
        "kept; --no-texts where data must not leave.",
    )
    require: list[str] | None = option(
        None,
        'A gate such as "tv:0.1 accuracy>=0.75", "worst-change accuracy>=0.6" or '
        '"subset=code accuracy>=0.7", of --generate "mean reward>=0.5" or "prompt_typos '
        'lost<=0.1"; again for more. Exit status 1 when one is missed.',
    )
    junit: Path | None = option(
        None, "A JUnit XML file of the gates, as CI services read them.", dir_okay=False
    )
    floor: float = option(0.5, "Accuracy that the robustness radius is asked for.")
    ambiguity: str = option("cvar:0.2", "The set whose reweighting is described in words.")
    prompt_column: str | None = option(None, **PROMPT_COLUMN)
    max_nan: float = option(0.01, MAX_NAN)
    resamples: int = option(200, RESAMPLES)
    min_support: int = option(30, "Prompts that a group must have to be ranked.")
    seed: int = option(0, "Of the resampling, and of the sampling of --generate.", min=0)


@taken_from(Options)
def stress(options: Options) -> None:
    """Stress a reward model or policy before it ships: worst cases near the data, worst groups.

    Exit status 1 when a gate given with --require is missed, so it serves in CI.

    Example:

        drrlhf stress --scores scores.jsonl --require "tv:0.1 accuracy>=0.75"

        drrlhf stress --scores old.parquet --scores new.parquet --output-dir stress

        drrlhf stress --model my-reward-model --data held_out.jsonl

        drrlhf stress --model my-reward-model --data held_out.jsonl --changes typos,empty \\
            --best-of candidates.jsonl --require "best-of-64 gold>=best-of-1"

        drrlhf stress --generate my-policy --reward my_module:score --data prompts.jsonl
    """
    console = _console.plain()
    names: list[str] = []
    try:
        with _console.user_errors():
            names = _names(options)
            _check_sources(options)
            make = stress_generate.stressed if options.generate else _stressed
            result = make(options, names, console) | _made_by()
            if not options.texts:
                _leave_out_texts(result)
            from drrlhf.stress import write_junit, write_report

            page = write_report(result, options.output_dir)
            if options.junit is not None:
                write_junit(result, options.junit)
            if options.generate and not options.texts:
                stress_generate.remove_answers(options, names, console)
    except KeyboardInterrupt:
        said = "Interrupted; no report was written."
        if options.generate:
            said = stress_generate.interrupted(options, names)
        console.print(said, soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None
    if options.generate:
        stress_generate.show(result, console)
    else:
        _print(result, console)
    _print_gates(result, console)
    console.print(f"Report: {page}", soft_wrap=True)
    if not result["passed"]:
        raise typer.Exit(FLOOR_MISSED)


def _check_sources(options: Options) -> None:
    models, data = options.model, options.data
    stress_generate.check(options)
    if options.generate:
        return
    if bool(options.scores) == bool(models):
        raise ValueError(
            "give --scores FILE, a file of scored pairs, or --model DIR with --data PAIRS, or "
            "--generate DIR with --reward and --data PROMPTS"
        )
    if bool(models) != (data is not None):
        raise ValueError("--model and --data belong together: the model scores these pairs")
    if options.reference is not None and not models:
        raise ValueError("--reference belongs to --model, a policy; scores in a file need none")
    if options.scores:
        ours = Options()
        for name in ("changes", "changed_pairs", "max_length", "dtype", "beta"):
            if getattr(options, name) != getattr(ours, name):
                raise ValueError(
                    f"--{name.replace('_', '-')} belongs to --model, which scores texts; scores in "
                    "a file are as they are"
                )
    if options.split is not None and data is None:
        raise ValueError("--split belongs to --data, pairs for a --model")
    files, wanted = len(options.best_of or []), 1 if models else len(options.scores or [])
    if files not in (0, wanted):
        raise ValueError(
            f"--best-of: expected {wanted} file{'s' * (wanted > 1)}, "
            + ("which every --model scores" if models else "one for each of --scores")
            + f", got {files}"
        )


def _leave_out_texts(result: dict[str, Any]) -> None:
    for model in result["models"].values():
        model["examples"] = {}
        for finding in model["findings"]:
            finding["examples"] = []


def _made_by() -> dict[str, Any]:
    """What the page says of how it was made."""
    from datetime import date
    from importlib.metadata import version

    name = Path(sys.argv[0]).name
    called = ["python", "-m", "drrlhf"] if name == "__main__.py" else [name]
    return {
        "command": shlex.join([*called, *sys.argv[1:]]),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "date": date.today().isoformat(),
    }


def _stressed(options: Options, names: list[str], console: Console) -> dict[str, Any]:
    from drrlhf.cli.run import require

    require()
    from drrlhf.stress import stress_test
    from drrlhf.stress.run import check_options

    asked = ("floor", "ambiguity", "resamples", "min_support", "max_nan", "seed")
    given = chosen(options, *asked) | {"require": options.require or []}
    check_options(**given)  # before a large file is read
    if options.model:
        scores, candidates = _scored(options, names, console, given)
    else:
        scores, candidates = _read(options, names, console)
    return stress_test(scores, best_of=candidates or None, **given)


def _read(options: Options, names: list[str], console: Console) -> Loaded:
    from drrlhf.stress import load_candidates, load_scores
    from drrlhf.stress.private import scores_without_texts

    loaded = {}
    for name, path in zip(names, options.scores or [], strict=True):
        with _console.status(console, f"Reading {path} ..."):
            scores = load_scores(path, **chosen(options, "prompt_column", "max_nan"))
        loaded[name] = scores if options.texts else scores_without_texts(scores)
    files = zip(loaded, options.best_of or [])
    return loaded, {name: load_candidates(path) for name, path in files}


def _scored(options: Options, names: list[str], console: Console, given: dict[str, Any]) -> Loaded:
    import torch
    from transformers.utils import logging

    from drrlhf.stress import from_table, load_candidates, load_judge, score_table
    from drrlhf.stress.changes import chosen_changes
    from drrlhf.stress.rehearsal import rehearse
    from drrlhf.stress.scoring import score_candidates

    logging.disable_progress_bar()
    _console.ignore_upstream_deprecations()
    data, dtype = str(options.data), options.dtype
    scored, picked = {}, {}
    if BY_COLUMN not in options.changes:
        chosen_changes(options.changes, ())  # before a model is loaded
    asked = [load_candidates(path) for path in options.best_of or []]
    for candidates in asked:
        candidates.rows()  # it has texts
    how = chosen(options, "changes", "changed_pairs", "seed", "prompt_column")
    how["split"] = options.split or "train"
    if given["require"]:
        with _console.status(console, "Looking for what --require names ..."):
            rehearse(data, asked[0] if asked else None, how, given, texts=options.texts)
    for name, directory in zip(names, options.model or [], strict=True):
        judge = load_judge(
            directory,
            dtype=None if dtype is Dtype.as_saved else getattr(torch, dtype.value),
            **chosen(options, "reference", "beta", "max_length"),
        )
        with _console.progress(console) as show:
            table = score_table(judge, data, on_progress=show, **how)
            # What took minutes is kept, whatever may be wrong behind it: --scores reads it again.
            table = _keep(options, console, name, "scores", table)
            for one in asked:
                picked[name] = score_candidates(judge, one, on_progress=show)
                _keep(options, console, name, "candidates", picked[name].table())
        if getattr(judge, "began_with_adapters", False):
            console.print(
                f"{name}: the reference is what its training began with, in {directory}/ref.",
                soft_wrap=True,
            )
        scored[name] = from_table(table, data, **chosen(options, "prompt_column", "max_nan"))
        if judge.cut:
            console.print(
                f"{name}: {judge.cut} texts were longer than --max-length {options.max_length} "
                "tokens and were cut."
            )
    return scored, picked


def _keep(options: Options, console: Console, name: str, what: str, table: Any) -> Any:
    """Write what was scored, whole at any time, and say where; what was written."""
    import pyarrow.parquet as pq

    from drrlhf.files import write_whole
    from drrlhf.stress.private import table_without_texts

    table = table if options.texts else table_without_texts(table, options.prompt_column)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    path = stress_generate.file_of(options, name, f"{what}.parquet")
    write_whole(path, partial(pq.write_table, table))
    console.print(f"{what.capitalize()}: {path}", soft_wrap=True)
    return table


def _names(options: Options) -> list[str]:
    """Of the models: names of folders, and of files without suffix; whole paths where two would be
    called the same."""
    models = options.generate or options.model or []
    paths = options.scores or [Path(os.path.expanduser(one)).resolve() for one in models]
    short = [
        path.name if path.is_dir() else path.stem.removesuffix(".scores") or str(path)
        for path in paths
    ]
    times = Counter(short)
    names = [name if times[name] == 1 else str(path) for name, path in zip(short, paths)]
    if len(set(names)) < len(names):
        raise ValueError(f"{max(names, key=names.count)} is given twice")
    if models:  # whose scores or answers are kept
        stress_generate.check_files(options, names)
    return names


def _print(result: dict[str, Any], console: Console) -> None:
    from drrlhf.stress.report import COMPARED, format_radius, point

    title = "Ranking accuracy, and its worst case near the data"
    rows = []
    for name, model in result["models"].items():
        cells = [point(model, label)["accuracy"] for label in ("tv:0", *COMPARED)]
        numbers = [f"{100 * one['value']:.1f}" for one in cells]
        rows.append([name, f"{model['pairs']:,}", *numbers])
    _console.print_table(console, title, ["model", "pairs", "plain", *COMPARED], rows)
    floor = result["settings"]["floor"]
    for name, model in result["models"].items():
        if model["dropped"]:
            console.print(f"{name}: {model['dropped']} pairs without a finite score were left out.")
        radii = ", ".join(format_radius(*one) for one in model["robustness_radius"].items())
        console.print(f"{name}: accuracy stays at {floor:.0%} up to {radii}")
        found = [*model["notes"], *model["adversary"]["sentences"]]
        found += stress_generate.below(model, "accuracy", ".1%", "pairs")
        for line in [*found, *(one["text"] for one in model["findings"])]:
            console.print(f"  {line}")
    if result["best_of"] is not None:
        for note in result["best_of"]["notes"]:
            console.print(f"Best of n: {note}")


def _print_gates(result: dict[str, Any], console: Console) -> None:
    for name, model in result["models"].items():
        for one in model["requirements"]:
            console.print(
                f"{name}: {one['requirement']}: {'met' if one['met'] else 'MISSED'}, "
                f"{one['found']['value']:.4f}",
                style="green" if one["met"] else "bold red",
            )
