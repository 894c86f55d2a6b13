"""Scored pairs from a file: margins, the prompt of each pair, and columns of attributes.

A file is JSONL, JSON, CSV or Parquet with a row a pair: ``chosen_reward`` and ``rejected_reward``,
or ``margin``, their difference. What RewardBench writes is known too: ``scores_chosen`` and
``scores_rejected``; ``chosen`` and ``rejected``, where these are numbers; and RewardBench 2's
``scores``, a list for each prompt of which the first ``num_correct`` (1 without that column) belong
to right answers: each of them with each of the wrong ones is a pair. So is each of the three of
RM-Bench's ``score_chosen`` with each of its three ``score_rejected``. ``chosen_answer`` and
``rejected_answer`` say which answers of the prompt a pair is made of. ``chosen_reward@NAME`` and
``rejected_reward@NAME`` are rewards of a changed form of an answer, or of an answer to a changed
prompt, and ``margin@NAME`` is the margin after a change NAME of the text. Every other column is an
attribute if its values can be: a name, a number, true or false.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from drrlhf.files import tables
from drrlhf.files.tables import DataError, is_text, short
from drrlhf.stress.answers import ANSWERS, STYLED, STYLES, Both, answers_in, every_pair
from drrlhf.transformations import SIDES

CHOSEN = (
    *("chosen_reward", "scores_chosen", "chosen_score"),
    *("score_chosen", "chosen_rewards", "chosen_scores"),
)
REJECTED = tuple(name.replace("chosen", "rejected") for name in CHOSEN)
MARGIN = ("margin", "score_margin", "reward_margin")
SCORES, CORRECT = "scores", "num_correct"
PROMPTS = ("prompt_id", "prompt", "question_id", "id")
# What says again what the scores say.
RESULTS = ("results", "correct", "is_correct", CORRECT)
TEXTS = ("prompt", "chosen", "rejected")
POSITION = "chosen_position"
CHANGED = "margin@"
FORMS = ("chosen_reward", "rejected_reward")  # and behind an @ the change
_FORM_BEGINNINGS = tuple(f"{name}@" for name in FORMS)
EXAMPLES = b"drrlhf.examples"  # in the metadata of a table
LENGTHS = ("chosen_length", "rejected_length")
NO_PROMPTS = "none"
MAX_NAMES = 100
QUARTERS = 4
NAMED_ROWS = 5
# What pandas calls the numbers of rows, in Parquet, in CSV, and where it has read such a CSV.
_ROW_NUMBERS = re.compile(r"__index_level_\d+__|Unnamed: \d+|")


@dataclass(frozen=True)
class Attribute:
    """A column of names: ``codes`` (n,) index ``names``; -1 where the value is missing."""

    codes: NDArray[np.int64]
    names: tuple[str, ...]


@dataclass(frozen=True)
class Scores:
    """Scored pairs, those without a finite score already left out.

    ``margin`` (n,) float64 is the chosen reward minus the rejected one; ``prompts`` (n,) int64 in
    [0, number of prompts) says which pairs share a prompt; ``without_prompt`` counts the pairs
    whose prompt is missing or empty, each of which is a prompt of its own. ``longer`` (n,) float64
    is the length of the chosen answer minus that of the rejected one, in characters, where lengths
    are known; ``position`` (n,) is 0 where the chosen answer stood first and 1 where it stood
    second. ``answers`` are which of the prompt's answers (n,) the chosen and the rejected one are,
    where the file says so; -1 where it does not, and in all pairs of a prompt of which one was left
    out. ``rewards`` (n, 2) are those of the chosen and the rejected answer, where they are
    known apart, and ``forms`` those of their changed forms by the name of the change, NaN where it
    changed nothing; ``counterfactuals`` are margins (n,) after a change of which no more is known.
    ``examples`` are texts of telling pairs, see `drrlhf.stress.examples`.
    ``ignored`` says of each unused column why; ``rows`` is the number of pairs that were read and
    ``dropped`` counts, of these, the ones whose score was missing, NaN or infinite.
    """

    margin: NDArray[np.float64]
    prompts: NDArray[np.int64]
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    longer: NDArray[np.float64] | None = None
    position: NDArray[np.float64] | None = None
    counterfactuals: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    rewards: NDArray[np.float64] | None = None
    forms: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    examples: Mapping[str, Any] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)
    source: str = "scores"
    rows: int = 0
    dropped: int = 0
    without_prompt: int = 0
    answers: Both | None = None

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
    of `PROMPTS`); without one, or with "none", every row is a prompt of its own, as is a row in
    which it is missing or empty. Up to a share
    ``max_nan`` of the scores may be NaN or infinite: those rows are left out and counted. Where
    accuracy is asked for, pairs that are ``all_right`` have nothing to tell and are refused.

    Raises:
        DataError: a missing file or column, a broken file, scores that are not numbers, too many
            that are not finite, none that differ, or no wrong (or no right) pair.
    """
    # A prompt's text may be most of a file, and with an id at hand it says nothing more.
    spared = {"prompt": "prompt_id"} if prompt_column != "prompt" else {}
    return from_table(
        tables.table(
            Path(os.path.expanduser(source)), measured=("chosen", "rejected"), spared=spared
        ),
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
    margin, rows, used, answers = _margins(table, source)
    finite = np.isfinite(margin)
    dropped = int(len(margin) - finite.sum())
    if dropped > max_nan * len(margin):
        raise DataError(
            f"{source}: {dropped} of {len(margin)} scores are NaN or infinite or missing "
            f"({_some(rows[~finite])}); at most a share of {max_nan:g} may be: score those pairs "
            "again, drop them, or raise --max-nan"
        )
    lost, read, margin, rows = rows[~finite], len(margin), margin[finite], rows[finite]
    after = [name for name in table.column_names if name.startswith((CHANGED, *_FORM_BEGINNINGS))]
    # What a change does is worth telling.
    _check_margins(margin, source, all_right or bool(after))
    prompt = prompt_column_of(table.column_names, source, prompt_column)
    prompts, missing = prompts_in(table, prompt)
    if dropped or read != table.num_rows:
        table = table.take(pa.array(rows))
    named = answers_in(table)
    longer = _longer(table, source)
    counterfactuals = {
        name.removeprefix(CHANGED): _known(_numbers(table[name], name, source))
        for name in after
        if name.startswith(CHANGED)
    }
    rewards, forms = _forms(table, source)
    attributes, ignored = attributes_of(
        table,
        {
            *(*used, *RESULTS, *TEXTS, *LENGTHS, *FORMS, *ANSWERS, *after),
            *("prompt_id", POSITION, prompt),
        },
    )
    position = _position(table)
    if isinstance(position, str):
        ignored[POSITION], position = position, None
    whole = ~np.isin(prompts[rows], prompts[lost])
    if answers is not None:
        answers = (answers[0][finite], answers[1][finite])
        if SCORES not in used:  # three scores and three
            attributes = _styles(answers) | attributes
    elif isinstance(named, dict):
        ignored |= named
    else:
        answers = named
    if answers is not None:
        answers = (np.where(whole, answers[0], -1), np.where(whole, answers[1], -1))
    if longer is not None:
        attributes["answer lengths"] = Attribute(
            np.where(np.isnan(longer), -1, np.sign(np.nan_to_num(longer)) + 1).astype(np.int64),
            ("chosen is shorter", "equally long", "chosen is longer"),
        )
    return Scores(
        margin,
        np.unique(prompts[rows], return_inverse=True)[1],
        attributes,
        longer,
        position,
        counterfactuals,
        rewards,
        forms,
        answers=answers,
        examples=json.loads((table.schema.metadata or {}).get(EXAMPLES, "{}")),
        ignored=ignored,
        source=source,
        rows=read,
        dropped=dropped,
        without_prompt=int(missing[rows].sum()),
    )


def _forms(
    table: pa.Table, source: str
) -> tuple[NDArray[np.float64] | None, dict[str, NDArray[np.float64]]]:
    """The rewards (n, 2) of the two answers, and of their forms by the name of the change."""
    both = {*FORMS} <= {*table.column_names}
    apart = [name for name in table.column_names if name.startswith(_FORM_BEGINNINGS)]
    if not both or _are_styles(*(table[name] for name in FORMS)):
        if apart:
            raise DataError(
                f"{source}: column {apart[0]!r} is the reward of a changed form, and of the "
                f"answers themselves there are none; expected columns {' and '.join(FORMS)} too"
            )
        return None, {}
    rewards = np.column_stack([_numbers(table[name], name, source) for name in FORMS])
    forms = {}
    for change in dict.fromkeys(name.partition("@")[2] for name in apart):
        columns = [
            _numbers(table[name], name, source)
            if (name := f"{side}@{change}") in table.column_names
            else np.full(len(rewards), np.nan)
            for side in FORMS
        ]
        form = _known(np.column_stack(columns))
        if np.isfinite(form).any():
            forms[change] = form
    return rewards, forms


# ---- scores --------------------------------------------------------------------------------------


def _margins(
    table: pa.Table, source: str
) -> tuple[NDArray[np.float64], NDArray[np.int64], set[str], Both | None]:
    """chosen minus rejected (n,), the row of the table (n,) that each pair is of, the columns that
    they came from, and the answers (n,) that a row of several pairs has them of."""
    names, rows = set(table.column_names), np.arange(table.num_rows)
    both = next((two for two in zip(CHOSEN, REJECTED) if {*two} <= names), None)
    alone = next((name for name in MARGIN if name in names), None)
    if both is None and alone is None and {*SIDES} <= names and _are_scores(table[SIDES[0]].type):
        both = SIDES
    if both is not None:
        used = {*both, *(names & {*MARGIN})}
        if _are_styles(*(table[name] for name in both)):
            margin, rows, answers = _each_style(table, *both, source)
            return margin, rows, used, answers
        return _difference(table, *both, source), rows, used, None
    if alone is not None:
        return _numbers(table[alone], alone, source), rows, {alone}, None
    if SCORES in names:
        margin, rows, answers = _each_with_each(table, source)
        return margin, rows, {SCORES}, answers
    texts = ""
    if {*LENGTHS} <= names or {*SIDES} <= names:
        texts = "; texts, read for their lengths alone, go to --data, for a --model to score"
    raise DataError(
        f"{source}: no scores; found columns: {', '.join(sorted(names))}; needed: chosen_reward "
        f"and rejected_reward (or {CHOSEN[1]} and {REJECTED[1]}), or margin, their difference, or "
        f"{SCORES}, a list for each prompt, those of right answers first{texts}"
    )


def _difference(table: pa.Table, first: str, second: str, source: str) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore", over="ignore"):  # such margins are counted as missing
        return _numbers(table[first], first, source) - _numbers(table[second], second, source)


def _each_with_each(
    table: pa.Table, source: str
) -> tuple[NDArray[np.float64], NDArray[np.int64], Both]:
    """Of every row each right answer with each wrong one: margins (n,), rows (n,) and answers. A
    row without scores is one pair whose margin is not known."""
    mend = "call single scores chosen_reward and rejected_reward"
    _check_lists(table, SCORES, source, "a list of numbers for each prompt", mend)
    sizes, flat = _lists(table[SCORES])
    scores = _numbers(flat, SCORES, source, np.arange(len(sizes)).repeat(sizes))
    starts = np.cumsum(sizes) - sizes
    right = np.ones(len(sizes))
    if CORRECT in table.column_names:
        right = _numbers(table[CORRECT], CORRECT, source)
    wrong = (sizes > 0) & ~((right >= 1) & (right < sizes) & (right % 1 == 0))
    if wrong.any():
        row = int(wrong.argmax())
        raise DataError(
            f"{source}: row {row + 1}: {sizes[row]} scores, of which {right[row]:g} are of right "
            f"answers ({CORRECT}); expected at least one right and one wrong answer: drop the row"
        )
    alike = []
    for size, first in {*zip(sizes[sizes > 0].tolist(), right[sizes > 0].astype(int).tolist())}:
        of_size = np.flatnonzero((sizes == size) & (right == first))
        alike.append((of_size, scores[starts[of_size, None] + np.arange(size)], first))
    return _pairs(alike, np.flatnonzero(sizes == 0))


def _check_lists(table: pa.Table, name: str, source: str, wanted: str, mend: str) -> None:
    """`DataError` that names the first value, where a column does not hold lists."""
    if not _is_list(table[name].type):
        row = _first(table[name], lambda value: not _reads_as_numbers(value))
        raise DataError(
            f"{source}: row {row + 1}: column {name!r} must hold {wanted}, but holds "
            f"{short(table[name][row].as_py())}; {mend}"
        )


def _are_styles(chosen: pa.ChunkedArray, rejected: pa.ChunkedArray) -> bool:
    """Whether scores come in lists of several."""
    lists = (one for one in (chosen, rejected) if _is_list(one.type))
    return any(_lists(one)[0].max() > 1 for one in lists)


def _each_style(
    table: pa.Table, chosen: str, rejected: str, source: str
) -> tuple[NDArray[np.float64], NDArray[np.int64], Both]:
    """As `_each_with_each`, for three scores of right answers beside three of wrong ones."""
    sizes, numbers = [], []
    wanted = f"a list of {len(STYLES)} numbers, as its other side does"
    for name in (chosen, rejected):
        _check_lists(table, name, source, wanted, "score that row again, or drop it")
        of_row, flat = _lists(table[name])
        sizes.append(of_row)
        numbers.append(_numbers(flat, name, source, np.arange(len(of_row)).repeat(of_row)))
    absent = (sizes[0] == 0) & (sizes[1] == 0)
    there = (sizes[0] == len(STYLES)) & (sizes[1] == len(STYLES))
    odd = ~(absent | there)
    if odd.any():
        several = odd & ((sizes[0] > 1) | (sizes[1] > 1))  # rather named than a single score
        row = int((several if several.any() else odd).argmax())
        more, other = int(sizes[1][row] > sizes[0][row]), int(sizes[1][row] <= sizes[0][row])
        raise DataError(
            f"{source}: row {row + 1}: column {(chosen, rejected)[more]!r} holds lists of several "
            f"scores, here {sizes[more][row]} beside {sizes[other][row]} in "
            f"{(chosen, rejected)[other]!r}; expected {len(STYLES)} and {len(STYLES)}, as RM-Bench "
            f"has them; else give a row for each pair of answers, and a "
            f"prompt_id that they share, or a column {SCORES!r}, right answers first"
        )
    six = np.hstack([one.reshape(-1, len(STYLES)) for one in numbers])
    return _pairs([(np.flatnonzero(there), six, len(STYLES))], np.flatnonzero(absent))


def _styles(answers: Both) -> dict[str, Attribute]:
    codes = (answers[0], answers[1] - len(STYLES))
    return {name: Attribute(one, STYLES) for name, one in zip(STYLED, codes, strict=True)}


def _pairs(
    alike: Sequence[tuple[NDArray[np.int64], NDArray[np.float64], int]], absent: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64], Both]:
    """Margins (n,), rows (n,) and answers of pairs, by row. ``alike`` holds rows (m,), their scores
    (m, size), and how many of them, the first ones, are of right answers; each of the rows that are
    ``absent`` is one pair whose margin is not known."""
    margins, rows = [np.full(len(absent), np.nan)], [absent]
    chosen, rejected = [np.full(len(absent), -1)], [np.full(len(absent), -1)]
    for of_size, scores, first in alike:
        size = scores.shape[1]
        with np.errstate(invalid="ignore", over="ignore"):  # as in `_difference`
            margins.append((scores[:, :first, None] - scores[:, None, first:]).ravel())
        rows.append(of_size.repeat(first * (size - first)))
        for found, one in zip((chosen, rejected), every_pair(first, size - first), strict=True):
            found.append(np.tile(one, len(of_size)))
    order = np.argsort(np.concatenate(rows), kind="stable")
    joined = [np.concatenate(one)[order] for one in (margins, rows, chosen, rejected)]
    return joined[0], joined[1], (joined[2], joined[3])


