"""How a text is laid out: case, spaces, marks, lists, the order of its sentences.

None of these draws anything; the argument is there because every transformation has it.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from random import Random

from drrlhf.transformations.edits import edited

HEADING = "## Answer\n\n"
KEY_POINTS = "**Key points**\n\n"
_SENTENCES = re.compile(r"(?<=[.!?])\s+")
# A full stop behind these ends no sentence, and one behind a single letter (an initial, "e.g."), or
# behind a number that begins a line (a point of a list), does not either. Better two sentences
# taken for one than one cut in two.
_ABBREVIATIONS = (
    "Dr|Mr|Mrs|Ms|Mx|Prof|St|Sr|Jr|Gen|Col|Capt|Lt|Sgt|Rev|Hon|vs|cf|ca|etc|al|approx|resp|incl|viz|"
    "Fig|fig|Figs|Eq|eq|Eqs|Sec|Ch|Vol|vol|pp|Inc|Ltd|Co|Corp|Mt|Ave|Rd|Blvd|Dept|"
    "Sen|Rep|Gov|Pres|Messrs|Mme|Mlle|Bros|Jan|Feb|Apr|Aug|Sept|Sep|Oct|Nov|Dec"
)
_NO_END = re.compile(
    rf"(?<![\w'’])(?:{_ABBREVIATIONS}|[^\W\d_])\.\Z|^[ \t>*_(]*\d{{1,3}}\.\Z", re.M
)
_NUMBER_OF = re.compile(r"(?<!\w)[Nn]os?\.\Z")  # "No. 5"; "No." alone is an answer
_LOOK_BACK = 20  # characters, more than any of these has
# What begins a point of a list.
_POINT = re.compile(r"^[ \t]*(?:[-*+•]|\d{1,3}[.)])[ \t]+", re.M)
# Quotation marks open at the beginning, behind a space and behind a bracket.
_OPENING = re.compile(r"""(?<![^\s(\[{])["']+(?=\S)""")
# Where marks of markdown may open and close. Two underscores do so at the edges of words alone; a
# longer run of them opens with its first two and closes with its last, a bare one does neither. Two
# stars between letters or digits are a power: without them, 2**10 would be another number.
_POWER = r"(?<=[A-Za-z0-9_)\]])\*\*[A-Za-z0-9_]|(?<=[0-9)\]])\*\*\("
_OPENS = re.compile(rf"(?!{_POWER})(\*\*|`)(?=\S)|(?<!\w)(__)(?=_*[^\s_])")
_CLOSES = {
    "**": re.compile(rf"(?<=\S)(?!{_POWER})(?=\*\*)"),
    "`": re.compile(r"(?<=\S)(?=`)"),
    "__": re.compile(r"(?<=[^\s_])_*(?=__(?!\w))"),
}
# Such as __init__. One word in bold looks the same.
_DUNDER = re.compile(r"(?<!\w)__(?!_)\w*[^\W_]__(?!\w)")
_CURLY = str.maketrans({'"': "“", "'": "‘"}), str.maketrans({'"': "”", "'": "’"})


def sentences(text: str) -> list[str]:
    """At least one, which may be empty."""
    text = text.strip()
    found, begin = [], 0
    for gap in _SENTENCES.finditer(text):
        if not _goes_on(text, *gap.span()):
            found.append(text[begin : gap.start()])
            begin = gap.end()
    return [*found, text[begin:]]


def _goes_on(text: str, start: int, end: int) -> bool:
    """Whether the sentence goes on behind the gap from ``start`` to ``end``, before which a full
    stop stands."""
    behind = max(0, start - _LOOK_BACK)
    if _NO_END.search(text, behind, start):
        return True
    return text[end].isdigit() and bool(_NUMBER_OF.search(text, behind, start))


def _of_prose(text: str) -> list[str]:
    """The sentences of a text that has no list: in another order, or as points of another list,
    those of a list would say something else, and it counts as one."""
    return [text] if _POINT.search(text) else sentences(text)


def lower_case(text: str, draw: Random) -> str:
    """In small letters."""
    return text.lower()


def upper_case(text: str, draw: Random) -> str:
    """In capitals."""
    return text.upper()


def whitespace(text: str, draw: Random) -> str:
    """Doubled spaces, and a blank line behind."""
    return text.replace(" ", "  ") + "\n\n"


def punctuation(text: str, draw: Random) -> str:
    """A space before the punctuation at the end of words, but for the points of a list."""
    stops = {found.start() + len(found[0].rstrip()) for found in _POINT.finditer(text)}

    def apart(found: re.Match[str]) -> str:
        return found[0] if found.end() in stops else f" {found[1]}"

    return re.sub(r"(?<=\w)([.,;:!?])(?=\s|$)", apart, text)


def quotes(text: str, draw: Random) -> str:
    """The text in quotation marks."""
    return f'"{text}"' if text.strip() else text


def curly_quotes(text: str, draw: Random) -> str:
    """Typographic quotation marks and apostrophes in place of straight ones."""
    opening, closing = _CURLY
    return _OPENING.sub(lambda found: found.group().translate(opening), text).translate(closing)


def bold(text: str, draw: Random) -> str:
    """The first sentence in bold."""
    first = sentences(text)[0]
    start = text.find(first)
    if mark := _POINT.match(first):
        start, first = start + mark.end(), first[mark.end() :]
    return f"{text[:start]}**{first}**{text[start + len(first) :]}" if first else text


def bullets(text: str, draw: Random) -> str:
    """Every sentence a point of a list."""
    found = _of_prose(text)
    return "\n".join(f"- {one}" for one in found) if len(found) > 1 else text


def listed(text: str, draw: Random) -> str:
    """Every sentence a point of a list that is announced."""
    points = bullets(text, draw)
    return text if points == text else KEY_POINTS + points


def numbered(text: str, draw: Random) -> str:
    """Every sentence a point of a numbered list."""
    found = _of_prose(text)
    points = (f"{number}. {one}" for number, one in enumerate(found, 1))
    return "\n".join(points) if len(found) > 1 else text


def paragraphs(text: str, draw: Random) -> str:
    """Every sentence a paragraph."""
    found = sentences(text)
    return "\n\n".join(found) if len(found) > 1 else text


def heading(text: str, draw: Random) -> str:
    """A heading over the text."""
    return HEADING + text if text.strip() else text


def code_fence(text: str, draw: Random) -> str:
    """The text as a block of code; its fence is longer than those inside."""
    longest = max((len(found) for found in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}" if text.strip() else text


def no_markdown(text: str, draw: Random) -> str:
    """Without headings, points of lists, and marks for bold and code; ``__name__`` stays."""
    text = re.sub(r"^[ \t]*`{3,}[^`\n]*(?:\n|\Z)", "", text, flags=re.M)
    # Between two fences on one line stands code, and no language.
    text = re.sub(r"(?<!`)(`{3,})(?!`)([^`\n]+)\1(?!`)", r"\2", text)
    text = re.sub(r"^[ \t]*(?:#{1,6}|[-*+])[ \t]+", "", text, flags=re.M)
    return "\n".join(_unmarked(line) for line in text.split("\n"))


def _unmarked(line: str) -> str:
    """A line without its pairs of marks, each closed by the next that can.

    One expression for all of a pair would look through the rest of the line for each mark that
    nothing closes.
    """
    shown = _DUNDER.sub(lambda name: "x" * len(name.group()), line)  # in which names have no marks
    closing = {
        mark: [found.end() for found in pattern.finditer(shown)]
        for mark, pattern in _CLOSES.items()
        if mark in shown
    }
    cuts, at = [], 0
    while found := _OPENS.search(shown, at):
        mark, inside = found.group(), found.end()
        ends = closing[mark]
        next_end = bisect_left(ends, inside + 1)
        if next_end == len(ends):
            at = found.start() + 1
        else:
            end = ends[next_end]
            at = end + len(mark)
            cuts += [(found.start(), inside, ""), (end, at, "")]
    return edited(line, cuts)


def repeated(text: str, draw: Random) -> str:
    """The last sentence once more."""
    lines = text.strip().splitlines() or [""]
    last = sentences(_POINT.sub("", lines[-1]))[-1]
    return f"{text} {last}" if last else text


def reversed_sentences(text: str, draw: Random) -> str:
    """The sentences last to first."""
    found = _of_prose(text)
    return " ".join(reversed(found)) if len(found) > 1 else text
