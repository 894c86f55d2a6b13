"""What the summaries of experiments share: differences seed by seed, and how they are printed."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from drrlhf.files import json_lines
from evidence.shift.findings import SURE, holm, paired

Values = Mapping[str, np.ndarray]  # by method, (seeds,)
Records = Sequence[Mapping[str, Any]]


def kept(path: str) -> list[dict[str, Any]]:
    """The records of a file of results, given from the folder of the evidence; none before its
    first run."""
    file = Path(__file__).parent / path
    return list(json_lines(file))[1:] if file.is_file() else []


def difference(
    found: Values, base: str, methods: Sequence[str], digits: int | None = None
) -> dict[str, str]:
    """The difference of each method to the base with a 95 % interval, bold where it is sure; in
    so many ``digits``, by default as points have where the base is large."""
    tests = {name: paired(found[name] - found[base]) for name in methods}
    corrected = holm([p for p, _ in tests.values()])
    if digits is None:
        digits = 1 if abs(found[base]).mean() > 10 else 3  # points have one
    cells = {}
    for (name, (_, (low, high))), p in zip(tests.items(), corrected, strict=True):
        mean = f"{(found[name] - found[base]).mean():+.{digits}f}"
        cell = f"**{mean}**" if p < SURE else mean
        cells[name] = f"{cell} [{low:+.{digits}f}, {high:+.{digits}f}]"
    return cells


def sure(cells: Mapping[str, str]) -> dict[str, str]:
    """The means of the differences that are sure, of what `difference` says."""
    return {name: cell.split("**")[1] for name, cell in cells.items() if cell.startswith("**")}


def compared(
    found: Mapping[str, Values],
    against: Mapping[str, Sequence[str]],
    digits: int | None = None,
) -> list[tuple[str, ...]]:
    """A row for each base and method compared with it, a cell for each measure of ``found``."""
    rows = []
    for base, methods in against.items():
        cells = [difference(values, base, methods, digits) for values in found.values()]
        rows += [(f"{name} over {base}", *(cell[name] for cell in cells)) for name in methods]
    return rows


def print_tables(description: str | None, tables: Callable[[Records], str]) -> None:
    """The command of a summary: the tables of the file that it is given."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("file", type=Path)
    _, *records = json_lines(parser.parse_args().file)
    print(tables(records))
