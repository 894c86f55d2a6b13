"""Which answers of its prompt a pair is made of: the columns that say it, and what follows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

# Which answer of the prompt is the chosen one and which the rejected one, counted from 0.
ANSWERS = ("chosen_answer", "rejected_answer")
# RM-Bench writes each answer in these styles, in this order.
STYLES = ("concise", "detailed", "markdown")
STYLED = ("chosen_style", "rejected_style")
# Columns that hold lists of candidate answers.
CANDIDATES = ("candidates", "responses", "completions", "answers")

Both = tuple[NDArray[np.int64], NDArray[np.int64]]


def prompt_id(value: Any, row: str, taken: set[str]) -> str:
    """The id of a prompt as text, or ``row`` ("row 7") where there is none; with the row behind it
    where it is ``taken`` by an earlier prompt, whose answers would else count as its own."""
    text = row if value is None else str(value)
    while text in taken:
        text = f"{text} ({row})"
    taken.add(text)
    return text


def every_pair(right: int, wrong: int) -> Both:
    """The chosen and the rejected answer of each pair, (right * wrong,) each, where the first
    ``right`` answers are right and the ``wrong`` ones behind them are wrong."""
    chosen = np.arange(right).repeat(wrong)
    return chosen, np.tile(np.arange(right, right + wrong), right)


def answers_in(table: pa.Table) -> Both | dict[str, str]:
    """The answers (rows,) that the columns `ANSWERS` name, -1 where one is missing; or, where they
    cannot, {column: why}, empty without such columns."""
    found = []
    there = [name for name in ANSWERS if name in table.column_names]
    if len(there) < len(ANSWERS):
        absent = next(name for name in ANSWERS if name not in there)
        return dict.fromkeys(there, f"there is no column {absent!r} beside it")
    for name in ANSWERS:
        column = table[name]
        if not pa.types.is_integer(column.type):
            return dict.fromkeys(ANSWERS, f"{name!r} is of type {column.type}, not of integers")
        found.append(pc.fill_null(column.cast(pa.int64()), -1).to_numpy())
    return found[0], found[1]
