"""Files of rows, JSONL, JSON, CSV and Parquet, read by the same rules for every command.

`rows` yields rows one by one with the line or row that each stands in; `table` holds the columns of
a whole file, each of one type. Whatever a library raises while it reads becomes a `DataError`.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
BLOCK = 2048  # rows that are Python objects at a time
_SPACE = re.compile(r"\s*")
# What stands for a missing number in a CSV file, beside nothing at all.
_NO_NUMBER = ("", "NA", "N/A", "#N/A", "NULL", "null", "NaN", "nan", "None")

Row = dict[str, Any]
Rows = Iterator[tuple[int, Any]]
# What json raises, also on an integer of 5000 digits or a list 5000 levels deep.
_DECODER = json.JSONDecoder()
_NOT_JSON = (ValueError, RecursionError)
# What pyarrow raises on values that no column can hold.
_UNFIT = (pa.ArrowException, OverflowError, UnicodeEncodeError)


class DataError(ValueError):
    """Data that cannot be used; the message names the file and, where there is one, the row."""


def rows(path: Path) -> tuple[str, Rows]:
    """What the numbers count, "line" or "row", and each row with its number, from 1 up.

    A row is what the file has there: of JSON any value, of CSV {column: text}, of Parquet {column:
    value}. A ``.json`` file holds lines, one array, or one object of columns, the lists in which
    are equally long and whose other values belong to every row.

    Raises:
        DataError: no such file, an unknown suffix, and, while rows are read, whatever is broken.
    """
    suffix = _suffix(path)
    if suffix == ".json" and not _is_lines(path):
        return _document(path)
    if suffix == ".parquet":
        return "row", _parquet_rows(path)
    return "line", _csv_rows(path) if is_csv(path) else _lines(path)


def is_csv(source: str | Path) -> bool:
    """Whether every cell is text, which may turn out to be a number."""
    return Path(source).suffix.lower() == ".csv" and not Path(source).is_dir()


def table(path: Path, measured: Sequence[str] = (), spared: Mapping[str, str] = {}) -> pa.Table:
    """The columns of a file, each of one type; null where a row has no such column.

    Numbers and names in one column are names, as are integers beyond 64 bits. Columns of CSV are
    numbers, or true and false, where every cell is one, by the rules of `named`; an empty cell is
    null. Texts may be most of a file: of a column in ``measured`` that holds text there may be only
    NAME_length, in characters (unless the file has all such lengths), and a column in ``spared`` is
    left out where the column that it maps to is there.

    Raises:
        DataError: as `rows`, and for text that is not valid Unicode.
    """
    if _suffix(path) == ".parquet":
        return _parquet_table(path, measured, spared)
    unit, found = rows(path)
    csv_cells = is_csv(path)
    made = _table_of_rows(
        lambda number: f"{path}: {unit} {number}", found, () if csv_cells else measured, spared
    )
    if csv_cells:
        made = pa.table(
            {
                name: typed(cells) if name in measured else named(cells)
                for name, cells in zip(made.column_names, made.columns, strict=True)
            }
        )
    return made


def array(values: Sequence[Any]) -> pa.Array:
    """`pyarrow.array`, also of integers from 2**63 to 2**64 - 1."""
    try:
        return pa.array(values)
    except OverflowError:
        return pa.array(values, pa.uint64())


def column(
    name: str, values: Sequence[Any], numbers: Sequence[int], where: Callable[[int], str]
) -> pa.Array:
    """``values`` as a column of the one type that holds them all; ``where(numbers[i])`` says where
    value i stands.

    Raises:
        DataError: no type does: it names the first value that does not go with those before it.
    """
    try:
        return array(values)
    except _UNFIT as error:
        raise _unfit(name, values, numbers, where, error) from error


def rows_of(source: str, batches: Iterable[pa.RecordBatch | pa.Table]) -> Rows:
    """The rows of batches, numbered from 1.

    Raises:
        DataError: a value that has no Python object, such as a time in nanoseconds.
    """
    number = 0
    for batch in batches:
        try:
            found = batch.to_pylist()
        except (*_UNFIT, ValueError) as error:
            raise _unreadable(source, number, batch, error) from error
        for row in found:
            number += 1
            yield number, row


def short(value: Any, limit: int = 60) -> str:
    """A value as it is quoted in a message."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    if path.is_dir():
        raise DataError(f"{path}: expected a file, got a directory")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if suffix not in SUFFIXES:
        known = ", ".join(SUFFIXES)
        raise DataError(f"{path}: unknown suffix {path.suffix!r}; expected one of {known}")
    return suffix


