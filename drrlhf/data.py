"""Preference pairs or prompts, from a file or a `datasets` name, checked row by row.

The format is TRL's: ``chosen`` and ``rejected``, with an explicit ``prompt`` or an implicit one
(both completions then start with it), every value a string (standard) or a list of ``{"role",
"content"}`` messages (conversational); a prompt that is a string beside whole conversations is that
of both. Messages may call tools, and the columns ``tools`` and ``chat_template_kwargs`` go to the
chat template. Optional columns are ``group`` (for `dr.Group`), ``margin`` (reward models),
``weight`` (the nominal weight of the pair) and ``p_chosen`` (the probability of its label), and
columns such as ``chosen@NAME`` hold other forms of a text. Prompts for GRPO need ``prompt`` alone;
``group`` and ``weight`` are the prompt's, and other columns are kept for the reward function.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import takewhile
from pathlib import Path
from typing import Any

import datasets

from drrlhf.files import tables
from drrlhf.files.tables import DataError, Row, Rows
from drrlhf.files.tables import short as _short
from drrlhf.groups import is_group, named, of_values, short
from drrlhf.transformations import BY_COLUMN, PROMPT, SIDES

logger = logging.getLogger(__name__)

REQUIRED = ("chosen", "rejected")
OPTIONAL = ("prompt", "group", "margin", "weight", "p_chosen")
# Columns of numbers: the least, the most, and the words for it.
NUMBERS = {
    "margin": (-math.inf, math.inf, "a finite number"),
    "weight": (0.0, math.inf, "a finite number >= 0"),
    "p_chosen": (0.0, 1.0, "a probability in [0, 1]"),
}
KINDS = ("reward", "dpo")
# Columns for the chat template, in rows that have them.
TEMPLATE = ("tools", "chat_template_kwargs")
# Other forms of a text, for `views`.
FORM = re.compile(rf"({'|'.join((*SIDES, PROMPT))}){BY_COLUMN}.+", re.DOTALL)
# What chat templates read of a message beside its role and content.
MESSAGE_FIELDS = {"tool_calls", "tool_call_id", "name", "reasoning_content", "thinking"}
# A list of messages that pandas or a spreadsheet turned into its printed form.
_WRITTEN_OUT = re.compile(r"""\s*\[\s*\{\s*['"](role|content)['"]\s*:""")
_ID = re.compile("(.*_)?id")  # of a prompt, and no number though it be of digits
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class PreferenceData:
    """Checked preference pairs.

    ``dataset`` holds ``chosen`` and ``rejected``, ``prompt`` where the source has one, and as the
    source has them ``group`` (int64 numbers), ``margin``, ``weight`` and ``p_chosen`` (floats),
    ``tools`` (JSON text, as TRL takes it) and ``chat_template_kwargs``, and other forms of texts,
    ``chosen@NAME`` and the like, None in rows that have none. ``group_names[i]`` is what the
    source calls group ``i``, and the column is a `datasets.ClassLabel` of these names; None when it
    has the numbers themselves or no groups. Messages with more than role and content are
    `datasets.Json`, which adds no keys.
    """

    dataset: datasets.Dataset
    group_names: list[str] | None = None

    def columns(self, names: Sequence[str]) -> dict[str, list[Any]]:
        """The values of columns; groups by what they are called."""
        found = {name: self.dataset[name][:] for name in names}
        if self.group_names is not None and "group" in found:
            found["group"] = [self.group_names[group] for group in found["group"]]
        return found


def load_preference_data(
    source: str | Path,
    *,
    split: str = "train",
    kind: str = "reward",
    group_names: Sequence[str] | None = None,
    new_groups: bool = False,
    keep_columns: bool = False,
) -> PreferenceData:
    """Read and check preference pairs.

    ``source`` is a ``.jsonl``, ``.json`` (lines or one array), ``.csv`` or ``.parquet`` file, a
    local data set folder, or a name that `datasets.load_dataset` knows; ``split`` belongs to the
    last two. Groups that are text, or integers other than 0 to G - 1, become their place among the
    sorted distinct ones, or in ``group_names`` when those are given (pass the training set's names
    when reading an evaluation set), to which ``new_groups=True`` adds. With ``kind="dpo"`` a
    ``margin`` column is left out. Other columns are left out with one logged line,
    or kept as they are with ``keep_columns=True``; of CSV, numbers where every cell is one, but for
    ids.

    Raises `DataError` naming file and line (row for Parquet and data sets) for whatever could not
    be trained on: a missing column or file, broken JSON, an empty completion, a wrong type, rows of
    mixed format, a bad group, margin or weight, an empty or unknown file.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    return preference_data_of(
        *open_rows(str(source), split),
        kind=kind,
        group_names=group_names,
        new_groups=new_groups,
        keep_columns=keep_columns,
    )


def preference_data_of(
    name: str,
    unit: str,
    rows: Rows,
    *,
    kind: str = "reward",
    group_names: Sequence[str] | None = None,
    new_groups: bool = False,
    keep_columns: bool = False,
) -> PreferenceData:
    """`load_preference_data` for rows that come with their numbers: errors name ``name`` and, as
    "``unit`` number", the row."""
    skip = {"margin"} if kind == "dpo" else set()
    columns = _Columns(name, unit, skip, keeps_more=keep_columns).read(rows)
    return columns.finish(group_names, new_groups)


def load_prompt_data(
    source: str | Path,
    *,
    split: str = "train",
    group_names: Sequence[str] | None = None,
    new_groups: bool = False,
) -> PreferenceData:
    """Read and check prompts for GRPO: as `load_preference_data`, with ``prompt`` (a string, or
    messages) in place of a pair, and with every other column kept as it is."""
    name, unit, rows = open_rows(str(source), split)
    columns = _Columns(name, unit, set(), ("prompt",), ("group", "weight"), keeps_more=True)
    if columns.read(rows).tools:
        logger.warning(
            "%s: column 'tools' goes to the reward function alone: GRPO writes prompts without it",
            name,
        )
    return columns.finish(group_names, new_groups)


# ---- where rows come from ------------------------------------------------------------------------


def open_rows(source: str, split: str) -> tuple[str, str, Rows]:
    """The name to print, what the rows' numbers count, and the rows with their numbers.

    Raises:
        DataError: neither a file nor a data set that could be loaded, or a split of a file.
    """
    path = Path(os.path.expanduser(source))
    is_file = path.is_file() or path.suffix.lower() in tables.SUFFIXES
    if path.is_dir() or (not is_file and _HUB_NAME.fullmatch(source)):
        return source, "row", _read_datasets(source, path, split)
    if not path.is_file():
        raise DataError(f"{source}: no such file; give the path of a data file or a data set name")
    if split != "train":
        raise DataError(
            f"{source}: split={split!r} was asked for, but a file holds one split only; "
            "leave split out and give each split its own file"
        )
    unit, rows = tables.rows(path)
    if tables.is_csv(path):
        rows = ((number, {key: _csv_value(key, row[key]) for key in row}) for number, row in rows)
    return source, unit, rows


def _csv_value(key: str, cell: str) -> Any:
    """In CSV every cell is text. Of ours that hold numbers, the number if it is one; an empty cell
    of these and of other columns is None."""
    if key in (*REQUIRED, "prompt"):
        return cell
    if not cell.strip():
        return None
    return _csv_number(cell) if key in NUMBERS else cell


def _csv_number(cell: str) -> Any:
    """The number that a cell holds; else its text."""
    if "_" not in cell:
        for number in (int, float):
            with contextlib.suppress(ValueError):
                return number(cell)
    return cell


def _loaded(source: str, path: Path, split: str) -> datasets.Dataset:
    alone = (path / "state.json").is_file()  # saved as it was, without splits
    try:
        if alone:
            data = datasets.load_from_disk(str(path))
        elif (path / "dataset_dict.json").is_file():
            data = datasets.load_from_disk(str(path))[split]
        else:
            data = datasets.load_dataset(str(path) if path.is_dir() else source, split=split)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{source}: neither a data file here nor a data set whose split {split!r} "
            f"could be loaded: {error}"
        ) from error
    if alone and split not in ("train", str(data.split)):
        raise DataError(
            f"{source}: split={split!r} was asked for, but what is saved there has no splits; "
            "leave split out and save each split by itself, or all as a DatasetDict"
        )
    return data


def _read_datasets(source: str, path: Path, split: str) -> Rows:
    data = _loaded(source, path, split)
    names = getattr(data.features.get("group"), "names", None)  # of a datasets.ClassLabel
    if "'Json'" in str(data.features.to_dict()):  # to Arrow, that is text
        rows: Rows = iter(enumerate(data, 1))
    else:
        rows = tables.rows_of(source, data.with_format("arrow").iter(1000))
    for number, row in rows:
        if names and row["group"] is not None:  # by its name, as in other sources
            code = row["group"]  # below 0 is what `datasets` calls no label
            row = row | {"group": names[code] if code >= 0 else None}
        yield number, row


# ---- what rows must hold -------------------------------------------------------------------------


@dataclass
class _Columns:
    """Checks rows one by one and collects the columns that are kept."""

    name: str
    unit: str
    skip: set[str]
    required: tuple[str, ...] = REQUIRED
    optional: tuple[str, ...] = OPTIONAL
    keeps_more: bool = False
    columns: dict[str, list[Any]] = field(default_factory=dict)
    more: dict[str, list[Any]] = field(default_factory=dict)
    numbers: list[int] = field(default_factory=list)
    template: dict[str, list[Any]] = field(default_factory=dict)
    in_full: set[str] = field(default_factory=set)  # columns of messages with more than text
    tools: bool = False
    left_out: set[str] = field(default_factory=set)
    skipped: set[str] = field(default_factory=set)
    conversational: bool = False
    identical: int = 0

    def where(self, number: int) -> str:
        return f"{self.name}: {self.unit} {number}"

    def error(self, number: int, message: str) -> DataError:
        return DataError(f"{self.where(number)}: {message}")

    def read(self, rows: Rows) -> _Columns:
        """All of the rows; itself."""
        for number, row in rows:
            self.add(number, row)
        return self

    def add(self, number: int, row: Row) -> None:
        if not isinstance(row, dict):
            wanted = f"expected an object with {' and '.join(self.required)}"
            raise self.error(number, f"{wanted}; got {_short(row)}")
        row = self.split_conversations(number, _decoded(row))
        # null and absent are one: that is what Parquet and data sets make of an absent value
        present = {key for key, value in row.items() if value is not None}
        self.skipped |= present & self.skip
        known = (*self.required, *self.optional)
        kept = [key for key in known if key in present and key not in self.skip]
        self.tools |= "tools" in present
        if self.required == REQUIRED:
            known = (*known, *TEMPLATE)
        self.check_columns(number, kept, row)
        self.numbers.append(number)
        self.add_template(number, row)
        more = {key: row[key] for key in row if key in present - {*known}}
        for key in kept:
            self.columns[key].append(self.check_value(number, key, row[key]))
        forms = {key for key in more if self.is_form(key)}
        if not self.keeps_more:
            self.left_out |= more.keys() - forms
            more = {key: more[key] for key in more if key in forms}
        for key in forms:
            more[key] = self.check_value(number, key, more[key])
        self.add_sparse(self.more, more)
        if "chosen" in kept:
            self.identical += self.columns["chosen"][-1] == self.columns["rejected"][-1]

    def is_form(self, key: str) -> bool:
        """Whether a column holds another form of a text that the rows have."""
        return FORM.fullmatch(key) is not None and key.partition(BY_COLUMN)[0] in (
            PROMPT,
            *self.required,
        )

    def split_conversations(self, number: int, row: Row) -> Row:
        """A prompt that is a string beside two whole conversations becomes the messages that both
        begin with, as TRL finds an implicit prompt."""
        prompt, chosen, rejected = (row.get(key) for key in ("prompt", "chosen", "rejected"))
        if not isinstance(chosen, list) or not isinstance(rejected, list):
            return row
        if not isinstance(prompt, str):
            return row
        shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected))))
        shared = min(shared, len(chosen) - 1, len(rejected) - 1)
        asked = (message["content"] for message in chosen[: max(shared, 0)] if _is_user(message))
        if prompt.strip() not in (content.strip() for content in asked):
            raise self.error(
                number,
                "'prompt' is a string beside messages, but 'chosen' and 'rejected' do not both "
                f"begin with it as a user's message; got {_short(prompt)}",
            )
        parts = {
            "prompt": chosen[:shared],
            "chosen": chosen[shared:],
            "rejected": rejected[shared:],
        }
        for name, form in row.items():
            if FORM.fullmatch(name) and not name.startswith("prompt") and form is not None:
                if not isinstance(form, list) or form[:shared] != chosen[:shared]:
                    raise self.error(number, f"{name!r} does not begin with the prompt of the row")
                parts[name] = form[shared:]
        return row | parts

    def add_template(self, number: int, row: Row) -> None:
        """The columns for the chat template; None in rows that lack one."""
        if self.required != REQUIRED:
            return
        checks = {"tools": self.check_tools, "chat_template_kwargs": self.check_template_kwargs}
        there = [key for key in checks if row.get(key) is not None]
        checked = {key: checks[key](number, row[key]) for key in there}
        given = {key: value for key, value in checked.items() if value is not None}
        if self.conversational:
            self.add_sparse(self.template, given)
        else:
            self.left_out |= {f"{key} (the rows are plain text)" for key in given}

    def check_tools(self, number: int, value: Any) -> str | None:
        found = _json(value) if isinstance(value, str) else self.without_nulls(value)
        if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
            wanted = "a list of tools' schemas, or that list as JSON text"
            raise self.error(number, f"'tools' must be {wanted}; got {_short(value)}")
        # JSON text: Arrow would give every schema the keys of all others.
        text = json.dumps(found, ensure_ascii=False)
        return self.check_unicode(number, "tools", text) if found else None

    def check_template_kwargs(self, number: int, value: Any) -> Row:
        found = _json(value) if isinstance(value, str) else self.without_nulls(value)
        if not isinstance(found, dict):
            wanted = "an object of arguments for the chat template"
            raise self.error(
                number, f"'chat_template_kwargs' must be {wanted}; got {_short(value)}"
            )
        return found

    def without_nulls(self, value: Any) -> Any:
        """What was written, where Arrow has given every object the keys of all others."""
        if self.unit != "row":
            return value
        if isinstance(value, dict):
            return {k: self.without_nulls(v) for k, v in value.items() if v is not None}
        return [self.without_nulls(v) for v in value] if isinstance(value, list) else value

    def add_sparse(self, columns: dict[str, list[Any]], row: Row) -> None:
        """A row of columns that a row may lack, which has None then."""
        for key in row:
            columns.setdefault(key, [None] * (len(self.numbers) - 1))
        for key, values in columns.items():
            values.append(row.get(key))

    def check_columns(self, number: int, kept: list[str], row: Row) -> None:
        missing = next((name for name in self.required if name not in kept), None)
        if missing is not None:
            found = ", ".join(sorted(key for key in row if row[key] is not None)) or "none"
            needed = f"{', '.join(self.required)} (optional: {', '.join(self.optional)})"
            raise self.error(
                number, f"missing column {missing!r}; found: {found}; needed: {needed}"
            )
        if not self.columns:
            self.columns = {key: [] for key in kept}
            self.conversational = not isinstance(row[self.required[0]], str)
        for name in sorted(set(kept) ^ set(self.columns)):
            first = f"{self.unit} {self.numbers[0]}"
            odd = f"there is a {name!r}, but not in" if name in kept else f"no {name!r}, but one in"
            raise self.error(number, f"{odd} {first}; give it in every row or in none")

    def check_value(self, number: int, key: str, value: Any) -> Any:
        if key == "group":
            return value  # checked at the end, when it is known whether groups are named
        if key in NUMBERS:
            return self.check_number(number, key, value)
        if isinstance(value, str) is self.conversational:
            first = "messages" if self.conversational else "a string"
            raise self.error(
                number,
                f"{key!r} is {_kind(value)}, but {self.required[0]!r} of {self.unit} "
                f"{self.numbers[0]} is "
                f"{first}; all rows and columns must have one format",
            )
        check = self.check_text if isinstance(value, str) else self.check_messages
        return check(number, key, value)

    def check_number(self, number: int, key: str, value: Any) -> float:
        low, high, wanted = NUMBERS[key]
        if not is_number(value) or not math.isfinite(value) or not low <= value <= high:
            raise self.error(number, f"{key!r} must be {wanted}; got {_short(value)}")
        return float(value)

    def check_text(self, number: int, key: str, value: str) -> str:
        if FORM.fullmatch(key) and not value.strip():
            raise self.error(number, f"{key!r} is empty; leave it out, or null")
        if key in self.required and not value.strip():
            what = "a completion" if key in REQUIRED else "a prompt"
            raise self.error(number, f"{key!r} is empty; {what} needs text: drop the row")
        if _WRITTEN_OUT.match(value):
            raise self.error(
                number,
                f"{key!r} is a conversation written out as text, {_short(value)}; keep it as a "
                "list of messages, in JSONL or Parquet",
            )
        return self.check_unicode(number, key, value)

    def check_messages(self, number: int, key: str, value: Any) -> list[Row]:
        if not isinstance(value, list):
            wanted = "a string or a list of messages"
            raise self.error(number, f"{key!r} must be {wanted}; got {_kind(value)}")
        messages = [self.check_message(number, key, message) for message in value]
        if not messages and key not in REQUIRED:
            raise self.error(number, f"{key!r} holds no message; give at least one")
        if key in REQUIRED and not any(
            message["role"] == "assistant"
            and (message.get("tool_calls") or (message["content"] or "").strip())
            for message in messages
        ):
            raise self.error(
                number,
                f"{key!r} is empty; a completion needs an assistant message with text or a call: "
                "drop the row",
            )
        if any(len(message) > 2 or message["content"] is None for message in messages):
            self.in_full.add(key)
        return messages

    def check_message(self, number: int, key: str, message: Any) -> Row:
        fields = message if isinstance(message, dict) else {}
        role, content, calls = (fields.get(name) for name in ("role", "content", "tool_calls"))
        if not isinstance(role, str) or not (isinstance(content, str) or (calls and not content)):
            wanted = "{'role': string, 'content': string}, content null beside tool_calls alone"
            raise self.error(
                number, f"{key!r}: every message must be {wanted}; got {_short(message)}"
            )
        if calls is not None and not isinstance(calls, list):
            raise self.error(number, f"{key!r}: tool_calls must be a list; got {_short(calls)}")
        given = {name for name, value in fields.items() if value is not None}
        more = {k: self.without_nulls(v) for k, v in fields.items() if k in given & MESSAGE_FIELDS}
        self.left_out |= {
            f"{name} (of messages)" for name in given - {"role", "content"} - MESSAGE_FIELDS
        }
        if more:
            self.check_unicode(number, key, json.dumps(more, ensure_ascii=False, default=str))
        text = content if content is None else self.check_unicode(number, key, content)
        return {"role": role, "content": text, **more}

    def check_unicode(self, number: int, key: str, text: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise self.error(number, f"{key!r} is not valid Unicode: {error.reason}") from error
        return text

    def finish(self, group_names: Sequence[str] | None, new_groups: bool) -> PreferenceData:
        if not self.numbers:
            raise DataError(f"{self.name}: empty; expected rows with {' and '.join(self.required)}")
        if "weight" in self.columns and not any(self.columns["weight"]):
            raise DataError(f"{self.name}: every 'weight' is 0: nothing to train on")
        names, types = None, {}
        if "group" in self.columns:
            names = self.number_groups(group_names, new_groups)
        if names is not None:
            types["group"] = datasets.ClassLabel(names=names)
        types |= {key: datasets.List(datasets.Json()) for key in self.in_full}
        types |= self.finish_template()
        self.log_what_was_left_out()
        columns = {
            key: values if key in types else tables.column(key, values, self.numbers, self.where)
            for key, values in (self.columns | self.more).items()
        }
        if self.required == REQUIRED and tables.is_csv(self.name):
            for key in self.more:
                if not self.is_form(key) and not _ID.fullmatch(key):
                    columns[key] = tables.named(columns[key])
        return PreferenceData(_dataset(columns, types), names)

    def finish_template(self) -> dict[str, Any]:
        """Puts the columns for the chat template among the others; their types."""
        for key, values in self.template.items():
            # TRL unpacks the arguments of every row, and None is no mapping.
            empty: Any = {} if key == "chat_template_kwargs" else None
            self.columns[key] = [empty if value is None else value for value in values]
        types = {"tools": datasets.Value("string"), "chat_template_kwargs": datasets.Json()}
        return {key: types[key] for key in self.template}

    def number_groups(self, names: Sequence[str] | None, new_groups: bool) -> list[str] | None:
        """Replaces the groups by their numbers; their names, None where these are the numbers."""
        values = self.columns["group"]
        if tables.is_csv(self.name):
            values = _csv_groups(values)
        text = isinstance(values[0], str)
        for number, value in zip(self.numbers, values, strict=True):
            if isinstance(value, str) is not text or not is_group(value):
                wanted = "a name, as it is in other rows"
                wanted = wanted if text else "an integer from 0 up (or a name, in every row)"
                raise self.error(number, f"'group' must be {wanted}; got {_short(value)}")
        groups = of_values(values)
        if names is not None:
            found = [groups.label(number) for number in range(groups.count)]
            new = [name for name in found if name not in names]
            for number, value in zip(self.numbers, values, strict=True):
                name = value if text else str(int(value))
                if name in new and not new_groups:
                    raise self.error(
                        number, f"'group' must be one of {short(names)}; got {_short(value)}"
                    )
            groups = named([*names, *new])
        self.columns["group"] = [groups.number(value) for value in values]
        return None if groups.names is None else list(groups.names)

    def log_what_was_left_out(self) -> None:
        if self.left_out:
            logger.warning("%s: columns left out: %s", self.name, ", ".join(sorted(self.left_out)))
        if self.skipped:
            logger.warning("%s: column 'margin' left out: DPO does not use a margin", self.name)
        if self.identical:
            logger.warning(
                "%s: in %d of %d rows 'chosen' equals 'rejected': they teach no preference",
                self.name,
                self.identical,
                len(self.numbers),
            )


def _dataset(columns: dict[str, list[Any]], types: dict[str, Any]) -> datasets.Dataset:
    """The columns as a data set; those in ``types`` of that type, the others of Arrow's choice."""
    chosen = {key: values for key, values in columns.items() if key not in types}
    parts = [datasets.Dataset.from_dict(chosen)] if chosen else []
    if types:
        typed = {key: columns[key] for key in types}
        parts.append(datasets.Dataset.from_dict(typed, features=datasets.Features(types)))
    return datasets.concatenate_datasets(parts, axis=1).select_columns(list(columns))


def _decoded(row: Row) -> Row:
    """The row with messages that `datasets.Json` keeps as text read."""
    found = {
        key: [_json(message) if isinstance(message, str) else message for message in row[key]]
        for key in row
        if (key in (*REQUIRED, "prompt") or FORM.fullmatch(key)) and isinstance(row[key], list)
    }
    return row | found


def _json(text: str) -> Any:
    """What JSON text says; of text that is none, the text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _is_user(message: Any) -> bool:
    is_message = isinstance(message, dict) and isinstance(message.get("content"), str)
    return is_message and message.get("role") == "user"


def _csv_groups(cells: list[str]) -> list[Any]:
    """Cells of groups: numbers where every cell is one, as a spreadsheet writes it; else names,
    without the spaces around them, which nobody sees there.

    A number that begins with 0, as postal codes do, is a name.
    """
    names = [cell.strip() for cell in cells]
    typed = [_csv_group(name) for name in names]
    return names if any(isinstance(value, str) for value in typed) else typed


def _csv_group(cell: str) -> Any:
    if re.fullmatch(r"(0|[1-9][0-9]*)(\.0*)?", cell):
        return int(cell.partition(".")[0])
    return cell if re.fullmatch(r"0[0-9]+", cell) else _csv_number(cell)


def is_number(value: Any) -> bool:
    """Whether it is a number that a double holds, if not always exactly; NaN and infinite too."""
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) <= sys.float_info.max
    return isinstance(value, (float, Decimal))  # databases export decimals


def _kind(value: Any) -> str:
    kinds = {"str": "a string", "list": "a list"}
    return kinds.get(type(value).__name__, f"of type {type(value).__name__}")
