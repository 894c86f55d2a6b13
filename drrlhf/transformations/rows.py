"""What a change of a text does to a row of preference data: strings, or messages.

Of messages the last one of the assistant is the answer and the last one of the user the question. A
prompt that lies in the messages of both answers is changed there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

Row = Mapping[str, Any]
Change = Callable[[str], str]
SIDES = ("chosen", "rejected")
BY_COLUMN = "@"  # chosen@NAME is another form of the chosen answer


def transformed(row: Row, **changes: Change) -> Row:
    """The row with ``chosen``, ``rejected`` or ``prompt`` changed as given."""
    found = dict(row)
    for part, change in changes.items():
        if part in SIDES:
            found[part] = _changed(found[part], change, "assistant")
        elif "prompt" in row:
            found[part] = _changed(found[part], change, "user")
        else:  # it lies in both answers, and stays the same in both
            assert part == "prompt"
            change = cache(change)
            for side in SIDES:
                if not isinstance(found[side], str):
                    found[side] = _changed(found[side], change, "user")
    return found


def from_column(row: Row, part: str, name: str) -> Row:
    """The row with a part as its column ``part@name`` has it; as it is where there is none."""
    other = row.get(f"{part}{BY_COLUMN}{name}")
    return dict(row) if other is None else {**row, part: other}


def _changed(given: Any, change: Change, role: str) -> Any:
    if isinstance(given, str):
        lead = given[: len(given) - len(given.lstrip())]  # what joins an answer to its prompt
        return lead + change(given[len(lead) :])
    texts = [i for i, one in enumerate(given) if one["role"] == role and _is_text(one)]
    if not texts:  # an assistant that only calls tools
        return given
    last = texts[-1]
    message = {**given[last], "content": change(given[last]["content"])}
    return [*given[:last], message, *given[last + 1 :]]


def _is_text(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    return isinstance(content, str) and bool(content)
