"""Scored pairs from a file: margins, the prompt of each pair, and columns of attributes.

A file is JSONL, JSON, CSV or Parquet with a row a pair: ``chosen_reward`` and ``rejected_reward``,
or ``margin``, their difference. RewardBench's names (``scores_chosen``, ``scores_rejected``) are
known too. ``margin@NAME`` is the margin after a change NAME of the text. Every other column is an
attribute if its values can be: a name, a number, true or false.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from drrlhf.data import DataError

CHOSEN = ("chosen_reward", "scores_chosen", "chosen_score", "score_chosen", "chosen_rewards")
REJECTED = tuple(name.replace("chosen", "rejected") for name in CHOSEN)
MARGIN = ("margin", "score_margin", "reward_margin")
PROMPTS = ("prompt_id", "prompt", "question_id", "id")
# What says again what the scores say.
RESULTS = ("results", "correct", "is_correct", "num_correct")
TEXTS = ("prompt", "chosen", "rejected")
POSITION = "chosen_position"
CHANGED = "margin@"
LENGTHS = ("chosen_length", "rejected_length")
NO_PROMPTS = "none"
MAX_NAMES = 100
QUARTERS = 4
NAMED_ROWS = 5


@dataclass(frozen=True)
class Attribute:
    """A column of names: ``codes`` (n,) index ``names``; -1 where the value is missing."""

    codes: NDArray[np.int64]
    names: tuple[str, ...]


@dataclass(frozen=True)
class Scores:
    """Scored pairs, those without a finite score already left out.

    ``margin`` (n,) float64 is the chosen reward minus the rejected one; ``prompts`` (n,) int64 in
    [0, number of prompts) says which pairs share a prompt. ``longer`` (n,) float64 is the length of
    the chosen answer minus that of the rejected one, in characters, where lengths are known;
    ``position`` (n,) is 0 where the chosen answer stood first and 1 where it stood second.
    ``counterfactuals`` are the margins (n,) of the same pairs after a change, NaN where it changed
    nothing.
    ``ignored`` says of each unused column why; ``rows`` is the number of rows that were read and
    ``dropped`` counts, of these, the ones whose score was NaN or infinite.
    """

    margin: NDArray[np.float64]
    prompts: NDArray[np.int64]
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    longer: NDArray[np.float64] | None = None
    position: NDArray[np.float64] | None = None
    counterfactuals: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)
    source: str = "scores"
    rows: int = 0
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.margin)


def load_scores(
    source: str | os.PathLike[str],
    *,
    prompt_column: str | None = None,
    max_nan: float = 0.01,
    all_right: bool = False,
) -> Scores:
    """Read and check a file of scored pairs.

    ``prompt_column`` names the column by which pairs belong together (default: the first there is
    of `PROMPTS`); without one, or with "none", every row is a prompt of its own. Up to a share
    ``max_nan`` of the scores may be NaN or infinite: those rows are left out and counted. Where
    accuracy is asked for, pairs that are ``all_right`` have nothing to tell and are refused.

    Raises:
        DataError: a missing file or column, a broken file, scores that are not numbers, too many
            that are not finite, none that differ, or no wrong (or no right) pair.
    """
    path = Path(source).expanduser()
    return from_table(
        _read(path),
        str(source),
        prompt_column=prompt_column,
        max_nan=max_nan,
        all_right=all_right,
    )


def from_table(
    table: pa.Table,
    source: str,
    *,
    prompt_column: str | None = None,
    max_nan: float = 0.01,
    all_right: bool = False,
) -> Scores:
    """`load_scores` for a table that is in memory already."""
    if not 0 <= max_nan < 1:
        raise ValueError(f"max_nan must lie in [0, 1), got {max_nan!r}")
    if not table.num_rows:
        raise DataError(f"{source}: empty; expected a row for each scored pair")
    margin, used = _margin(table, source)
    finite = np.isfinite(margin)
    dropped = int(len(margin) - finite.sum())
    if dropped > max_nan * len(margin):
        raise DataError(
            f"{source}: {dropped} of {len(margin)} scores are NaN or infinite or missing "
            f"({_some_rows(~finite)}); at most a share of {max_nan:g} may be: score those pairs "
            "again, drop them, or raise --max-nan"
        )
    if dropped:
        table, margin = table.filter(pa.array(finite)), margin[finite]
    _check_margins(margin, source, all_right)
    prompt = _prompt_column(table, source, prompt_column)
    prompts = np.arange(len(margin)) if prompt is None else _codes(table[prompt])[0]
    longer = _longer(table, source)
    after = [name for name in table.column_names if name.startswith(CHANGED)]
    counterfactuals = {name.removeprefix(CHANGED): _numbers(table, name, source) for name in after}
    attributes, ignored = _attributes(
        table, {*used, *RESULTS, *TEXTS, *LENGTHS, *after, POSITION, prompt}
    )
    if longer is not None:
        attributes["answer lengths"] = Attribute(
            np.where(np.isnan(longer), -1, np.sign(np.nan_to_num(longer)) + 1).astype(np.int64),
            ("chosen is shorter", "equally long", "chosen is longer"),
        )
    return Scores(
        margin, prompts, attributes, longer, _position(table), counterfactuals, ignored, source,
        len(finite), dropped,
    )  # fmt: skip


# ---- files ---------------------------------------------------------------------------------------


def _read(path: Path) -> pa.Table:
    reader = _READERS.get(path.suffix.lower())
    if not path.is_file():
        raise DataError(f"{path}: no such file; give a file of scored pairs")
    if reader is None:
        known = ", ".join(_READERS)
        raise DataError(f"{path}: unknown suffix {path.suffix!r}; expected one of {known}")
    try:
        table = reader(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    doubled = {name for name in table.column_names if table.column_names.count(name) > 1}
    if doubled:
        raise DataError(f"{path}: column {min(doubled)!r} is there more than once")
    return table


def _read_jsonl(path: Path) -> pa.Table:
    """Lines of objects, or one array of them, or RewardBench's object of columns."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from error
    stripped = text.lstrip()
    if path.suffix.lower() == ".json" and stripped.startswith(("[", "{")):
        try:
            whole = json.loads(stripped)
        except json.JSONDecodeError:
            whole = None  # lines after all
        if isinstance(whole, dict) and all(isinstance(v, list) for v in whole.values()):
            return _table_of(whole)
        if isinstance(whole, list):
            return _rows_to_table(path, list(enumerate(whole, 1)))
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append((number, json.loads(line)))
            except json.JSONDecodeError as error:
                where = f"line {number}: broken JSON: {error.msg} (column {error.colno})"
                raise DataError(f"{path}: {where}") from error
    return _rows_to_table(path, rows)


