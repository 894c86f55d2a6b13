"""Scores of preference pairs by a model, as they are and after changes of the text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from drrlhf.data import TEMPLATE
from drrlhf.files import tables
from drrlhf.stress import examples
from drrlhf.stress.benchmarks import read_pairs
from drrlhf.stress.candidates import Candidates
from drrlhf.stress.changes import ALL, CHANGED_PAIRS, Row, chosen_changes, drawn_pairs, scored
from drrlhf.stress.curves import Array
from drrlhf.stress.scores import EXAMPLES, FORMS, Scores, from_table, prompt_column_of
from drrlhf.transformations import BY_COLUMN, SIDES

DROPPED = ("margin", *SIDES, *TEMPLATE)
# Told (what is scored, answers done, answers in all).
Progress = Callable[[str, int, int], None]


class Judge(Protocol):
    """What gives answers rewards, as `drrlhf.stress.RewardModel` and `Policy` do."""

    def rewards(self, rows: Sequence[Row], on_progress: Callable[[int], None]) -> Array:
        """Of the chosen and the rejected answer (n, 2), float64; is told how many are done."""


def score_pairs(
    model: Judge,
    source: str | Path,
    *,
    split: str = "train",
    changes: str | Sequence[str] = ALL,
    changed_pairs: int = CHANGED_PAIRS,
    seed: int = 0,
    prompt_column: str | None = None,
    max_nan: float = 0.01,
    on_progress: Progress = lambda *_: None,
) -> Scores:
    """The pairs of a preference data set or benchmark (see `read_pairs`) scored by ``model``, and
    again under ``changes`` of the text, names of `drrlhf.transformations` or "all" or "none".
    Columns beside those of the preference format become attributes.

    ``changed_pairs``: of a larger set the changes are tried on the pairs of prompts drawn by
    ``seed``, about so many; all pairs are scored as they are.

    Raises:
        DataError: see `read_pairs` and `load_scores`.
        ValueError: a change that there is not.
    """
    table = score_table(
        model,
        source,
        split=split,
        changes=changes,
        changed_pairs=changed_pairs,
        seed=seed,
        prompt_column=prompt_column,
        on_progress=on_progress,
    )
    return from_table(table, str(source), prompt_column=prompt_column, max_nan=max_nan)


def score_table(
    model: Judge,
    source: str | Path,
    *,
    split: str = "train",
    changes: str | Sequence[str] = ALL,
    changed_pairs: int = CHANGED_PAIRS,
    seed: int = 0,
    prompt_column: str | None = None,
    on_progress: Progress = lambda *_: None,
) -> pa.Table:
    """`score_pairs` as a table that can be kept: all columns but the answers, of which it has the
    lengths, ``chosen_reward`` and ``rejected_reward``, and the same ``@CHANGE`` after each change,
    null where it changes nothing. The texts of a few telling pairs are kept with it.

    ``prompt_column`` is only looked for, before the model is asked: scoring takes long.

    Raises:
        DataError: see `read_pairs`; no column ``prompt_column``.
        ValueError: a change that there is not, or, of those named, one that changes no text.
    """
    loaded = read_pairs(source, split)
    rows = loaded.dataset.to_list()
    names = chosen_changes(changes, loaded.dataset.column_names)
    kept = [
        name
        for name in loaded.dataset.column_names
        if name not in DROPPED and BY_COLUMN not in name
    ]
    prompt_column_of(kept, str(source), prompt_column)
    prompts = [row.get("prompt", i) for i, row in enumerate(rows)]
    pairs = drawn_pairs(prompts, changed_pairs, seed)

    def score(some: Sequence[Row]) -> Array:
        done = 0

        def advance(answers: int) -> None:
            nonlocal done
            done += answers
            on_progress("Scoring", done, 2 * len(some))

        return model.rewards(some, advance)

    rewards, forms = scored(rows, names, pairs, score, each=changes != ALL)
    columns = loaded.columns(kept)
    if any(isinstance(prompt, list) for prompt in columns.get("prompt", ())):
        # Text: messages that call tools have no common fields.
        columns["prompt"] = [json.dumps(prompt, ensure_ascii=False) for prompt in columns["prompt"]]
    for side in SIDES:
        columns[f"{side}_length"] = [_length(row[side]) for row in rows]
    arrays = {name: tables.array(values) for name, values in columns.items()}
    arrays |= _of_sides({"": rewards} | {BY_COLUMN + name: form for name, form in forms.items()})
    told = examples.chosen(rows, rewards, forms)
    return pa.table(arrays).replace_schema_metadata({EXAMPLES: json.dumps(told)})


def score_candidates(
    model: Judge, candidates: Candidates, *, on_progress: Progress = lambda *_: None
) -> Candidates:
    """The candidates with the rewards that ``model`` gives them.

    Raises:
        ValueError: the file has no answers.
    """
    rows = [
        {"prompt": prompt, "chosen": answer, "rejected": answer}
        for prompt, answer in candidates.rows()
    ]
    done = 0

    def advance(answers: int) -> None:
        nonlocal done
        done += answers
        on_progress("Scoring candidates", done // 2, len(rows))

    return candidates.scored(model.rewards(rows, advance)[:, 0])


def _of_sides(rewards: Mapping[str, Array]) -> dict[str, pa.Array]:
    """Columns of rewards (n, 2) by what follows the names of their sides; those without a number
    are left out."""
    return {
        f"{name}{behind}": pa.array(table[:, side], mask=np.isnan(table[:, side]))
        for behind, table in rewards.items()
        for side, name in enumerate(FORMS)
        if not behind or np.isfinite(table[:, side]).any()
    }


def _length(answer: Any) -> int:
    """Characters of an answer; of messages, of the assistant's."""
    if isinstance(answer, str):
        return len(answer)
    return sum(len(one["content"] or "") for one in answer if one["role"] == "assistant")