# ---- JSON ----------------------------------------------------------------------------------------


def _lines(path: Path) -> Rows:
    # Bytes, split at \n alone: U+2028 and its like inside a string must not shift the line numbers.
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _json(path, number, line)


def _json(path: Path, number: int, line: bytes) -> Any:
    text = _decode(path, number, line)
    try:
        # A third of the time of `json.loads` on a short line, which is left what is not plain.
        if text.startswith("{"):
            value, end = _DECODER.raw_decode(text)
            if end == len(text.rstrip(" \t\r\n")):
                return value
        return json.loads(text)
    except _NOT_JSON as error:
        raise _broken_json(path, number, error) from error


def _broken_json(path: Path, line: int, error: Exception) -> DataError:
    what = (
        f"{error.msg} (column {error.colno})" if isinstance(error, json.JSONDecodeError) else error
    )
    return DataError(f"{path}: line {line}: broken JSON: {what}")


def _decode(path: Path, number: int, data: bytes) -> str:
    try:
        return data.decode().removeprefix("\ufeff")  # four times as fast as utf-8-sig
    except UnicodeDecodeError as error:
        line = number + data.count(b"\n", 0, error.start)
        raise DataError(
            f"{path}: line {line}: not UTF-8 ({error.reason}); save the file as UTF-8"
        ) from error


def _is_lines(path: Path) -> bool:
    """Whether a ``.json`` file is lines: its first one is an object, and another follows."""
    with path.open("rb") as file:
        full = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        number, first = next(full, (1, b""))
        try:
            return b"{" in first[:8] and isinstance(_json(path, number, first), dict) and any(full)
        except DataError:
            return False  # a line of something longer, in which the mistake will be found


def _document(path: Path) -> tuple[str, Rows]:
    text = _decode(path, 1, path.read_bytes())
    if not text.strip():
        return "line", iter(())
    at = _after_space(text, 0)
    if text.startswith("[", at):
        return "line", _array_rows(path, text, at + 1)
    try:
        whole = json.loads(text)
    except _NOT_JSON as error:
        raise _broken_json(path, getattr(error, "lineno", 1), error) from error
    if isinstance(whole, dict) and _holds_columns(whole, text):
        return "row", _rows_of_columns(whole)
    return "line", iter([(1 + text.count("\n", 0, at), whole)])


def _array_rows(path: Path, text: str, at: int) -> Rows:
    decoder, line, last = json.JSONDecoder(), 1, 0
    at = _after_space(text, at)
    try:
        while not text.startswith("]", at):
            line, last = line + text.count("\n", last, at), at
            row, at = decoder.raw_decode(text, at)
            yield line, row
            at = _after_space(text, at)
            if text.startswith(",", at):
                at = _after_space(text, at + 1)
            elif not text.startswith("]", at):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
        at = _after_space(text, at + 1)
        if at < len(text):
            raise json.JSONDecodeError("Extra data", text, at)
    except _NOT_JSON as error:
        raise _broken_json(path, getattr(error, "lineno", line), error) from error


def _after_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None
    return match.end()


def _holds_columns(whole: Row, text: str) -> bool:
    """Whether an object alone in a file holds columns, and is not a row: its lists are equally long
    and not of messages. One line that holds other values too is a row of a file of lines."""
    lists = [value for value in whole.values() if isinstance(value, list)]
    return (
        len({len(one) for one in lists}) == 1
        and not any(isinstance(cell, dict) for one in lists for cell in one)
        and (len(lists) == len(whole) or "\n" in text.strip())
    )


def _rows_of_columns(whole: Row) -> Rows:
    lists = {name: value for name, value in whole.items() if isinstance(value, list)}
    for number, cells in enumerate(zip(*lists.values(), strict=True), 1):
        yield number, whole | dict(zip(lists, cells, strict=True))


# ---- CSV -----------------------------------------------------------------------------------------


def _csv_rows(path: Path) -> Rows:
    limit = csv.field_size_limit(sys.maxsize)  # a text may be longer than the default
    start = 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            _no_doubles(f"{path}: line 1", header)
            start = reader.line_num + 1
            for cells in reader:
                if cells and len(cells) != len(header):
                    raise DataError(
                        f"{path}: line {start}: {len(cells)} fields, but the header names "
                        f"{len(header)} columns; quote fields that hold commas or line breaks"
                    )
                if cells:
                    yield start, dict(zip(header, cells, strict=True))
                start = reader.line_num + 1  # a quoted cell may hold line breaks
    except csv.Error as error:
        raise DataError(f"{path}: line {start}: broken CSV: {error}") from error
    except UnicodeDecodeError:
        with path.open("rb") as raw:
            for number, line in enumerate(raw, 1):
                _decode(path, number, line)
        raise
    finally:
        csv.field_size_limit(limit)


