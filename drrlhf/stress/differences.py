"""What differs between a text and its changed form, by words, as HTML in which all is escaped."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Sequence

from markupsafe import Markup, escape

from drrlhf.stress.examples import LONGEST

_IDEOGRAPHS = r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"  # written without spaces between words
_WORDS = re.compile(rf"{_IDEOGRAPHS}|(?:(?!{_IDEOGRAPHS})\w)+|[^\S\n]+|.", re.DOTALL)
_CUT = "…"


def marked(old: str, new: str) -> tuple[Markup, Markup]:
    """Both texts, with <mark> around what the other one does not have."""
    (old, old_end), (new, new_end) = _without_cut(old), _without_cut(new)
    before, after = _WORDS.findall(old), _WORDS.findall(new)
    steps = difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
    # Where a text was cut, the end of the other one may well have gone on alike.
    last = steps[-1] if len(steps) > 1 else None
    shown: tuple[list[Markup], list[Markup]] = ([], [])
    for step in steps:
        kind, i, j, k, m = step
        for into, words, other_end, name in (
            (shown[0], before[i:j], new_end, "gone"),
            (shown[1], after[k:m], old_end, "new"),
        ):
            alike = kind == "equal" or (step is last and other_end)
            into.append(escape("".join(words)) if alike else _mark(words, name))
    return Markup().join([*shown[0], old_end]), Markup().join([*shown[1], new_end])


def _without_cut(text: str) -> tuple[str, str]:
    """A text and the sign that it was cut, which is empty where it was not."""
    if len(text) >= LONGEST and text.endswith(_CUT):
        return text[: -len(_CUT)], _CUT
    return text, ""


def _mark(words: Sequence[str], name: str) -> Markup:
    if not words:
        return Markup()
    text = Markup().join(_sign(character) for character in "".join(words))
    return Markup('<mark class="{}">{}</mark>').format(name, text)


def _sign(character: str) -> Markup:
    """A character; one that shows nothing, by its number."""
    if character == "\n":
        return Markup('<span class="sign" aria-label="new line">↵</span>\n')
    if unicodedata.category(character) in ("Cc", "Cf"):
        return Markup('<span class="sign">U+{:04X}</span>').format(ord(character))
    return escape(character)
