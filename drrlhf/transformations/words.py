"""Changes of some letters and words; what a generator draws says which: ``(text, draw) -> text``.

``rate`` is the share of the words that change. Every function gives the same for the same generator
state, and the text as it is where it finds nothing to act on. Typing errors, homoglyphs and lost
words are changes of reWordBench's kind (arXiv 2503.11751).

Chinese, Japanese, Thai and their like put no spaces between words. What stands between two spaces
or marks there is a clause; to leave it out or to misspell it once is another change than of a word,
so that their letters are none of a word here. Korean has spaces.

A word has the marks of its letters: the vowels of Hindi, the accents of text that Unicode takes
apart. They count as no letters. Errors in letters leave such words alone, since a mark means
something only behind its own letter; whole words change with their marks.

What lies between two spaces with a slash, an at sign or an underscore in it is an address, a path
or a name, with a backslash a command of LaTeX or a path, and has no words: another letter there is
another thing.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache, partial
from random import Random

from drrlhf.transformations.edits import edited

# Of the words that are long enough, how many a typing error falls into.
TYPOS = 0.08
# Of the words that are long enough, how many are left out or written twice.
WORDS = 0.05
# Of all words, how many a truncated text keeps.
KEPT = 0.5
# Texts with fewer words lose too much with one of them, or all of it.
ENOUGH = 4
# Letters of scripts without spaces between words, as ranges of a character class.
_UNSPACED = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f"  # Myanmar
    "\u1780-\u17ff"  # Khmer
    "\u1950-\u19df\u1a20-\u1aaf\uaa80-\uaadf"  # Tai scripts
    "\u2e80-\u2fdf\u3005-\u3007\u3021-\u303c"  # radicals and marks of ideographs
    "\u3040-\u312f\u31a0-\u31ff\uff66-\uff9f\U0001aff0-\U0001b16f"  # kana, bopomofo
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # CJK ideographs
)
_NO_WORD = re.compile(f"[{_UNSPACED}]")
_JOINERS = "\u200c\u200d"  # they show nothing, and stand inside of words in Hindi and Persian


def _all_marks() -> str:
    """The marks of letters that are a word's, and joiners, as ranges of a character class: each for
    itself would be asked for at every letter."""
    places = (*range(0x300, 0x1F000), *range(0xE0100, 0xE01F0))  # none lie elsewhere
    marks = [place for place in places if unicodedata.category(chr(place)) in ("Mn", "Mc")]
    spaced = [place for place in marks if not _NO_WORD.match(chr(place))]
    ends = zip([-1, *spaced], [*spaced, -1], strict=True)
    edges = [(before, after) for before, after in ends if after != before + 1]
    ranges = zip((first for _, first in edges), (last for last, _ in edges[1:]), strict=False)
    return _JOINERS + "".join(f"{chr(first)}-{chr(last)}" for first, last in ranges)


@cache
def _mark_and_word() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """A mark of a letter, and a word; made at the first text, for to look through Unicode takes
    longer than all else that this module is imported for."""
    mark, letters = f"[{_all_marks()}]", rf"[^\W\d_{_UNSPACED}]+"
    return re.compile(mark), re.compile(rf"{letters}(?:{mark}+(?:{letters})?)*")


# What a word goes on with behind an apostrophe: "doesn't" is one word, and so is "Peter's".
_SUFFIX = re.compile(r"['’][^\W\d_]{1,3}(?![^\W\d_])")
LETTERS = 4  # of a word that may change, at least
_NAMING = re.compile(r"[/@_\\]")
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


def _words(text: str, whole: bool) -> list[tuple[int, int]]:
    """Where the words of four letters and more begin and end; with ``whole`` those with marks,
    too."""
    found = []
    mark, any_word = _mark_and_word()
    if _NAMING.search(text):
        text = re.sub(r"\S+", _hidden, text)
    for one in any_word.finditer(text):
        word = one.group()
        letters = len(word if word.isascii() else mark.sub("", word))
        if letters >= LETTERS and (whole or letters == len(word)):
            found.append(one.span())
    return found


def _hidden(found: re.Match[str]) -> str:
    """Digits in the place of an address, a path or a name."""
    return "0" * len(found.group()) if _NAMING.search(found.group()) else found.group()


def _in_some_words(
    text: str,
    draw: Random,
    rate: float,
    change: Callable[[str], str],
    enough: int = 1,
    whole: bool = True,
    with_space: bool = False,
    with_suffix: bool = False,
) -> str:
    """``change`` applied to a share of the words of four letters and more, at least to one.

    A text with fewer than ``enough`` of them stays. A change that is not of ``whole`` words has
    those without marks alone. ``with_space``: one that stands before a word changes with it, and
    ``with_suffix`` what follows it behind an apostrophe.
    """
    words = _words(text, whole)
    if len(words) < enough:
        return text
    chosen = sorted(draw.sample(range(len(words)), max(1, round(rate * len(words)))))
    edits = []
    for start, end in (words[i] for i in chosen):
        start -= with_space and text[start - 1 : start] == " "
        suffix = _SUFFIX.match(text, end) if with_suffix else None
        end = suffix.end() if suffix else end
        edits.append((start, end, change(text[start:end])))
    return edited(text, edits)


# A typing error in a word: at a place behind its first letter, ``near`` a key beside that letter's.
_Error = Callable[[str, int, str], str]


def _swapped(word: str, at: int, near: str) -> str:
    return word[:at] + word[at + 1] + word[at] + word[at + 2 :]


def _wrong(word: str, at: int, near: str) -> str:
    return word[:at] + near + word[at + 1 :]


def _extra(word: str, at: int, near: str) -> str:
    return word[:at] + near + word[at:]


def _missing(word: str, at: int, near: str) -> str:
    return word[:at] + word[at + 1 :]


def _mistyped(word: str, draw: Random, errors: Sequence[_Error]) -> str:
    """A word with one of these typing errors behind its first letter."""
    at = draw.randrange(1, len(word) - 1)
    letter = word[at]
    near = draw.choice(NEIGHBOURS.get(letter.lower(), letter))
    near = near.upper() if letter.isupper() else near
    return draw.choice(errors)(word, at, near)


def typos(
    text: str,
    draw: Random,
    rate: float = TYPOS,
    errors: Sequence[_Error] = (_swapped, _wrong, _extra, _missing),
) -> str:
    """Letters swapped, mistaken for their neighbour, doubled or left out."""
    change = partial(_mistyped, draw=draw, errors=errors)
    return _in_some_words(text, draw, rate, change, whole=False)


# One kind of typing error alone.
swapped_letters = partial(typos, errors=(_swapped,))
wrong_letters = partial(typos, errors=(_wrong,))
extra_letters = partial(typos, errors=(_extra,))
missing_letters = partial(typos, errors=(_missing,))


def dropped_words(text: str, draw: Random, rate: float = WORDS) -> str:
    """Words left out, of four and more."""
    change = partial(_in_some_words, with_space=True, with_suffix=True)
    return change(text, draw, rate, lambda word: "", ENOUGH)


def doubled_words(text: str, draw: Random, rate: float = WORDS) -> str:
    """Words written twice, of four and more."""
    change = partial(_in_some_words, with_suffix=True)
    return change(text, draw, rate, lambda word: f"{word} {word}", ENOUGH)


def homoglyphs(text: str, draw: Random, rate: float = TYPOS) -> str:
    """Words in letters that only look the same."""
    return _in_some_words(text, draw, rate, lambda word: word.translate(HOMOGLYPHS))


def zero_width(text: str, draw: Random, rate: float = TYPOS) -> str:
    """Characters that show nothing, in the middle of words."""

    def split(word: str) -> str:
        return f"{word[: len(word) // 2]}\u200b{word[len(word) // 2 :]}"

    return _in_some_words(text, draw, rate, split, whole=False)


def shuffled_words(text: str, draw: Random) -> str:
    """All words in an order that is drawn, around the clauses of scripts without spaces."""
    found = text.split()
    places = [place for place, word in enumerate(found) if not _NO_WORD.search(word)]
    if len(places) < 2:
        return text
    drawn = draw.sample(places, len(places))
    new = dict(zip(places, drawn, strict=True))
    return " ".join(found[new.get(place, place)] for place in range(len(found)))


def truncated(text: str, draw: Random, rate: float = KEPT) -> str:
    """The first words, a share ``rate`` of all, at least one."""
    words = list(re.finditer(r"\S+", text))
    return text[: words[max(1, int(rate * len(words))) - 1].end()] if words else text
