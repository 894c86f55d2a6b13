"""``drrlhf stress``: the options, the report, the exit status; the work is in drrlhf.stress."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from drrlhf.cli import _console

if TYPE_CHECKING:
    from rich.console import Console

FLOOR_MISSED = 1
INTERRUPTED = 128 + signal.SIGINT


def stress(
    scores: Annotated[
        list[Path] | None,
        typer.Option(
            help="Scored pairs, a .jsonl, .json, .csv or .parquet file with chosen_reward and "
            "rejected_reward, or margin, and any columns of attributes; again for more models.",
        ),
    ] = None,
    output_dir: Annotated[
        Path, typer.Option(file_okay=False, help="Folder for report.html and report.json.")
    ] = Path("stress"),
    require: Annotated[
        list[str] | None,
        typer.Option(
            help='A floor such as "tv:0.1 accuracy>=0.75" or "kl:0.1 loss<=0.6"; again for more. '
            "Exit status 1 when one is missed.",
        ),
    ] = None,
    floor: Annotated[
        float, typer.Option(help="Accuracy that the robustness radius is asked for.")
    ] = 0.5,
    ambiguity: Annotated[
        str, typer.Option(help="The set whose reweighting is described in words.")
    ] = "cvar:0.2",
    prompt_column: Annotated[
        str | None,
        typer.Option(
            help="Column by which pairs belong together.",
            show_default="prompt_id, prompt, question_id or id",
        ),
    ] = None,
    max_nan: Annotated[
        float, typer.Option(help="Share of scores that may be NaN, infinite or missing.")
    ] = 0.01,
    resamples: Annotated[int, typer.Option(help="Bootstrap samples of prompts.")] = 200,
    min_support: Annotated[
        int, typer.Option(help="Prompts that a group must have to be ranked.")
    ] = 30,
    seed: Annotated[int, typer.Option(min=0, help="Of the resampling.")] = 0,
) -> None:
    """Stress a reward model or policy before it ships: worst cases near the data, worst groups.

    Exit status 1 when a floor given with --require is missed, so it serves as a gate in CI.

    Example:

        drrlhf stress --scores scores.jsonl --require "tv:0.1 accuracy>=0.75"

        drrlhf stress --scores old.parquet --scores new.parquet --output-dir stress
    """
    console = _console.console()
    try:
        with _console.user_errors():
            if not scores:
                raise ValueError("give --scores FILE, a file of scored pairs")
            result = _stressed(
                scores, console, prompt_column, max_nan,
                require=require or [], floor=floor, ambiguity=ambiguity, resamples=resamples,
                min_support=min_support, seed=seed,
            )  # fmt: skip
            from drrlhf.stress import write_report

            page = write_report(result, output_dir)
    except KeyboardInterrupt:
        console.print("Interrupted; no report was written.")
        raise typer.Exit(INTERRUPTED) from None
    _print(result, console)
    console.print(f"Report: {page}", soft_wrap=True, highlight=False, markup=False)
    if not result["passed"]:
        raise typer.Exit(FLOOR_MISSED)


def _stressed(
    scores: list[Path], console: Console, prompt_column: str | None, max_nan: float, **options: Any
) -> dict[str, Any]:
    from drrlhf.cli.run import require

    require()
    from drrlhf.stress import load_scores, stress_test
    from drrlhf.stress.run import check_options

    names = _names(scores)
    check_options(**options)  # before a large file is read
    with console.status("Reading ...") as status:
        loaded = {}
        for name, path in zip(names, scores, strict=True):
            status.update(f"Reading {path} ...")
            loaded[name] = load_scores(path, prompt_column=prompt_column, max_nan=max_nan)
        return stress_test(loaded, on_progress=status.update, **options)


def _names(paths: list[Path]) -> list[str]:
    """The files' names without suffix; whole paths where two would be called the same."""
    stems = Counter(path.stem for path in paths)
    names = [path.stem if stems[path.stem] == 1 else str(path) for path in paths]
    if len(set(names)) < len(names):
        raise ValueError(f"--scores: {max(names, key=names.count)} is given twice")
    return names


def _print(result: dict[str, Any], console: Console) -> None:
    from rich import box
    from rich.table import Table

    from drrlhf.stress.report import COMPARED, point, said_radius

    table = Table(box=box.SIMPLE_HEAD, title="Ranking accuracy, and its worst case near the data")
    for title in ("model", "pairs", "plain", *COMPARED):
        table.add_column(title, justify="left" if title == "model" else "right", no_wrap=True)
    for name, model in result["models"].items():
        cells = [point(model, label)["accuracy"] for label in ("tv:0", *COMPARED)]
        table.add_row(name, f"{model['pairs']:,}", *(f"{100 * one['value']:.1f}" for one in cells))
    console.print(table)
    floor = result["settings"]["floor"]
    for name, model in result["models"].items():
        if model["dropped"]:
            console.print(f"{name}: {model['dropped']} rows without a finite score were left out.")
        radii = ", ".join(said_radius(*one) for one in model["robustness_radius"].items())
        console.print(f"{name}: accuracy stays at {floor:.0%} up to {radii}", highlight=False)
        for sentence in model["adversary"]["sentences"]:
            console.print(f"  {sentence}", highlight=False, markup=False)
        for group in [one for one in model["groups"]["single"] if one["below"]][:3]:
            what = ", ".join(f"{key} = {value}" for key, value in group["group"].items())
            accuracy = group["accuracy"]
            console.print(
                f"  Below the whole: {what}, {accuracy['value']:.1%} "
                f"[{accuracy['low']:.1%}, {accuracy['high']:.1%}] of {group['pairs']} pairs.",
                highlight=False, markup=False,
            )  # fmt: skip
        for one in model["requirements"]:
            console.print(
                f"{name}: {one['requirement']}: {'met' if one['met'] else 'MISSED'}, "
                f"{one['found']['value']:.4f}",
                style="green" if one["met"] else "bold red", highlight=False, markup=False,
            )  # fmt: skip
