"""``drrlhf suggest-radius``: the options and the table; the work is in drrlhf.stress.radius."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drrlhf.cli import _console
from drrlhf.cli._options import MAX_NAN, PROMPT_COLUMN, RESAMPLES, chosen, option, taken_from
from drrlhf.files import write_text

if TYPE_CHECKING:
    from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command takes, in the order of its --help."""

    scores: Path = option(
        ...,
        "Held-out pairs scored by a plainly trained model, a .jsonl, .json, .csv or "
        ".parquet file with chosen_reward and rejected_reward, or margin.",
    )
    group_by: str | None = option(
        None,
        "Attribute whose groups the radius is to cover, such as domain; best scored by "
        "models that did not train on the group.",
    )
    prompt_column: str | None = option(None, **PROMPT_COLUMN)
    quantile: float = option(0.95, "Of the bootstrapped mean loss that is to be covered.")
    resamples: int = option(1000, RESAMPLES)
    min_support: int = option(30, "Prompts that a group must have to count.")
    max_nan: float = option(0.01, MAX_NAN)
    seed: int = option(0, "Of the resampling.", min=0)
    output: Path | None = option(None, "JSON file for the suggestion.", dir_okay=False)


@taken_from(Options)
def suggest_radius(options: Options) -> None:
    """Suggest a radius to train with, from held-out pairs that a plain model has scored.

    The smallest radius whose worst case covers what chance may do to a sample of this size, and,
    with --group-by, what each group costs a model that knows the others.

    Example:

        drrlhf suggest-radius --scores validation.jsonl --group-by domain
    """
    console = _console.plain()
    with _console.user_errors():
        from drrlhf.cli.run import require

        require()
        from drrlhf.stress import load_scores
        from drrlhf.stress.radius import suggest_radius as suggest

        with _console.status(console, f"Reading {options.scores} ..."):
            given = chosen(options, "prompt_column", "max_nan")
            loaded = load_scores(options.scores, **given, all_right=True)
        with _console.status(console, "Searching ..."):
            asked = ("group_by", "quantile", "resamples", "min_support", "seed")
            found = suggest(loaded, **chosen(options, *asked))
        if options.output is not None:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            write_text(options.output, json.dumps(found, indent=1, allow_nan=False) + "\n")
    console.print(_table(found))
    for sentence in _said(found):
        console.print(sentence)


def _table(found: dict[str, Any]) -> Table:
    """A row a family: the set that covers chance, the one that covers every group."""
    from rich import box
    from rich.table import Table

    chance, groups = found["bootstrap"], found["groups"]
    table = Table(box=box.SIMPLE_HEAD, title="The weakest set whose worst case covers")
    table.add_column("chance alone")
    if groups is not None:
        table.add_column(f"every {groups['column']}")
        table.add_column("for the sake of")
    for family, covering in chance["sets"].items():
        cells = [covering or "none can"]
        if groups is not None:
            cells += [groups["sets"][family] or "none can", groups["decided_by"][family]]
        table.add_row(*cells)
    return table


def _said(found: dict[str, Any]) -> list[str]:
    from drrlhf.stress.resample import FEW_PROMPTS

    chance, groups, alone = found["bootstrap"], found["groups"], found["pairs_without_prompt"]
    said = [
        f"Mean loss {found['mean_loss']:.4f} over {found['pairs']:,} pairs of "
        f"{found['prompts']:,} prompts; by chance alone it may reach {chance['target']:.4f} "
        f"(the {chance['quantile']:.0%} quantile of bootstrap samples)."
    ]
    if alone:
        said.append(f"{alone:,} of these pairs have no prompt id: each is a prompt of its own.")
    if found["prompts"] < FEW_PROMPTS:
        said.append(
            f"Only {found['prompts']} different prompts: what chance may do rests on these, and is "
            "rough; it comes out too small."
        )
    if groups is None:
        return [*said, "Chance is not shift: --group-by says what other groups cost."]
    said += [
        f"  {one['group']}: {one['mean_loss']:.4f} in {one['pairs']:,} pairs, "
        f"{one['mean_loss_outside']:.4f} outside."
        for one in sorted(groups["each"], key=lambda one: -one["mean_loss"])
    ]
    if groups["too_small"]:
        said.append(f"  Too small to count: {', '.join(groups['too_small'])}.")
    return said