def _numbers(
    column: pa.ChunkedArray, name: str, source: str, rows: NDArray[np.int64] | None = None
) -> NDArray[np.float64]:
    """A column (n,) as float64; missing is NaN, and a list of one number is that number. ``rows``
    (n,) are the rows of the table that its values are of, if not one each."""
    rows = np.arange(len(column)) if rows is None else rows
    if _is_list(column.type):
        sizes, flat = _lists(column)
        if (sizes > 1).any():
            raise DataError(
                f"{source}: row {rows[(sizes > 1).argmax()] + 1}: column {name!r} holds lists of "
                "several scores; give a row for each pair of answers, and a prompt_id that they "
                f"share, or a column {SCORES!r}, right answers first"
            )
        numbers = np.full(len(column), np.nan)
        numbers[sizes == 1] = _numbers(flat, name, source, rows[sizes == 1])
        return numbers
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if is_text(column.type) and tables.is_csv(source):  # such as 0.5 beside 0.50
        column = tables.numbers(column)
    if not _is_number(column.type) and not pa.types.is_null(column.type):
        odd = _first(column, lambda value: not _reads_as_number(value))
        raise DataError(
            f"{source}: row {rows[odd] + 1}: column {name!r} must hold numbers, but holds "
            f"{column.type}: {short(column[odd].as_py())}"
        )
    return column.cast(pa.float64(), safe=False).to_numpy()


