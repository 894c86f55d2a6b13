"""Scores that can be handed on where the texts behind them cannot."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from drrlhf.files.tables import is_text
from drrlhf.stress.generate import Generated
from drrlhf.stress.scores import PROMPTS, Scores, prompts_in

LONGEST = 40  # characters of a name; a column with a longer value is one of texts
LEFT_OUT = "it holds texts, which are left out"
PROMPT = "prompt"
Attributed = TypeVar("Attributed", Scores, Generated)


def table_without_texts(table: pa.Table, prompt_column: str | None = None) -> pa.Table:
    """A table of scores with numbers in place of prompts, and of ids of prompts that are longer
    than a name, and without examples and columns of texts: those in which a value has more than
    `LONGEST` characters, and lists and objects that hold text, or have such a key."""
    table = table.replace_schema_metadata(None)
    for place, name in enumerate(table.column_names):
        names_prompts = name in (*PROMPTS, prompt_column)
        if name == PROMPT or (names_prompts and _is_of_texts(table[name])):
            codes, missing = prompts_in(table, name)
            table = table.set_column(place, name, pa.array(codes, mask=missing))
    texts = [name for name in table.column_names if _is_of_texts(table[name])]
    return table.drop_columns(texts)


def scores_without_texts(scores: Scores) -> Scores:
    """Scores without examples and attributes of texts."""
    return replace(_named(scores), examples={})


def generated_without_texts(generated: Generated) -> Generated:
    """Answers of a policy without attributes of texts; what is told of them has examples still."""
    return _named(generated)


def _named(of: Attributed) -> Attributed:
    """Without the attributes that have a value longer than a name; why is told in their place."""
    texts = [
        name
        for name, one in of.attributes.items()
        if any(len(value) > LONGEST for value in one.names)
    ]
    named = {name: one for name, one in of.attributes.items() if name not in texts}
    return replace(of, attributes=named, ignored={**of.ignored, **dict.fromkeys(texts, LEFT_OUT)})


def _is_of_texts(column: pa.ChunkedArray) -> bool:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_nested(column.type):
        return _holds_text(column.type)
    if not _is_text(column.type):
        return False
    longest = pc.max(
        pc.utf8_length(column) if is_text(column.type) else pc.binary_length(column)
    ).as_py()
    return longest is not None and longest > LONGEST


def _holds_text(kind: pa.DataType) -> bool:
    fields = [kind.field(i) for i in range(kind.num_fields)]
    if any(len(one.name) > LONGEST or _holds_text(one.type) for one in fields):
        return True
    return _is_text(kind) or pa.types.is_dictionary(kind)


def _is_text(kind: pa.DataType) -> bool:
    return is_text(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
