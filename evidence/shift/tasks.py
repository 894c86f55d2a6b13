"""Many independent tasks, one line of JSON each: what was done stays done when a run is stopped."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import drrlhf as dr
from drrlhf.demo import sentiment
from drrlhf.files import json_lines, write_text

DIGITS = 5
ROOT = Path(__file__).parents[2]

Record = dict[str, Any]
Work = Callable[[Any], Record]


def parser(description: str | None) -> argparse.ArgumentParser:
    """Where to, how many seeds, how many workers, and whether it is only a trial."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--output", type=Path, required=True)
    made.add_argument("--seeds", type=int, default=10)
    made.add_argument("--workers", type=int, default=1)
    made.add_argument("--quick", action="store_true", help="tiny: proves only that it works")
    return made


def header(**own: Any) -> Record:
    """The first line: what was run (``own``, which a continued run must share), on what, when."""
    return {
        "preference": sentiment.DERIVED,
        **own,
        "versions": {
            "drrlhf": dr.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        **_when(),
    }


def _when() -> Record:
    """The commit of the code, and the date."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {"commit": commit.stdout.strip(), "date": date.today().isoformat()}


def done_already(path: Path, own: Mapping[str, Any]) -> list[Record]:
    """The records of the whole lines in ``path``; a line cut off by a crash is taken away, and
    entries that the tables in ``own`` have gained, such as methods, enter the first line.

    Raises:
        ValueError: the file was made with another ``own``, such as other sizes.
    """
    if not path.is_file():
        return []
    text, records = path.read_text(encoding="utf-8"), json_lines(path)
    if not text.endswith("\n"):
        write_text(path, text[: text.rfind("\n") + 1])
    if not records:
        return []
    first, *rest = records
    for name, value in own.items():
        more = isinstance(value, Mapping) and {**value, **first[name]} == value
        if first[name] != value and not more:
            raise ValueError(f"{path} was made with another {name}; give another --output")
    gained = {**first, **own}
    if gained != first:
        behind = path.read_text(encoding="utf-8").partition("\n")[2]
        write_text(path, f"{json.dumps(gained)}\n{behind}")
    return rest


def run_tasks(
    path: Path, own: Mapping[str, Any], tasks: Sequence[Any], work: Work, workers: int
) -> None:
    """Append ``work(task)`` of every task to ``path``, in whatever order they end, each with the
    commit that it ran at: a run may go on later."""
    when = _when()
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with (
        path.open("a", encoding="utf-8") as file,
        Progress(*columns, TimeElapsedColumn()) as progress,
    ):
        if not file.tell():
            file.write(json.dumps(header(**own)) + "\n")
        bar = progress.add_task("scenarios and seeds", total=len(tasks))
        for record in _results(tasks, work, workers):
            file.write(json.dumps(record | when, separators=(",", ":")) + "\n")
            file.flush()
            progress.advance(bar)


def _results(tasks: Sequence[Any], work: Work, workers: int) -> Iterator[Record]:
    torch.set_num_threads(1)  # equal numbers however many workers there are
    if workers == 1:
        yield from map(work, tasks)
        return
    with multiprocessing.get_context("spawn").Pool(
        workers, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        yield from pool.imap_unordered(work, tasks)


def rounded(found: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, DIGITS) for name, value in found.items()}