def _known(numbers: NDArray[np.float64]) -> NDArray[np.float64]:
    """The same with NaN for what is infinite."""
    return np.where(np.isfinite(numbers), numbers, np.nan)


def _first(column: pa.ChunkedArray, is_odd: Callable[[Any], bool]) -> int:
    """The first odd value that is not missing; 0 if all are of the same wrong type."""
    return next((i for i, one in enumerate(column) if one.is_valid and is_odd(one.as_py())), 0)


def _lists(column: pa.ChunkedArray) -> tuple[NDArray[np.int64], pa.ChunkedArray]:
    """How long each list (n,) is, 0 where it is missing, and what they hold, one after another."""
    sizes = pc.fill_null(pc.list_value_length(column), 0)
    return sizes.to_numpy().astype(np.int64), pc.list_flatten(column)


def _is_list(kind: pa.DataType) -> bool:
    return hasattr(kind, "value_field") and not pa.types.is_map(kind)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_decimal(kind)


def _are_scores(kind: pa.DataType) -> bool:
    return _are_scores(kind.value_type) if _is_list(kind) else _is_number(kind)


def _reads_as_number(value: Any) -> bool:
    try:
        return float(value) is not None
    except (TypeError, ValueError):
        return False


def _reads_as_numbers(text: Any) -> bool:
    """Whether text is what became of a list of numbers beside values of other types."""
    try:
        value = json.loads(text)
    except (TypeError, ValueError):
        return False
    return isinstance(value, list) and all(one is None or _reads_as_number(one) for one in value)


