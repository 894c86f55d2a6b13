"""Preference pairs of the benchmarks of the field, read from their files as they are published.

====================  ============================================================================
plain pairs           prompt, chosen, rejected: what `drrlhf.data.load_preference_data` reads
RewardBench           plain pairs with chosen_model, rejected_model, subset, id (arXiv 2403.13787)
RewardBench 2         lists ``chosen`` and ``rejected``, num_correct, subset (arXiv 2506.01937)
RM-Bench              three styles each of ``chosen`` and ``rejected``, domain (arXiv 2410.16184)
JudgeBench            question, response_A, response_B, label "A>B" or "B>A" (arXiv 2410.12784)
HHH                   input, targets {choices, labels}, or target_scores {text: 0 or 1}, in lines
                      or as the "examples" of a BIG-bench task (arXiv 2112.00861)
====================  ============================================================================

Where a prompt has several right and wrong answers, each right one with each wrong one is a pair.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drrlhf.data import PreferenceData, open_rows, preference_data_of
from drrlhf.files.tables import DataError, Row, Rows, short
from drrlhf.stress.answers import ANSWERS, CANDIDATES, STYLED, STYLES, prompt_id

logger = logging.getLogger(__name__)

IDS = ("prompt_id", "pair_id", "id")
LABELS = {"A>B": 0, "B>A": 1}
COUNTS = ("num_correct", "num_incorrect", "total_completions")
_SIDES = ("chosen", "rejected")
SCALARS = (str, int, float, bool)
_PLAIN = "give every pair as a row with prompt, chosen and rejected"

Complain = Callable[[str], DataError]


@dataclass(frozen=True)
class _Form:
    """A benchmark: the columns that each of its rows must have, of which the first is the prompt's
    text, those that its pairs are made of, and how."""

    name: str
    needed: tuple[str, ...]
    used: tuple[str, ...]
    pairs: Callable[[Row, Complain], Iterator[Row]]


def read_pairs(source: str | Path, split: str = "train") -> PreferenceData:
    """Read the pairs of a file or data set, whichever of the formats above it has.

    The first row decides on the format, and all others are held to it. Plain pairs and RewardBench
    have rows of pairs already, which stay as they are. Rows of the other formats become pairs with

    - ``prompt``, ``chosen``, ``rejected``: strings;
    - ``prompt_id``: the file's ``prompt_id``, ``pair_id`` or ``id`` as text, "row 7" where there is
      none; where an earlier row has the same one, "ID (row 7)";
    - ``chosen_answer``, ``rejected_answer``: which answers of the prompt they are, counted from 0:
      the right ones before the wrong ones, as JudgeBench's A and B, as HHH's choices;
    - ``chosen_style``, ``rejected_style`` in RM-Bench: "concise", "detailed" (plain text) or
      "markdown" (detailed, in Markdown);
    - ``chosen_position`` in JudgeBench: "first" or "second";
    - every other column that holds text, numbers, or true and false. Others are left out, with one
      logged line.

    Args:
        source: a file or data set, as `drrlhf.data.load_preference_data` takes it.
        split: of a data set; RewardBench 2 calls its own "test".

    Raises:
        DataError: the format is none of these, a row is not of the format of the first, lists of
            candidates with a gold score (`load_candidates` reads those), and what
            `drrlhf.data.load_preference_data` refuses; it names the file and the row.
    """
    name, unit, rows = open_rows(str(source), split)
    first = next(rows, None)
    if first is None:
        return preference_data_of(name, unit, iter(()), keep_columns=True)
    rows = itertools.chain([first], rows)
    if _is_task(first[1]):
        unit, rows = "example", iter(enumerate(first[1]["examples"], 1))
        first = (1, first[1]["examples"][0])
    form = _form(first[1], lambda message: DataError(f"{name}: {unit} {first[0]}: {message}"))
    if form is None:
        return preference_data_of(name, unit, rows, keep_columns=True)
    # Not the line: an array of JSON may stand in one.
    unit = unit if unit == "example" else "row"
    left_out: set[str] = set()
    pairs = _expanded(rows, form, name, unit, left_out)
    loaded = preference_data_of(name, unit, pairs, keep_columns=True)
    if left_out:
        logger.warning("%s: columns left out: %s", name, ", ".join(sorted(left_out)))
    return loaded


def _expanded(rows: Rows, form: _Form, name: str, unit: str, left_out: set[str]) -> Rows:
    """The pairs of rows of a benchmark, each with the number of its row; ``left_out`` is given the
    columns that no attribute can be made of."""
    ids: set[str] = set()
    for number, (_, row) in enumerate(rows, 1):

        def complain(message: str, number: int = number) -> DataError:
            return DataError(f"{name}: {unit} {number}: not as {form.name} has it: {message}")

        _check_row(row, form, complain)
        key = next((one for one in IDS if row.get(one) is not None), None)
        more = {"prompt": row[form.needed[0]]}
        more["prompt_id"] = prompt_id(row.get(key or ""), f"{unit} {number}", ids)
        for column, value in row.items():
            if column in (*more, key, *form.used):
                continue
            if value is None or isinstance(value, SCALARS):
                more[column] = value
            else:
                left_out.add(column)
        for pair in form.pairs(row, complain):
            yield number, more | pair


# ---- which format it is --------------------------------------------------------------------------


def _form(row: Any, complain: Complain) -> _Form | None:
    """The benchmark that a first row is of; None for plain pairs, and for what `drrlhf.data` has
    the better message for."""
    if not isinstance(row, dict):
        return None
    there = {name for name, value in row.items() if value is not None}
    if there & {*_SIDES}:
        return _form_of_lists(row, there, complain) if _has_texts(row) else None
    if len(there & {*JUDGE_BENCH.needed}) > 1:
        return JUDGE_BENCH
    if there & {"targets", "target_scores"}:
        return HHH
    found = ", ".join(sorted(there)) or "none"
    lists = [name for name in CANDIDATES if isinstance(row.get(name), list)]
    if lists:
        raise complain(
            f"expected pairs of answers, got lists of candidates in {lists[0]!r}, of which every "
            "two would be a pair; read them with drrlhf.stress.load_candidates, for best of n"
        )
    known = "; ".join(
        f"{form.name} ({', '.join(form.needed)})"
        for form in (REWARD_BENCH_2, RM_BENCH, JUDGE_BENCH, HHH)
    )
    raise complain(
        f"expected the columns of pairs (chosen, rejected; prompt) or of {known}; found: {found}; "
        f"rename them, or {_PLAIN}"
    )


def _form_of_lists(row: Row, there: set[str], complain: Complain) -> _Form:
    if there & {*COUNTS}:
        return REWARD_BENCH_2
    if "domain" in there:
        return RM_BENCH
    if "subset" in there:
        return REWARD_BENCH_2
    found = ", ".join(sorted(there))
    raise complain(
        "'chosen' and 'rejected' hold lists of answers; expected them beside num_correct and "
        f"subset (RewardBench 2) or beside domain (RM-Bench); found: {found}; name these columns "
        f"so, or {_PLAIN}"
    )


def _has_texts(row: Row) -> bool:
    """Whether chosen or rejected is a list of answers, and not one of messages."""
    lists = [row[side] for side in _SIDES if isinstance(row.get(side), list)]
    return any(one and not all(map(_is_message, one)) for one in lists)


def _is_message(value: Any) -> bool:
    if isinstance(value, str) and value.startswith("{"):  # as `datasets.Json` keeps it
        try:
            value = json.loads(value)
        except ValueError:
            return False
    return isinstance(value, dict)


def _is_task(row: Any) -> bool:
    """Whether it is a task file of BIG-bench, whose examples are the rows."""
    examples = row.get("examples") if isinstance(row, dict) else None
    return isinstance(examples, list) and bool(examples) and "input" not in row


def _check_row(row: Any, form: _Form, complain: Complain) -> None:
    if not isinstance(row, dict):
        raise complain(f"expected an object with {', '.join(form.needed)}; got {short(row)}")
    there = {name for name, value in row.items() if value is not None}
    missing = next((name for name in form.needed if name not in there), None)
    if missing is not None:
        raise complain(
            f"missing {missing!r}; expected {', '.join(form.needed)}; found: "
            f"{', '.join(sorted(there)) or 'none'}; rename the column, or drop the row"
        )


# ---- pairs of a row ------------------------------------------------------------------------------


def _every_pair(texts: Sequence[str], right: Sequence[int]) -> Iterator[Row]:
    """Each answer that is right with each that is not; ``right`` are their places."""
    wrong = [place for place in range(len(texts)) if place not in right]
    for places in itertools.product(right, wrong):
        chosen, rejected = (texts[place] for place in places)
        yield {"chosen": chosen, "rejected": rejected, **dict(zip(ANSWERS, places, strict=True))}


def _texts(row: Row, name: str, complain: Complain) -> list[str]:
    value = row[name]
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value) or not value:
        raise complain(
            f"{name!r} must be a list of at least one string; got {short(value)}; "
            "mend or drop the row"
        )
    return value


def _reward_bench_2(row: Row, complain: Complain) -> Iterator[Row]:
    right, wrong = (_texts(row, side, complain) for side in _SIDES)
    sizes = (len(right), len(wrong), len(right) + len(wrong))
    for name, size in zip(COUNTS, sizes, strict=True):
        said = row.get(name)
        if said is not None and (isinstance(said, bool) or said != size):
            raise complain(
                f"{name!r} is {short(said)}, but there are {sizes[0]} chosen and {sizes[1]} "
                f"rejected answers; expected {size}; mend the number or the lists"
            )
    return _every_pair([*right, *wrong], range(len(right)))


def _rm_bench(row: Row, complain: Complain) -> Iterator[Row]:
    right, wrong = (_texts(row, side, complain) for side in _SIDES)
    for name, texts in zip(_SIDES, (right, wrong), strict=True):
        if len(texts) != len(STYLES):
            raise complain(
                f"{name!r} holds {len(texts)} answers; expected {len(STYLES)}, one of each style: "
                f"{', '.join(STYLES)}; mend or drop the row"
            )
    pairs = _every_pair([*right, *wrong], range(len(STYLES)))
    for pair, both in zip(pairs, itertools.product(STYLES, STYLES), strict=True):
        yield pair | dict(zip(STYLED, both, strict=True))


def _judge_bench(row: Row, complain: Complain) -> Iterator[Row]:
    label = row["label"]
    if not isinstance(label, str) or label not in LABELS:
        raise complain(
            f"'label' must be one of {', '.join(map(repr, LABELS))}; got {short(label)}; "
            "drop the rows that prefer neither answer"
        )
    answers = [row["response_A"], row["response_B"]]
    if not all(isinstance(one, str) for one in answers):
        raise complain(f"'response_A' and 'response_B' must be strings; got {short(answers)}")
    chosen = LABELS[label]
    (pair,) = _every_pair(answers, [chosen])
    yield pair | {"chosen_position": "second" if chosen else "first"}


def _hhh(row: Row, complain: Complain) -> Iterator[Row]:
    texts, labels = _choices(row, complain)
    if not all(isinstance(one, SCALARS) and one in (0, 1) for one in labels):
        raise complain(f"labels must be 1 (right) or 0 (wrong); got {short(labels)}; mend the row")
    if not {0, 1} <= {*labels}:
        raise complain(
            f"expected at least one right (1) and one wrong (0) answer; got labels {short(labels)};"
            " drop the row"
        )
    return _every_pair(texts, [place for place, label in enumerate(labels) if label])


def _choices(row: Row, complain: Complain) -> tuple[list[str], list[Any]]:
    """The answers and their labels."""
    targets, by_text = row.get("targets"), row.get("target_scores")
    if targets is None and by_text is None:
        raise complain("missing 'targets' (or 'target_scores'); rename the column or drop the row")
    if targets is None:
        name, given, wanted = "target_scores", by_text, "{text: 1 or 0, ...}"
        # Parquet gives every row the texts of all others, with null for a score.
        scores = by_text if isinstance(by_text, dict) else {}
        known = {text: one for text, one in scores.items() if one is not None}
        texts, labels = list(known), list(known.values())
    else:
        name, given = "targets", targets
        wanted = "{'choices': [text, ...], 'labels': [1 or 0, ...]}, as many of both"
        fields = targets if isinstance(targets, dict) else {}
        texts, labels = (fields.get(key) or [] for key in ("choices", "labels"))
    lists = isinstance(texts, list) and isinstance(labels, list)
    if not lists or not texts or len(texts) != len(labels):
        raise complain(f"{name!r} must be {wanted}; got {short(given)}; mend or drop the row")
    if not all(isinstance(one, str) for one in texts):
        raise complain(f"{name!r} must hold answers as strings; got {short(texts)}; mend the row")
    return texts, labels


REWARD_BENCH_2 = _Form(
    "RewardBench 2",
    ("prompt", "chosen", "rejected", "num_correct"),
    (*_SIDES, *COUNTS),
    _reward_bench_2,
)
RM_BENCH = _Form("RM-Bench", ("prompt", "chosen", "rejected", "domain"), _SIDES, _rm_bench)
_JUDGED = ("question", "response_A", "response_B", "label")
JUDGE_BENCH = _Form("JudgeBench", _JUDGED, _JUDGED, _judge_bench)
HHH = _Form("HHH", ("input",), ("input", "targets", "target_scores"), _hhh)
