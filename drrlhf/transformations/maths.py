r"""The final answer of a mathematical text, in another of three conventions.

``$\boxed{36}$`` is MATH's, a last line ``#### 36`` GSM8K's, and "The answer is 36." that of many
prompts. reWordBench (arXiv 2503.11751) changes formats of answers, too.
"""

from __future__ import annotations

import re
from random import Random

_BOX = r"\boxed{"
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
    r"""The text without ``\boxed``, and what was in the last of them; "" where there is none."""
    value, at = "", 0
    while (start := text.find(_BOX, at)) >= 0:
        inside = start + len(_BOX)
        close = _closing(text, inside)
        if close is None:
            at = inside
        else:
            value, at = text[inside:close], start
            text = text[:start] + value + text[close + 1 :]
    return text, value.strip()


def _closing(text: str, start: int) -> int | None:
    """Where the brace closes that was opened before ``start``."""
    depth = 1
    for found in re.finditer(r"\\.|[{}]", text[start:], re.S):
        depth += {"{": 1, "}": -1}.get(found.group(), 0)
        if not depth:
            return start + found.start()
    return None


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