def _some(rows: NDArray[np.int64]) -> str:
    """The first few of the rows, counted from 1."""
    named = [str(row + 1) for row in np.unique(rows)[: NAMED_ROWS + 1]]
    return "rows " + ", ".join(named[:NAMED_ROWS]) + ", ..." * (len(named) > NAMED_ROWS)


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


def prompt_column_of(names: Collection[str], source: str, asked: str | None) -> str | None:
    """The column, among ``names``, by which pairs belong together; None where every row is a prompt
    of its own.

    Raises:
        DataError: the one that is ``asked`` for is not there.
    """
    if asked == NO_PROMPTS and asked not in names:
        return None
    if asked is not None and asked not in names:
        found = ", ".join(sorted(names))
        raise DataError(f"{source}: no column {asked!r} of prompts; found: {found}")
    return asked or next((name for name in PROMPTS if name in names), None)


def prompts_in(table: pa.Table, name: str | None) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The code of each row's prompt and whether it has none, (rows,) each: such a row, one whose
    prompt is null, NaN or blank, is a prompt of its own."""
    if name is None:
        return np.arange(table.num_rows), np.zeros(table.num_rows, bool)
    codes, values = _codes(table[name])
    if is_text(values.type):
        blank = pc.match_substring_regex(values.cast(pa.large_string()), r"^\s*$")
        blank = blank.to_numpy(zero_copy_only=False)
    elif pa.types.is_floating(values.type):
        blank = pc.is_nan(values).to_numpy(zero_copy_only=False)
    else:
        blank = np.zeros(len(values), bool)
    missing = np.append(blank, True)[codes]
    return np.where(missing, len(values) + np.arange(len(codes)), codes), missing


def _codes(column: pa.ChunkedArray) -> tuple[NDArray[np.int64], pa.Array]:
    """(n,) codes, -1 for missing, and the values that they stand for."""
    if pa.types.is_nested(column.type):  # such as messages: null where there are none
        texts = [json.dumps(value, default=str) if value else None for value in column.to_pylist()]
        column = pa.chunked_array([pa.array(texts, pa.string())])
    if pa.types.is_dictionary(column.type):  # whose values may be there more than once
        column = column.cast(column.type.value_type)
    encoded = column.combine_chunks().dictionary_encode()
    codes = pc.fill_null(encoded.indices.cast(pa.int64()), -1).to_numpy()
    return codes, encoded.dictionary


def _longer(table: pa.Table, source: str) -> NDArray[np.float64] | None:
    names = set(table.column_names)
    if {*LENGTHS} <= names:
        return _difference(table, *LENGTHS, source)
    if not {*SIDES} <= names or not all(is_text(table[name].type) for name in SIDES):
        return None
    sizes = [pc.utf8_length(table[name]).cast(pa.float64()) for name in SIDES]
    return pc.subtract(*sizes).to_numpy()


def _position(table: pa.Table) -> NDArray[np.float64] | str | None:
    """Where the chosen answer stood, 0 for first and 1 for second, if a column says; why it is of
    no use where it has another value: 1 and 2 would be read as 1 and not known."""
    if POSITION not in table.column_names:
        return None
    codes, values = _codes(table[POSITION])
    places = [_place(value) for value in values.to_pylist()]
    if None in places:  # which is not quoted: it may be a text
        return "a value is none of first and second, a and b, 0 and 1"
    return np.array([*places, np.nan], dtype=float)[codes]


def _place(value: Any) -> float | None:
    """0 for first, 1 for second, NaN where it is missing; None for what says neither."""
    text = str(value).strip().lower()
    if text in ("", "nan"):
        return np.nan
    # A column of integers with a gap is one of doubles, such as 0.0.
    return {"first": 0, "a": 0, "second": 1, "b": 1}.get(
        text, {0.0: 0, 1.0: 1}.get(float(text)) if _reads_as_number(text) else None
    )


def attributes_of(
    table: pa.Table, used: set[str | None]
) -> tuple[dict[str, Attribute], dict[str, str]]:
    """The columns beside those ``used`` as attributes, and of those that are none, why."""
    kept: dict[str, Attribute] = {}
    ignored: dict[str, str] = {}
    for name in table.column_names:
        if name not in used:
            numbers = _ROW_NUMBERS.fullmatch(name) and _is_number(table[name].type)
            found = "numbers of rows" if numbers else _attribute(table[name])
            if isinstance(found, str):
                ignored[name] = found
            else:
                kept[name] = found
    return kept, ignored


def _attribute(column: pa.ChunkedArray) -> Attribute | str:
    """The column as an attribute, or why it is none."""
    if pa.types.is_nested(column.type) or pa.types.is_null(column.type):
        return f"of type {_kind(column.type)}"
    if pa.types.is_floating(column.type):  # NaN is no value, as null is none
        column = pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
    if _is_number(column.type) and pc.count_distinct(column).as_py() > 2 * QUARTERS:
        return _quarters(column.cast(pa.float64(), safe=False).to_numpy())
    codes, values = _codes(column)
    if len(values) < 2:
        return "constant"
    if len(values) > MAX_NAMES:
        return f"{len(values)} different values, more than {MAX_NAMES}"
    return Attribute(codes, tuple(str(value) for value in values.to_pylist()))


def _kind(kind: pa.DataType) -> str:
    """A type without the names of its fields, which may be texts."""
    return str(kind).partition("<")[0]


def _quarters(values: NDArray[np.float64]) -> Attribute | str:
    finite = values[np.isfinite(values)]
    if not len(finite):
        return "not a finite number in it"
    edges = np.unique(np.quantile(finite, np.arange(1, QUARTERS) / QUARTERS))
    codes = np.searchsorted(edges, values, side="left")
    told = _told_apart(edges.tolist())
    names = (f"<= {told[0]}", *map(" to ".join, itertools.pairwise(told)), f"> {told[-1]}")
    return Attribute(np.where(np.isfinite(values), codes, -1), names)


def _told_apart(numbers: Sequence[float]) -> list[str]:
    """Different numbers as texts that differ, of four digits each, or as many more as it takes."""
    for digits in range(4, 17):  # 17 tell any two apart
        texts = [f"{number:.{digits}g}" for number in numbers]
        if len({*texts}) == len(texts):
            return texts
    return [f"{number:.17g}" for number in numbers]