def _no_doubles(where: str, names: Sequence[str]) -> None:
    doubled = {name for name in names if names.count(name) > 1}
    if doubled:
        raise DataError(f"{where}: column {min(doubled)!r} is there more than once; rename one")


def typed(cells: Any) -> Any:
    """A column of text as integers, numbers or true and false, if every cell is one. An integer
    that begins with 0, as postal codes do, is a name; an empty cell is null. A column of another
    type is as it is."""
    if not is_text(cells.type):
        return cells
    trimmed = pc.utf8_trim_whitespace(cells)
    known = _known(trimmed)
    if pc.any(pc.match_substring_regex(known, r"^0\d+$")).as_py():
        return pc.if_else(pc.equal(trimmed, ""), None, cells)
    for kind in (pa.int64(), pa.bool_(), pa.float64()):
        if kind == pa.float64() and pc.all(pc.match_substring_regex(known, r"^[+-]?\d+$")).as_py():
            break  # integers beyond 64 bits would be rounded to each other
        try:
            return known.cast(kind)
        except pa.ArrowInvalid:
            continue
    return pc.if_else(pc.equal(trimmed, ""), None, cells)


def named(cells: Any) -> Any:
    """`typed`, for columns that may hold names: two spellings of one number, such as sections 1.1
    and 1.10, are names, and names have no spaces around them."""
    if not is_text(cells.type):
        return cells
    made, trimmed = typed(cells), pc.utf8_trim_whitespace(cells)
    if pa.types.is_floating(made.type):
        spelled = pc.replace_substring_regex(_known(trimmed), r"^([+-]?\d+)\.0*$", r"\1")
        as_name = pc.count_distinct(spelled).as_py() > pc.count_distinct(made).as_py()
    else:
        as_name = is_text(made.type)
    return pc.if_else(pc.equal(trimmed, ""), None, trimmed) if as_name else made


def numbers(cells: Any) -> Any:
    """Cells of CSV as float64, where every one is a number or missing; else the cells."""
    try:
        return _known(pc.utf8_trim_whitespace(cells)).cast(pa.float64())
    except pa.ArrowInvalid:
        return cells


def _known(trimmed: Any) -> Any:
    """Null for what stands for a missing number."""
    return pc.if_else(pc.is_in(trimmed, pa.array(_NO_NUMBER)), None, trimmed)


# ---- Parquet -------------------------------------------------------------------------------------


def _parquet_rows(path: Path) -> Rows:
    try:
        with pq.ParquetFile(path) as file:
            _no_doubles(str(path), file.schema_arrow.names)
            yield from rows_of(str(path), file.iter_batches(BLOCK))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {error}") from error


def _parquet_table(path: Path, measured: Sequence[str], spared: Mapping[str, str]) -> pa.Table:
    try:
        with pq.ParquetFile(path) as file:
            kinds = {one.name: one.type for one in file.schema_arrow}
            _no_doubles(str(path), file.schema_arrow.names)
            texts = [name for name in measured if is_text(kinds.get(name, pa.null()))]
            spare = {name for name, other in spared.items() if other in kinds}
            made = file.read(columns=[name for name in kinds if name not in {*texts, *spare}])
            if _are_measured(measured, texts, kinds):
                for name in texts:
                    lengths = [
                        pc.utf8_length(one[name]) for one in file.iter_batches(columns=[name])
                    ]
                    if (other := f"{name}_length") in kinds:
                        made = made.drop_columns(other)
                    made = made.append_column(other, pa.chunked_array(lengths))
            return made
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {error}") from error


