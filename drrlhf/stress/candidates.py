"""Candidate answers of prompts with their gold scores, for best of n.

A file has a row for each prompt: ``prompt``, if it is not in the answers; the answers
(``candidates``, ``responses``, ``completions`` or ``answers``, a list of strings); and the gold
score of each of them (``gold``, ``gold_scores``, ``gold_rewards`` or ``ratings``, a list of
numbers). A model's scores of them may be there already (``scores``, ``model_scores`` or
``rewards``), and then the answers need not be. Beside answers, ``scores`` without gold scores in
another column is the gold score.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike

from drrlhf.data import is_number, open_rows
from drrlhf.files import tables
from drrlhf.files.tables import DataError, Row, short
from drrlhf.stress.answers import CANDIDATES, prompt_id
from drrlhf.stress.benchmarks import IDS, SCALARS, Complain
from drrlhf.stress.curves import Array

SCORES = ("scores", "model_scores", "rewards")
GOLD = ("gold", "gold_scores", "gold_rewards", "ratings")


@dataclass(frozen=True)
class Candidates:
    """P prompts with N_i candidate answers each.

    ``ids`` (P,) name the prompts: the file's ``prompt_id`` or ``id``, else "row 1" and so on.
    ``gold`` holds an array (N_i,) float64 for each prompt, all finite; so does ``scores``, the
    model's, NaN where there is none; None before they are scored. ``prompts`` (P,) are strings or
    messages and ``texts`` the answers, None where the file has scores alone. ``attributes`` are the
    other columns, (P,) each.
    """

    ids: tuple[str, ...]
    gold: tuple[Array, ...]
    scores: tuple[Array, ...] | None = None
    prompts: tuple[Any, ...] | None = None
    texts: tuple[tuple[str, ...], ...] | None = None
    attributes: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    source: str = "candidates"

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self) -> list[tuple[Any, Any]]:
        """(prompt, answer) of every candidate, prompt by prompt, for a model to score; an answer to
        messages is a list of one message of the assistant.

        Raises:
            ValueError: the file has no answers.
        """
        if self.texts is None or self.prompts is None:
            raise ValueError(
                f"{self.source}: expected answers for a model to score, got scores alone; give a "
                f"column {CANDIDATES[0]!r}, a list of strings for each prompt"
            )
        return [
            (prompt, text if isinstance(prompt, str) else [{"role": "assistant", "content": text}])
            for prompt, texts in zip(self.prompts, self.texts, strict=True)
            for text in texts
        ]

    def table(self) -> pa.Table:
        """Ids, gold and scores, which `load_candidates` reads again."""
        columns: dict[str, Any] = {"prompt_id": list(self.ids), "gold": [*map(list, self.gold)]}
        if self.scores is not None:
            columns["scores"] = [*map(list, self.scores)]
        others = {name: _of_one_type(one) for name, one in self.attributes.items()}
        return pa.table({**columns, **others, **columns})  # an attribute may be called as one

    def scored(self, rewards: ArrayLike) -> Candidates:
        """The same candidates with a model's scores, (sum of N_i,) in the order of `rows`.

        Raises:
            ValueError: another number of scores.
        """
        sizes = [len(one) for one in self.gold]
        flat = np.asarray(rewards, dtype=np.float64)
        if flat.shape != (sum(sizes),):
            raise ValueError(
                f"rewards: expected shape ({sum(sizes)},), one for each candidate; got {flat.shape}"
            )
        return replace(self, scores=tuple(np.split(flat, np.cumsum(sizes)[:-1])))


def _of_one_type(values: Sequence[Any]) -> pa.Array:
    """A column of values, as text where they are not of one type."""
    kinds = {float if isinstance(one, float) else type(one) for one in values if one is not None}
    if len(kinds - {int, float}) + bool(kinds & {int, float}) > 1:
        values = [None if one is None else str(one) for one in values]
    return tables.array(list(values))


def load_candidates(source: str | Path, split: str = "train") -> Candidates:
    """Read and check a file or data set of candidate answers.

    Args:
        source: a ``.jsonl``, ``.json`` or ``.parquet`` file, or a data set, as
            `drrlhf.data.load_preference_data` takes it.
        split: of a data set.

    Raises:
        DataError: no gold scores, neither answers nor a model's scores, two columns for one thing,
            lists that are not equally long, gold that is not finite, a value of a wrong type, an
            empty file; it names the file and the row.
    """
    name, _, rows = open_rows(str(source), split)
    found: list[dict[str, Any]] = []
    columns: dict[str, str] = {}
    for number, (_, row) in enumerate(rows, 1):

        def complain(message: str, number: int = number) -> DataError:
            return DataError(f"{name}: row {number}: {message}")

        if not isinstance(row, dict):
            raise complain(f"expected an object with candidates and gold; got {short(row)}")
        columns = columns or _columns(row, complain)
        found.append(_checked(row, columns, complain))
    if not found:
        raise DataError(f"{name}: empty; expected a row for each prompt, with candidates and gold")
    taken: set[str] = set()
    others = dict.fromkeys(key for one in found for key in one["others"])
    return Candidates(
        tuple(prompt_id(one["id"], f"row {i}", taken) for i, one in enumerate(found, 1)),
        tuple(one["gold"] for one in found),
        tuple(one["scores"] for one in found) if "scores" in columns else None,
        tuple(one["prompt"] for one in found) if "texts" in columns else None,
        tuple(one["texts"] for one in found) if "texts" in columns else None,
        {key: tuple(one["others"].get(key) for one in found) for key in others},
        name,
    )


def _columns(row: Row, complain: Complain) -> dict[str, str]:
    """Which columns hold the "texts", the "gold" and the "scores", by the first row."""
    there = [key for key, value in row.items() if value is not None]
    columns: dict[str, str] = {}
    for what, names in (("texts", CANDIDATES), ("gold", GOLD), ("scores", SCORES)):
        known = [key for key in there if key in names]
        if what == "scores" and [*columns] == ["texts"] and SCORES[0] in known:
            columns["gold"] = SCORES[0]
            known.remove(SCORES[0])
        if len(known) > 1:
            told = "a model's scores" if what == "scores" else what
            raise complain(
                f"expected one column for {told}, got {' and '.join(map(repr, known))}; leave all "
                "but one out"
            )
        if known:
            columns[what] = known[0]
    found = ", ".join(sorted(there)) or "none"
    if "gold" not in columns:
        raise complain(
            f"no gold scores; expected one of {', '.join(GOLD)}, a list of numbers, one for each "
            f"candidate; found: {found}; score the candidates with a gold reward model, or give "
            "pairs (prompt, chosen, rejected)"
        )
    if "texts" not in columns and "scores" not in columns:
        raise complain(
            f"nothing to rank; expected one of {', '.join(CANDIDATES)}, a list of answers, or "
            f"{SCORES[0]}, a list of a model's scores; found: {found}; name a column so"
        )
    return columns


def _checked(row: Row, columns: Mapping[str, str], complain: Complain) -> dict[str, Any]:
    sizes = {}
    for name in columns.values():
        value = row.get(name)
        if not isinstance(value, list) or not value:
            wanted = "a list with a value for each candidate"
            raise complain(
                f"{name!r} must be {wanted}, as in the rows before; got {short(value)}; mend or "
                "drop the row, and keep lists in JSONL or Parquet"
            )
        sizes[name] = len(value)
    if len({*sizes.values()}) > 1:
        said = ", ".join(f"{size} in {name!r}" for name, size in sizes.items())
        raise complain(
            f"expected lists of one length, a value for each candidate; got {said}; mend or drop "
            "the row"
        )
    key = next((name for name in IDS if row.get(name) is not None), "")
    used = {key, "prompt", *columns.values()}
    found = {
        "id": row.get(key),
        "gold": _numbers(row, columns["gold"], complain, finite=True),
        "others": {
            name: value
            for name, value in row.items()
            if name not in used and (value is None or isinstance(value, SCALARS))
        },
    }
    if "scores" in columns:
        found["scores"] = _numbers(row, columns["scores"], complain, finite=False)
    if "texts" in columns:
        found |= {
            "texts": _texts(row, columns["texts"], complain),
            "prompt": _prompt(row, complain),
        }
    return found


def _numbers(row: Row, name: str, complain: Complain, *, finite: bool) -> Array:
    values: Sequence[Any] = row[name]
    for place, value in enumerate(values):
        if is_number(value) and (not finite or math.isfinite(value)):
            continue
        if value is None and not finite:
            continue
        wanted = "finite numbers" if finite else "numbers, or null"
        raise complain(
            f"{name!r} must hold {wanted}; got {short(value)} for candidate {place + 1}; score it "
            "again, or leave the candidate out"
        )
    return np.array([math.nan if value is None else float(value) for value in values])


def _texts(row: Row, name: str, complain: Complain) -> tuple[str, ...]:
    for place, value in enumerate(row[name]):
        if not isinstance(value, str):
            raise complain(
                f"{name!r} must hold strings; got {short(value)} for candidate {place + 1}; give "
                "the text alone"
            )
    return tuple(row[name])


def _prompt(row: Row, complain: Complain) -> Any:
    prompt = row.get("prompt")
    if "prompt" not in row:  # as in pairs without one: the answers hold all there is
        return ""
    if isinstance(prompt, str) and prompt.strip():
        return prompt
    fields = ("role", "content")
    if (
        isinstance(prompt, list)
        and prompt
        and all(
            isinstance(one, dict) and all(isinstance(one.get(key), str) for key in fields)
            for one in prompt
        )
    ):
        return prompt
    raise complain(
        "'prompt' must be a string with text, or a list of {'role': string, 'content': string}; "
        f"got {short(prompt)}; mend or drop the row"
    )
