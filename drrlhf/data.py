"""Preference pairs or prompts, from a file or a `datasets` name, checked row by row.

The format is TRL's: ``chosen`` and ``rejected``, with an explicit ``prompt`` or an implicit one
(both completions then start with it), every value a string (standard) or a list of ``{"role",
"content"}`` messages (conversational). Three optional columns are ours: ``group`` (for `dr.Group`),
``margin`` (reward models) and ``weight`` (the nominal weight of the pair). Prompts for GRPO need
``prompt`` alone; ``group`` and ``weight`` are the prompt's, and other columns are kept for the
reward function.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets

from drrlhf import files
from drrlhf.files import DataError, Row, Rows
from drrlhf.files import short as _short

logger = logging.getLogger(__name__)

REQUIRED = ("chosen", "rejected")
OPTIONAL = ("prompt", "group", "margin", "weight")
PROMPT_REQUIRED, PROMPT_OPTIONAL = ("prompt",), ("group", "weight")
KINDS = ("reward", "dpo")
# A list of messages that pandas or a spreadsheet turned into its printed form.
_WRITTEN_OUT = re.compile(r"""\s*\[\s*\{\s*['"](role|content)['"]\s*:""")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class PreferenceData:
    """Checked preference pairs.

    ``dataset`` holds ``chosen`` and ``rejected``, ``prompt`` where the source has one, and as the
    source has them ``group`` (int64 ids), ``margin`` and ``weight`` (floats). ``group_names[i]`` is
    the name of group ``i`` when the source names its groups; None when it has integers or no
    groups.
    """

    dataset: datasets.Dataset
    group_names: list[str] | None = None


def load_preference_data(
    source: str | Path,
    *,
    split: str = "train",
    kind: str = "reward",
    group_names: Sequence[str] | None = None,
    keep_columns: bool = False,
) -> PreferenceData:
    """Read and check preference pairs.

    ``source`` is a ``.jsonl``, ``.json`` (lines or one array), ``.csv`` or ``.parquet`` file, a
    local data set folder, or a name that `datasets.load_dataset` knows; ``split`` belongs to the
    last two. String groups become their index in the sorted names, or in ``group_names`` when those
    are given (pass the training set's names when reading an evaluation set). With ``kind="dpo"`` a
    ``margin`` column is left out. Other columns are left out with one logged line,
    or kept as they are with ``keep_columns=True``.

    Raises `DataError` naming file and line (row for Parquet and data sets) for whatever could not
    be trained on: a missing column or file, broken JSON, an empty completion, a wrong type, rows of
    mixed format, a bad group, margin or weight, an empty or unknown file.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    name, unit, rows = _open(str(source), split)
    columns = _Columns(
        name, unit, skip={"margin"} if kind == "dpo" else set(), keeps_more=keep_columns
    )
    for number, row in rows:
        columns.add(number, row)
    return columns.finish(group_names)


def load_prompt_data(
    source: str | Path, *, split: str = "train", group_names: Sequence[str] | None = None
) -> PreferenceData:
    """Read and check prompts for GRPO: as `load_preference_data`, with ``prompt`` (a string, or
    messages) in place of a pair, and with every other column kept as it is."""
    name, unit, rows = _open(str(source), split)
    columns = _Columns(
        name, unit, set(), required=PROMPT_REQUIRED, optional=PROMPT_OPTIONAL, keeps_more=True
    )
    for number, row in rows:
        columns.add(number, row)
    return columns.finish(group_names)


# ---- where rows come from ------------------------------------------------------------------------


def _open(source: str, split: str) -> tuple[str, str, Rows]:
    """The name to print, what the rows' numbers count, and the rows with their numbers."""
    path = Path(source).expanduser()
    is_file = path.is_file() or path.suffix.lower() in files.SUFFIXES
    if path.is_dir() or (not is_file and _HUB_NAME.fullmatch(source)):
        return source, "row", _read_datasets(source, path, split)
    if not path.is_file():
        raise DataError(f"{source}: no such file; give the path of a data file or a data set name")
    if split != "train":
        raise DataError(
            f"{source}: split={split!r} was asked for, but a file holds one split only; "
            "leave split out and give each split its own file"
        )
    unit, rows = files.rows(path)
    if path.suffix.lower() == ".csv":
        rows = ((number, {key: _csv_value(key, row[key]) for key in row}) for number, row in rows)
    return source, unit, rows


def _csv_value(key: str, cell: str) -> Any:
    """In CSV every cell is text. Of ours that hold numbers, the number if it is one; an empty cell
    of these and of other columns is None."""
    if key in (*REQUIRED, "prompt"):
        return cell
    if not cell.strip():
        return None
    if key in ("group", "margin", "weight") and "_" not in cell:
        for number in (int, float):
            with contextlib.suppress(ValueError):
                return number(cell)
    return cell


def _read_datasets(source: str, path: Path, split: str) -> Rows:
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            data = datasets.load_from_disk(str(path))
            data = data[split] if isinstance(data, datasets.DatasetDict) else data
        else:
            data = datasets.load_dataset(source, split=split)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{source}: neither a data file here nor a data set whose split {split!r} "
            f"could be loaded: {error}"
        ) from error
    yield from files.rows_of(source, data.with_format("arrow").iter(1000))


# ---- what rows must hold -------------------------------------------------------------------------


def _missing_column(
    where: str, found: Sequence[str], required: Sequence[str], optional: Sequence[str]
) -> DataError:
    missing = next(name for name in required if name not in found)
    return DataError(
        f"{where}: missing column {missing!r}; found: {', '.join(sorted(found)) or 'none'}; "
        f"needed: {', '.join(required)} (optional: {', '.join(optional)})"
    )


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
    left_out: set[str] = field(default_factory=set)
    skipped: set[str] = field(default_factory=set)
    conversational: bool = False
    identical: int = 0

    def where(self, number: int) -> str:
        return f"{self.name}: {self.unit} {number}"

    def error(self, number: int, message: str) -> DataError:
        return DataError(f"{self.where(number)}: {message}")

    def add(self, number: int, row: Row) -> None:
        if not isinstance(row, dict):
            wanted = f"expected an object with {' and '.join(self.required)}"
            raise self.error(number, f"{wanted}; got {_short(row)}")
        # null and absent are one: that is what Parquet and data sets make of an absent value
        present = {key for key, value in row.items() if value is not None}
        self.skipped |= present & self.skip
        known = (*self.required, *self.optional)
        kept = [key for key in known if key in present and key not in self.skip]
        self.check_columns(number, kept, row)
        self.numbers.append(number)
        if self.keeps_more:
            self.add_more({key: row[key] for key in row if key in present - {*known}})
        else:
            self.left_out |= present - {*known}
        for key in kept:
            self.columns[key].append(self.check_value(number, key, row[key]))
        if "chosen" in kept:
            self.identical += self.columns["chosen"][-1] == self.columns["rejected"][-1]

    def add_more(self, row: Row) -> None:
        """Columns of the user's own; None in rows that lack one."""
        for key in row:
            self.more.setdefault(key, [None] * (len(self.numbers) - 1))
        for key, values in self.more.items():
            values.append(row.get(key))

    def check_columns(self, number: int, kept: list[str], row: Row) -> None:
        if not set(self.required) <= set(kept):
            present = [key for key in row if row[key] is not None]
            raise _missing_column(self.where(number), present, self.required, self.optional)
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
        if key in ("margin", "weight"):
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
        if not _is_number(value) or not math.isfinite(value) or (key == "weight" and value < 0):
            wanted = "a finite number >= 0" if key == "weight" else "a finite number"
            raise self.error(number, f"{key!r} must be {wanted}; got {_short(value)}")
        return float(value)

    def check_text(self, number: int, key: str, value: str) -> str:
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
            message["role"] == "assistant" and message["content"].strip() for message in messages
        ):
            raise self.error(
                number,
                f"{key!r} is empty; a completion needs an assistant message with text: "
                "drop the row",
            )
        return messages

    def check_message(self, number: int, key: str, message: Any) -> Row:
        fields = message if isinstance(message, dict) else {}
        role, content = fields.get("role"), fields.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            wanted = "{'role': string, 'content': string}"
            raise self.error(
                number, f"{key!r}: every message must be {wanted}; got {_short(message)}"
            )
        if len(fields) > 2:
            more = {name for name, value in fields.items() if value is not None}
            self.left_out |= {f"{name} (of messages)" for name in more - {"role", "content"}}
        return {"role": role, "content": self.check_unicode(number, key, content)}

    def check_unicode(self, number: int, key: str, text: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise self.error(number, f"{key!r} is not valid Unicode: {error.reason}") from error
        return text

    def finish(self, group_names: Sequence[str] | None) -> PreferenceData:
        if not self.numbers:
            raise DataError(f"{self.name}: empty; expected rows with {' and '.join(self.required)}")
        if "weight" in self.columns and not any(self.columns["weight"]):
            raise DataError(f"{self.name}: every 'weight' is 0: nothing to train on")
        names = None
        if "group" in self.columns:
            if group_names is not None or isinstance(self.columns["group"][0], str):
                names = self.name_groups(group_names)
            else:
                self.number_groups()
        self.log_what_was_left_out()
        typed = {
            key: files.column(key, values, self.numbers, self.where)
            for key, values in (self.columns | self.more).items()
        }
        return PreferenceData(datasets.Dataset.from_dict(typed), names)

    def name_groups(self, names: Sequence[str] | None) -> list[str]:
        groups = list(zip(self.numbers, self.columns["group"], strict=True))
        for number, value in groups:
            if not isinstance(value, str) or not value.strip():
                wanted = "a name, as it is in other rows" if names is None else "a name"
                raise self.error(number, f"'group' must be {wanted}; got {_short(value)}")
            if names is not None and value not in names:
                raise self.error(
                    number, f"'group' must be one of {', '.join(names)}; got {_short(value)}"
                )
        found = sorted({value for _, value in groups}) if names is None else list(names)
        index = {name: i for i, name in enumerate(found)}
        self.columns["group"] = [index[value] for _, value in groups]
        return found

    def number_groups(self) -> None:
        for number, value in zip(self.numbers, self.columns["group"], strict=True):
            if not _is_number(value) or not float(value).is_integer() or value < 0:
                wanted = "an integer from 0 up (or a name, in every row)"
                raise self.error(number, f"'group' must be {wanted}; got {_short(value)}")
        self.columns["group"] = [int(value) for value in self.columns["group"]]

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


def _is_number(value: Any) -> bool:
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) <= sys.float_info.max
    return isinstance(value, float)


def _kind(value: Any) -> str:
    kinds = {"str": "a string", "list": "a list"}
    return kinds.get(type(value).__name__, f"of type {type(value).__name__}")
