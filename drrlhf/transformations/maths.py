r"""The final answer of a mathematical text, in another of three conventions.

``$\boxed{36}$`` is MATH's, a last line ``#### 36`` GSM8K's, and "The answer is 36." that of many
prompts. reWordBench (arXiv 2503.11751) changes formats of answers, too.
"""

from __future__ import annotations

import re
from random import Random

from drrlhf.transformations.edits import edited

_BOX = r"\boxed{"
_BRACE = re.compile(r"\\.|[{}]", re.S)  # or what a backslash makes another sign
BOXED, HASHES, SAID = "boxed", "hashes", "said"
# A number, or mathematics between dollars. Anything else may be a heading, or words.
_VALUE = r"(\$[^$\n]+\$|-?[$€£]?\d(?:[\d,]*\d)?(?:[./]\d+)?(?:\\?%)?)"
_LAST = {
    HASHES: re.compile(rf"^####[ \t]*{_VALUE}\s*\Z", re.M),
    SAID: re.compile(
        r"(?:^|(?<=[.!?]\s))(?:(?:so|thus|hence|therefore),? )?"
        rf"the (?:final )?answer is:? {_VALUE}\.?\s*\Z",
        re.M | re.I,
    ),
}


def math_format(text: str, draw: Random) -> str:
    """The final answer in a convention that is drawn among those in which it is not yet."""
    plain, boxed = _unboxed(text)
    value, there = boxed, [BOXED] if boxed else []
    for convention, pattern in _LAST.items():
        found = pattern.search(plain)
        if found:
            plain, value = plain[: found.start()], _latex(found[1])
            there.append(convention)
    new = [one for one in (BOXED, HASHES, SAID) if one not in there]
    if not value or not new:
        return text
    last = _written(value, draw.choice(new))
    return f"{plain.rstrip()}\n{last}" if plain.strip() else last


def _unboxed(text: str) -> tuple[str, str]:
    r"""The text without ``\boxed``, and what was in the last of them; "" where there is none, or
    where the last line that has any holds several answers.

    One that does not close is none. All are found in one pass: a generation that loops may open
    thousands.
    """
    boxes: dict[int, str] = {}  # what is in them, by where they open
    open_braces: list[int] = []  # where those begin that are not closed yet
    cuts: list[tuple[int, int, str]] = []
    for brace in _BRACE.finditer(text):
        at = brace.start()
        if brace.group() == "{":
            open_braces.append(at)
        elif brace.group() == "}" and open_braces:
            opened = open_braces.pop()
            inside = opened + 1
            if text.endswith(_BOX, 0, inside):
                cuts += [(inside - len(_BOX), inside, ""), (at, at + 1, "")]
                if _BOX not in text[inside:at]:  # of boxes in boxes the innermost has the value
                    boxes[opened] = text[inside:at].strip()
    line = text.rfind("\n", 0, max(boxes, default=0)) + 1
    answers = {value for opened, value in boxes.items() if opened >= line}
    return edited(text, sorted(cuts)), answers.pop() if len(answers) == 1 else ""


def _latex(value: str) -> str:
    """A value as it stands between dollars."""
    if len(value) > 2 and value[0] == value[-1] == "$":
        return value[1:-1]
    return re.sub(r"(?<!\\)([$%])", r"\\\1", value)


def _written(value: str, convention: str) -> str:
    if convention == BOXED:
        return rf"$\boxed{{{value}}}$"
    plain = re.sub(r"\\([$%])", r"\1", value)
    if re.search(r"[\\^_{]", plain):
        plain = f"${value}$"
    return f"#### {plain}" if convention == HASHES else f"The answer is {plain}."
