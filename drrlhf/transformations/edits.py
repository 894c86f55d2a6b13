"""Several places of a text changed at once."""

from __future__ import annotations

from collections.abc import Iterable


def edited(text: str, edits: Iterable[tuple[int, int, str]]) -> str:
    """The text with what stands from ``start`` to ``end`` replaced, for each (start, end, new) in
    the order of the text."""
    parts, at = [], 0
    for start, end, new in edits:
        parts += [text[at:start], new]
        at = end
    return "".join([*parts, text[at:]])
