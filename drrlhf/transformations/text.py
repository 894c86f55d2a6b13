"""Functions of a text, and of a generator that says where they act: ``(text, draw) -> text``.

Every one of them gives the same for the same generator state. One that finds nothing to act on
gives the text back as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from random import Random

# Of the words that are long enough, how many a typing error falls into.
TYPOS = 0.08
# Of the words that are long enough, how many are left out or written twice.
WORDS = 0.05
SENTENCE = " In short, that is my answer, and there is nothing further to add to it here."
PREAMBLE = "By the way, the weather was fine this morning. Now to my question.\n\n"
HANDLE = "@user "
URL = " https://example.org"
_SENTENCES = re.compile(r"(?<=[.!?])\s+")
_WORD = re.compile(r"[^\W\d_]{4,}")
_SPACE_AND_WORD = re.compile(r" ?[^\W\d_]{4,}")
_KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
# Letters of the Cyrillic alphabet that look like Latin ones.
HOMOGLYPHS = str.maketrans("aceopxyACEOPX", "асеорхуАСЕОРХ")


def _neighbours() -> dict[str, str]:
    """The letters around each on a keyboard, whose rows are shifted by half a key."""
    place = {
        key: (row, 2 * i + row) for row, keys in enumerate(_KEYS) for i, key in enumerate(keys)
    }

    def near(a: str, b: str) -> bool:
        rows, halves = (abs(x - y) for x, y in zip(place[a], place[b], strict=True))
        return (rows, halves) in ((0, 2), (1, 1))

    return {a: "".join(b for b in place if near(a, b)) for a in place}


NEIGHBOURS = _neighbours()


def _in_some_words(
    text: str,
    draw: Random,
    share: float,
    change: Callable[[str], str],
    pattern: re.Pattern[str] = _WORD,
) -> str:
    """``change`` applied to a share of the words of four letters and more, at least to one."""
    words = list(pattern.finditer(text))
    if not words:
        return text
    chosen = sorted(draw.sample(range(len(words)), max(1, round(share * len(words)))))
    parts, end = [], 0
    for index in chosen:
        word = words[index]
        parts += [text[end : word.start()], change(word.group())]
        end = word.end()
    return "".join([*parts, text[end:]])


def _mistyped(word: str, draw: Random) -> str:
    """A word with one typing error behind its first letter."""
    at = draw.randrange(1, len(word) - 1)
    letter = word[at]
    near = draw.choice(NEIGHBOURS.get(letter.lower(), letter))
    near = near.upper() if letter.isupper() else near
    return draw.choice(
        (
            word[:at] + word[at + 1] + letter + word[at + 2 :],  # swapped
            word[:at] + near + word[at + 1 :],  # the next key
            word[:at] + near + word[at:],  # one more
            word[:at] + word[at + 1 :],  # one less
        )
    )


def typos(text: str, draw: Random) -> str:
    """Letters swapped, mistaken for their neighbour, doubled or left out."""
    return _in_some_words(text, draw, TYPOS, partial(_mistyped, draw=draw))


def dropped_words(text: str, draw: Random) -> str:
    """Words left out."""
    return _in_some_words(text, draw, WORDS, lambda word: "", _SPACE_AND_WORD)


def doubled_words(text: str, draw: Random) -> str:
    """Words written twice."""
    return _in_some_words(text, draw, WORDS, lambda word: f"{word} {word}")


def homoglyphs(text: str, draw: Random) -> str:
    """Words in letters that only look the same."""
    return _in_some_words(text, draw, TYPOS, lambda word: word.translate(HOMOGLYPHS))


def zero_width(text: str, draw: Random) -> str:
    """Characters that show nothing, in the middle of words."""
    return _in_some_words(
        text, draw, TYPOS, lambda word: f"{word[: len(word) // 2]}\u200b{word[len(word) // 2 :]}"
    )


def lower_case(text: str, draw: Random) -> str:
    return text.lower()


def upper_case(text: str, draw: Random) -> str:
    return text.upper()


def whitespace(text: str, draw: Random) -> str:
    """Doubled spaces, and a blank line behind."""
    return text.replace(" ", "  ") + "\n\n"


def punctuation(text: str, draw: Random) -> str:
    """A space before the punctuation at the end of words."""
    return re.sub(r"(?<=\w)([.,;:!?])(?=\s|$)", r" \1", text)


def quotes(text: str, draw: Random) -> str:
    return f'"{text}"' if text.strip() else text


def bold(text: str, draw: Random) -> str:
    """The first sentence in bold."""
    first = sentences(text)[0]
    return text.replace(first, f"**{first}**", 1) if first else text


def bullets(text: str, draw: Random) -> str:
    """Every sentence a point of a list."""
    found = sentences(text)
    return "\n".join(f"- {one}" for one in found) if len(found) > 1 else text


def no_markdown(text: str, draw: Random) -> str:
    """Without headings, points of lists, and marks for bold and code."""
    text = re.sub(r"^[ \t]*```.*\n?", "", text, flags=re.M)
    text = re.sub(r"^[ \t]*(?:#{1,6}|[-*+])[ \t]+", "", text, flags=re.M)
    return re.sub(r"(\*\*|__|`)(\S(?:.*?\S)?)\1", r"\2", text)


def sentence(text: str, draw: Random) -> str:
    return text + SENTENCE


def repeated(text: str, draw: Random) -> str:
    """The last sentence once more."""
    lines = text.strip().splitlines() or [""]
    last = sentences(lines[-1])[-1]
    return f"{text} {last}" if last else text


def reversed_sentences(text: str, draw: Random) -> str:
    found = sentences(text)
    return " ".join(reversed(found)) if len(found) > 1 else text


def handle(text: str, draw: Random) -> str:
    return HANDLE + text


def url(text: str, draw: Random) -> str:
    return text + URL


def preamble(text: str, draw: Random) -> str:
    return PREAMBLE + text


def sentences(text: str) -> list[str]:
    """At least one, which may be empty."""
    return _SENTENCES.split(text.strip())