def _rows_to_table(path: Path, rows: Sequence[tuple[int, Any]]) -> pa.Table:
    columns: dict[str, list[Any]] = {}
    for count, (number, row) in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}: line {number}: expected an object, got {str(row)[:60]!r}")
        for name in row.keys() - columns.keys():
            columns[name] = [None] * count
        for name, values in columns.items():
            values.append(row.get(name))
    return _table_of(columns)


def _table_of(columns: Mapping[str, list[Any]]) -> pa.Table:
    return pa.table({str(name): _array(values) for name, values in columns.items()})


def _array(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # numbers and names in one column: all are names
        return pa.array([None if v is None else v if isinstance(v, str) else json.dumps(v)
                         for v in values])  # fmt: skip


def _read_parquet(path: Path) -> pa.Table:
    """All columns, but of the answers only how long they are: texts may be most of the file."""
    with pq.ParquetFile(path) as file:
        kinds = {one.name: one.type for one in file.schema_arrow}
        answers = [name for name in ("chosen", "rejected") if _is_text(kinds.get(name, pa.null()))]
        spare = {"prompt"} if "prompt_id" in kinds else set()
        table = file.read(columns=[name for name in kinds if name not in {*answers, *spare}])
        for name in answers if not {*LENGTHS} & kinds.keys() else []:
            lengths = [pc.utf8_length(one[name]) for one in file.iter_batches(columns=[name])]
            table = table.append_column(f"{name}_length", pa.chunked_array(lengths))
    return table


_READERS = {
    ".jsonl": _read_jsonl,
    ".json": _read_jsonl,
    ".csv": pyarrow.csv.read_csv,
    ".parquet": _read_parquet,
}


# ---- scores --------------------------------------------------------------------------------------


def _margin(table: pa.Table, source: str) -> tuple[NDArray[np.float64], set[str]]:
    """chosen minus rejected (n,), and the columns that it came from."""
    names = set(table.column_names)
    for chosen, rejected in zip(CHOSEN, REJECTED, strict=True):
        if chosen in names and rejected in names:
            difference = _numbers(table, chosen, source) - _numbers(table, rejected, source)
            return difference, {chosen, rejected, *(names & {*MARGIN})}
    for name in MARGIN:
        if name in names:
            return _numbers(table, name, source), {name}
    raise DataError(
        f"{source}: no scores; found columns: {', '.join(sorted(names))}; needed: chosen_reward "
        f"and rejected_reward (or {CHOSEN[1]} and {REJECTED[1]}), or margin, their difference"
    )


def _numbers(table: pa.Table, name: str, source: str) -> NDArray[np.float64]:
    """A column (n,) as float64; missing is NaN, and a list of one number is that number."""
    column = table[name]
    if pa.types.is_list(column.type):
        if not pc.all(pc.equal(pc.list_value_length(column), 1)).as_py():
            raise DataError(
                f"{source}: column {name!r} holds lists of several scores; give a row for each "
                "pair of answers, and a prompt_id that they share"
            )
        column = pc.list_flatten(column)
    if not _is_number(column.type) and not pa.types.is_null(column.type):
        raise DataError(f"{source}: column {name!r} must hold numbers, but holds {column.type}")
    return column.cast(pa.float64()).to_numpy()


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_floating(kind) or pa.types.is_integer(kind)


def _some_rows(wrong: NDArray[np.bool_]) -> str:
    rows = np.flatnonzero(wrong)[: NAMED_ROWS + 1] + 1
    more = ", ..." if len(rows) > NAMED_ROWS else ""
    return "rows " + ", ".join(map(str, rows[:NAMED_ROWS])) + more


def _check_margins(margin: NDArray[np.float64], source: str, all_right: bool) -> None:
    if len(margin) > 1 and margin.min() == margin.max():
        raise DataError(
            f"{source}: all {len(margin)} margins are {margin[0]:g}: constant scores rank nothing"
        )
    if not (margin > 0).any():
        raise DataError(
            f"{source}: no chosen answer has the higher score: were chosen and rejected swapped?"
        )
    if not all_right and not (margin <= 0).any():
        raise DataError(
            f"{source}: one class only: every chosen answer has the higher score, so accuracy is 1 "
            "under any reweighting; stress the model on harder pairs"
        )


# ---- prompts, lengths, attributes ----------------------------------------------------------------


def _prompt_column(table: pa.Table, source: str, asked: str | None) -> str | None:
    if asked == NO_PROMPTS and asked not in table.column_names:
        return None
    if asked is not None and asked not in table.column_names:
        found = ", ".join(sorted(table.column_names))
        raise DataError(f"{source}: no column {asked!r} of prompts; found: {found}")
    return asked or next((name for name in PROMPTS if name in table.column_names), None)


def _codes(column: pa.ChunkedArray) -> tuple[NDArray[np.int64], list[Any]]:
    """(n,) codes, -1 for missing, and the values that they stand for."""
    if pa.types.is_nested(column.type):
        column = pa.chunked_array([pa.array([json.dumps(v) for v in column.to_pylist()])])
    encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    encoded = encoded.unify_dictionaries().combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.chunk(0)
    codes = pc.fill_null(encoded.indices.cast(pa.int64()), -1).to_numpy()
    return codes, encoded.dictionary.to_pylist()


def _longer(table: pa.Table, source: str) -> NDArray[np.float64] | None:
    names = set(table.column_names)
    if {*LENGTHS} <= names:
        return _numbers(table, "chosen_length", source) - _numbers(table, "rejected_length", source)
    if not {"chosen", "rejected"} <= names:
        return None
    if not all(_is_text(table[name].type) for name in ("chosen", "rejected")):
        return None
    sizes = [pc.utf8_length(table[name]).cast(pa.float64()) for name in ("chosen", "rejected")]
    return pc.subtract(*sizes).to_numpy()


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _position(table: pa.Table) -> NDArray[np.float64] | None:
    """Where the chosen answer stood, 0 for first and 1 for second, if a column says."""
    if POSITION not in table.column_names:
        return None
    codes, values = _codes(table[POSITION])
    places = {"0": 0, "first": 0, "a": 0, "1": 1, "second": 1, "b": 1}
    numbers = [places.get(str(value).lower(), np.nan) for value in values]
    return np.array([*numbers, np.nan])[codes]


def _attributes(
    table: pa.Table, used: set[str | None]
) -> tuple[dict[str, Attribute], dict[str, str]]:
    kept: dict[str, Attribute] = {}
    ignored: dict[str, str] = {}
    for name in table.column_names:
        if name not in used:
            found = _attribute(table[name])
            if isinstance(found, str):
                ignored[name] = found
            else:
                kept[name] = found
    return kept, ignored


def _attribute(column: pa.ChunkedArray) -> Attribute | str:
    """The column as an attribute, or why it is none."""
    if pa.types.is_nested(column.type) or pa.types.is_null(column.type):
        return f"of type {column.type}"
    if _is_number(column.type) and pc.count_distinct(column).as_py() > 2 * QUARTERS:
        return _quarters(column.cast(pa.float64()).to_numpy())
    codes, values = _codes(column)
    if len(values) < 2:
        return "constant"
    if len(values) > MAX_NAMES:
        return f"{len(values)} different values, more than {MAX_NAMES}"
    return Attribute(codes, tuple(str(value) for value in values))


def _quarters(values: NDArray[np.float64]) -> Attribute | str:
    finite = values[np.isfinite(values)]
    if not len(finite):
        return "not a finite number in it"
    edges = np.unique(np.quantile(finite, np.arange(1, QUARTERS) / QUARTERS))
    codes = np.searchsorted(edges, values, side="left")
    names = [f"<= {edges[0]:.4g}"]
    names += [f"{low:.4g} to {high:.4g}" for low, high in itertools.pairwise(edges)]
    return Attribute(np.where(np.isfinite(values), codes, -1), (*names, f"> {edges[-1]:.4g}"))
