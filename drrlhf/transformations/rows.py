"""What a change of a text does to a row of preference data: strings, or messages.

Of messages the last one of the assistant is the answer and the last one of the user the question. A
prompt that lies in the messages of both answers is changed there, and what a user says only behind
one of them is none of it. What both begin with is no answer of either: one that has no text, such
as a call of a tool, has no other form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from itertools import takewhile
from typing import Any

Row = Mapping[str, Any]
Change = Callable[[str], str]
SIDES = ("chosen", "rejected")
BY_COLUMN = "@"  # chosen@NAME is another form of the chosen answer


def transformed(row: Row, **changes: Change) -> Row:
    """The row with ``chosen``, ``rejected`` or ``prompt`` changed as given."""
    found, begin = dict(row), shared_messages(row)
    for part, change in changes.items():
        if part in SIDES:
            found[part] = _changed(found[part], change, "assistant", begin)
        elif "prompt" in row:
            found[part] = _changed(found[part], change, "user")
        else:  # it lies in both answers, and stays the same in both
            assert part == "prompt"
            change = cache(change)
            for side in SIDES if begin else ():
                asked = _changed(found[side][:begin], change, "user")
                found[side] = [*asked, *found[side][begin:]]
    return found


def shared_messages(row: Row) -> int:
    """How many messages both answers of a row without ``prompt`` begin with: its prompt; 0 where
    they are texts."""
    if "prompt" in row or any(isinstance(row.get(side, ""), str) for side in SIDES):
        return 0
    both = zip(*(row[side] for side in SIDES), strict=False)
    return sum(1 for _ in takewhile(lambda pair: same_message(*pair), both))


def same_message(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two messages are equal; Arrow gives all of a column the same keys, some None."""
    first, second = (
        {key: value for key, value in message.items() if value is not None}
        for message in (one, other)
    )
    return first == second


def from_column(row: Row, part: str, name: str) -> Row:
    """The row with a part as its column ``part@name`` has it; as it is where there is none, or a
    blank one."""
    other = row.get(f"{part}{BY_COLUMN}{name}")
    blank = not (other.strip() if isinstance(other, str) else other)
    return dict(row) if blank else {**row, part: other}


def _changed(given: Any, change: Change, role: str, begin: int = 0) -> Any:
    """A text, or messages whose last one of a role is behind the first ``begin``, changed."""
    if isinstance(given, str):
        lead = given[: len(given) - len(given.lstrip())]  # what joins an answer to its prompt
        return lead + change(given[len(lead) :])
    begin = min(begin, len(given) - 1)  # an answer that the other one goes on from
    texts = [i for i, one in enumerate(given) if i >= begin and one["role"] == role and _text(one)]
    if not texts:  # an assistant that only calls tools
        return given
    last = texts[-1]
    text = _text(given[last])
    new = change(text)
    return [*given[:last], _saying(given[last], new), *given[last + 1 :]] if new != text else given


def _text(message: Mapping[str, Any]) -> str:
    """What a message says; of a list of parts, what these say one behind the other, as chat
    templates write them."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content or () if _is_text(part))


def _saying(message: Mapping[str, Any], text: str) -> dict[str, Any]:
    """The message with another text; of a list of parts the first one with text has all of it."""
    if isinstance(message["content"], str):
        return {**message, "content": text}
    first = next(i for i, part in enumerate(message["content"]) if _is_text(part))
    parts = [
        {**part, "text": text} if i == first else part
        for i, part in enumerate(message["content"])
        if i <= first or not _is_text(part)
    ]
    return {**message, "content": parts}


def _is_text(part: Mapping[str, Any]) -> bool:
    return part.get("type") == "text" and bool(part.get("text"))
