"""Scores of preference pairs by a model, as they are and after changes of the text."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from drrlhf.data import TEMPLATE
from drrlhf.files import tables
from drrlhf.stress.benchmarks import read_pairs
from drrlhf.stress.counterfactual import Row, counterfactuals
from drrlhf.stress.curves import Array
from drrlhf.stress.models import Scorer
from drrlhf.stress.scores import Scores, from_table

DROPPED = ("margin", "chosen", "rejected", *TEMPLATE)
# Told (what is scored, answers done, answers in all).
Progress = Callable[[str, int, int], None]


def score_pairs(
    model: Scorer,
    source: str | Path,
    *,
    split: str = "train",
    prompt_column: str | None = None,
    max_nan: float = 0.01,
    on_progress: Progress = lambda *_: None,
) -> Scores:
    """The pairs of a preference data set or benchmark (see `read_pairs`) scored by ``model``, and
    again under every change of `counterfactual.CHANGES`. Columns beside those of the preference
    format become attributes.

    Raises:
        DataError: see `read_pairs` and `load_scores`.
    """
    table = score_table(model, source, split=split, on_progress=on_progress)
    return from_table(table, str(source), prompt_column=prompt_column, max_nan=max_nan)


def score_table(
    model: Scorer,
    source: str | Path,
    *,
    split: str = "train",
    on_progress: Progress = lambda *_: None,
) -> pa.Table:
    """`score_pairs` as a table that can be kept: all columns but the answers, of which it has the
    lengths, ``margin``, and ``margin@CHANGE`` after each change.

    Raises:
        DataError: see `read_pairs`.
    """
    loaded = read_pairs(source, split)
    rows = loaded.dataset.to_list()

    def score(what: str, some: Sequence[Row]) -> Array:
        done = 0

        def advance(answers: int) -> None:
            nonlocal done
            done += answers
            on_progress(what, done, 2 * len(some))

        return model.margins(some, advance)

    margin = score("as they are", rows)
    after = counterfactuals(rows, margin, score)
    kept = [name for name in loaded.dataset.column_names if name not in DROPPED]
    columns = {name: loaded.dataset[name][:] for name in kept}
    if loaded.group_names is not None:
        columns["group"] = [loaded.group_names[group] for group in columns["group"]]
    if any(isinstance(prompt, list) for prompt in columns.get("prompt", ())):
        # Text: messages that call tools have no common fields.
        columns["prompt"] = [json.dumps(prompt, ensure_ascii=False) for prompt in columns["prompt"]]
    for side in ("chosen", "rejected"):
        columns[f"{side}_length"] = [_length(row[side]) for row in rows]
    arrays = {name: tables.array(values) for name, values in columns.items()}
    table = pa.table(arrays | {"margin": margin})
    for what, new in after.items():
        table = table.append_column(f"margin@{what}", pa.array(new))
    return table


def _length(answer: Any) -> int:
    """Characters of an answer; of messages, of the assistant's."""
    if isinstance(answer, str):
        return len(answer)
    return sum(len(one["content"] or "") for one in answer if one["role"] == "assistant")
