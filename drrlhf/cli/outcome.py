"""What a run leaves for its user: the curves, the table, the completed record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from drrlhf.cli import rundir


def plot(output_dir: Path) -> Path | None:
    """The curves, when at least one step was logged."""
    from drrlhf.files import json_lines
    from drrlhf.report import plot_training

    metrics = output_dir / rundir.METRICS_FILE
    if not any(line["event"] == "train" for line in json_lines(metrics)):
        return None
    record = rundir.read_record(output_dir)
    settings = record["settings"]
    title = f"{settings['kind']}, ambiguity {settings['ambiguity']}, {settings['model']}"
    return plot_training(metrics, output_dir / rundir.PLOT_FILE, title=title)


def report(output_dir: Path, record: dict[str, Any], console: Console) -> int:
    """Complete ``run.json``, draw the curves and print the table of what came out."""
    from drrlhf.files import json_lines

    lines = json_lines(output_dir / rundir.METRICS_FILE)
    train = [line for line in lines if line["event"] == "train"]
    evaluations = [line for line in lines if line["event"] == "eval"]
    if not train:
        raise ValueError(
            f"--resume: {rundir.METRICS_FILE} in {output_dir} says nothing of the steps of this "
            "run, which has finished; put the file back, or train anew with --overwrite"
        )
    record = record | {"finished": rundir.now(), "result": {"train": train[-1]}}
    if evaluations:
        record["result"]["eval"] = evaluations[-1]
    rundir.write_record(output_dir, record)
    curves = plot(output_dir)
    console.print(_table(record, train, evaluations))
    console.print(f"Model: {output_dir}\nCurves: {curves}", soft_wrap=True, markup=False)
    lost = [line["step"] for line in train if line.get("loss") is None]
    if lost:
        console.print(f"The loss was not finite from step {lost[0]} on.", style="bold red")
    return 0


# Title, and the column of metrics.jsonl by the name that each trainer gives it.
_ROWS = (
    ("loss", ("loss",)),
    ("reward", ("reward",)),
    ("worst-case reward", ("robust/worst_case_reward",)),
    ("KL to the start", ("kl",)),
    ("preference accuracy", ("rewards/accuracies", "accuracy")),
    ("reward margin", ("rewards/margins", "margin")),
    ("effective sample size (share)", ("robust/effective_sample_size",)),
    ("largest weight (1 = uniform)", ("robust/max_weight",)),
)


def _table(record: dict[str, Any], train: list[Any], evaluations: list[Any]) -> Table:
    settings, last = record["settings"], train[-1]
    what = "prompts" if settings["kind"] == "grpo" else "pairs"
    table = Table(
        title=f"{settings['kind']}, ambiguity {settings['ambiguity']}",
        caption=f"{record['data']['rows']} {what}, {last['step']} steps, {last['seconds']:.1f} s",
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