def is_text(kind: pa.DataType) -> bool:
    return (
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def _unreadable(source: str, number: int, batch: Any, error: Exception) -> DataError:
    """Names the value of a batch, after ``number`` rows, that has no Python object."""
    for row, name in itertools.product(range(batch.num_rows), batch.column_names):
        try:
            batch[name][row].as_py()
        except (*_UNFIT, ValueError) as found:
            return DataError(
                f"{source}: row {number + row + 1}: column {name!r} cannot be read: {found}; "
                "mend it, or leave the column out"
            )
    return DataError(f"{source}: after row {number}: cannot be read: {error}")


# ---- columns of one type -------------------------------------------------------------------------


def _unfit(
    name: str,
    values: Sequence[Any],
    numbers: Sequence[int],
    where: Callable[[int], str],
    error: Exception,
) -> DataError:
    """Names the first value at which no type is left."""
    fine, unfit = 0, len(values)  # so many first values fit, so many do not
    while unfit - fine > 1:
        middle = (fine + unfit) // 2
        try:
            array(values[:middle])
            fine = middle
        except _UNFIT as found:
            unfit, error = middle, found
    value = values[fine]
    if isinstance(error, UnicodeEncodeError):
        why = f"is not valid Unicode: {error.reason}; mend it or drop the row"
    elif isinstance(value, int) and not -(2**63) <= value < 2**64:
        why = f"is {short(value)}, an integer beyond 64 bits; write such numbers as strings"
    else:
        first = next((i for i in range(fine) if values[i] is not None), fine)
        place = where(numbers[first]).rpartition(": ")[2]
        other = f", but {short(values[first])} in {place}" if first < fine else ""
        why = f"is {short(value)}{other}; give all of it one type, such as strings ({error})"
    return DataError(f"{where(numbers[fine])}: {name!r} {why}")


def _table_of_rows(
    where: Callable[[int], str], found: Rows, measured: Sequence[str], spared: Mapping[str, str]
) -> pa.Table:
    """Rows as columns, a block at a time, so that few of them are Python objects at once."""
    blocks: dict[str, dict[int, pa.Array]] = {}
    lengths: dict[str, dict[int, pa.Array]] = {}
    sizes: list[int] = []
    while block := list(itertools.islice(found, BLOCK)):
        columns, numbers = _columns(block, where), [number for number, _ in block]
        for name, values in columns.items():
            if spared.get(name) in columns:
                continue
            if name in measured and {type(v) for v in values if v is not None} == {str}:
                counts = pa.array([None if v is None else len(v) for v in values], pa.int64())
                lengths.setdefault(f"{name}_length", {})[len(sizes)] = counts
            else:
                made = _of_one_type(name, values, numbers, where)
                blocks.setdefault(name, {})[len(sizes)] = made
        sizes.append(len(block))
    if _are_measured(measured, [name.removesuffix("_length") for name in lengths], blocks):
        blocks |= lengths
    return pa.table(
        {
            name: _joined([chunks.get(i, pa.nulls(size)) for i, size in enumerate(sizes)])
            for name, chunks in blocks.items()
        }
    )


def _are_measured(measured: Sequence[str], texts: Sequence[str], found: Iterable[str]) -> bool:
    """Whether lengths are those of texts: not where all are given. Where one is, whose unit is not
    known, all are measured or none is."""
    given = {f"{name}_length" for name in measured} & set(found)
    return len(given) < len(measured) and len(texts) >= (len(measured) if given else 1)


def _columns(block: list[tuple[int, Any]], where: Callable[[int], str]) -> dict[str, list[Any]]:
    for number, row in block:
        if not isinstance(row, dict):
            raise DataError(f"{where(number)}: expected an object, got {short(row)}")
    found = [row for _, row in block]
    names = dict.fromkeys(itertools.chain.from_iterable(found))
    return {name: [row.get(name) for row in found] for name in names}


def _of_one_type(
    name: str, values: list[Any], numbers: list[int], where: Callable[[int], str]
) -> pa.Array:
    """As `column`, but values that no other type holds are names."""
    try:
        return array(values)
    except UnicodeEncodeError as error:
        raise _unfit(name, values, numbers, where, error) from error
    except _UNFIT:
        return column(name, [_as_name(v) for v in values], numbers, where)


def _joined(chunks: list[pa.Array]) -> pa.ChunkedArray:
    kinds = list(dict.fromkeys(one.type for one in chunks if not pa.types.is_null(one.type)))
    try:
        schemas = [pa.schema([("", kind)]) for kind in kinds or [pa.null()]]
        kind = pa.unify_schemas(schemas, promote_options="permissive").field("").type
        return pa.chunked_array([one.cast(kind) for one in chunks], kind)
    except pa.ArrowException:  # no type for all of them
        names = [pa.array(map(_as_name, one.to_pylist()), pa.string()) for one in chunks]
        return pa.chunked_array(names)


def _as_name(value: Any) -> str | None:
    """1 and 1.0 have one name, so that it does not depend on the other values of a column."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, ensure_ascii=False, default=str)
