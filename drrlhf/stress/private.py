"""Scores that can be handed on where the texts behind them cannot."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from drrlhf.files.tables import is_text
from drrlhf.stress.generate import Generated
from drrlhf.stress.scores import Scores

LONGEST = 40  # characters of a name; a column with a longer value is one of texts
LEFT_OUT = "it holds texts, which are left out"
PROMPT = "prompt"
Attributed = TypeVar("Attributed", Scores, Generated)


def table_without_texts(table: pa.Table) -> pa.Table:
    """A table of scores with numbers in place of prompts, and without examples and columns of
    texts: those in which a value has more than `LONGEST` characters."""
    table = table.replace_schema_metadata(None)
    for place, name in enumerate(table.column_names):
        if name == PROMPT and is_text(table[name].type):
            table = table.set_column(place, name, _numbered(table[name]))
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


def _numbered(prompts: pa.ChunkedArray) -> pa.ChunkedArray:
    """A number for each different prompt; null where there is none."""
    blank = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(prompts)), 0)
    known = pc.if_else(blank, pa.scalar(None, prompts.type), prompts)
    return pa.chunked_array([known.combine_chunks().dictionary_encode().indices])


def _is_of_texts(column: pa.ChunkedArray) -> bool:
    if pa.types.is_nested(column.type):
        return True
    if not is_text(column.type):
        return False
    longest = pc.max(pc.utf8_length(column)).as_py()
    return longest is not None and longest > LONGEST
