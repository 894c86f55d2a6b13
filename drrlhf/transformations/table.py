"""The transformations: what each does, to what, and where it stops keeping the meaning."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from typing import Any, Protocol

from drrlhf.transformations import code, layout, maths, sayings, words

ANSWER, PROMPT = "answer", "prompt"
FORM, BIAS, ATTACK = KINDS = ("form", "bias", "attack")
RATE = ":"  # typos:0.2 has typing errors in 20 % of the words
_ALWAYS = "always"
_NEVER = "no"
_CASE = "not where case carries meaning, as in code"
_LAYOUT = "not where the layout carries meaning, as in code or poems"
_CODE = "not in code"
_SPELLING = "not in code, numbers with letters, or spelling questions"
_MARKDOWN = "not where markdown carries meaning, as in an answer with code"
_BEFORE = "not where code or a heading begins it"
_BEHIND = "not where code or a final answer ends it"
_NAMED = "not where something else reads a variable by its name"


class Apply(Protocol):
    """A function of `words`, `layout`, `sayings`, `maths` or `code`."""

    def __call__(self, text: str, draw: Random) -> str: ...


class Put(Protocol):
    """A function of `sayings` that puts words somewhere."""

    def __call__(self, text: str, draw: Random, words: str) -> str: ...


@dataclass(frozen=True)
class Transformation:
    """``apply(text, draw)`` to answers or to prompts (``on``).

    ``what`` it is, in words, and when it ``keeps`` the meaning. ``kind``: a FORM says the same in
    another way; a BIAS adds words without substance that biased reward models like; an ATTACK makes
    an answer worse or replaces it, for rejected answers alone. ``rate`` is the share of the words
    that it changes, or keeps; None where it takes none.
    """

    what: str
    apply: Apply
    keeps: str = _ALWAYS
    on: str = ANSWER
    kind: str = FORM
    rate: float | None = None

    def at(self, rate: float) -> Transformation:
        """The same at another rate."""
        assert self.rate is not None
        apply: Any = self.apply  # one that takes a rate
        return replace(
            self, what=f"{self.what} ({rate:g})", apply=partial(apply, rate=rate), rate=rate
        )


def _added(
    what: str, put: Put, added: str, keeps: str = _ALWAYS, on: str = ANSWER, kind: str = FORM
) -> Transformation:
    return Transformation(what, partial(put, words=added), keeps, on, kind)


def _forms() -> dict[str, Transformation]:
    """Forms of answers."""
    spelling = partial(Transformation, keeps=_SPELLING, rate=words.TYPOS)
    return {
        "typos": spelling(
            "typos: letters of some words swapped, mistaken, doubled or left out", words.typos
        ),
        "swapped_letters": spelling(
            "typos: two letters of some words swapped", words.swapped_letters
        ),
        "wrong_letters": spelling(
            "typos: a letter of some words mistaken for its neighbour", words.wrong_letters
        ),
        "extra_letters": spelling("typos: a letter more in some words", words.extra_letters),
        "missing_letters": spelling(
            "typos: a letter of some words left out", words.missing_letters
        ),
        "dropped_words": Transformation(
            "words: some words left out",
            words.dropped_words,
            "mostly: a lost 'not' turns it",
            rate=words.WORDS,
        ),
        "doubled_words": Transformation(
            "words: some words written twice", words.doubled_words, _CODE, rate=words.WORDS
        ),
        "lower_case": Transformation("case: in lower case", layout.lower_case, _CASE),
        "upper_case": Transformation("case: in capitals", layout.upper_case, _CASE),
        "whitespace": Transformation(
            "whitespace: doubled spaces and a blank line behind", layout.whitespace, _LAYOUT
        ),
        "paragraphs": Transformation(
            "whitespace: every sentence a paragraph", layout.paragraphs, _LAYOUT
        ),
        "punctuation": Transformation("punctuation: a space before it", layout.punctuation, _CODE),
        "quotes": Transformation("quotes: around the text", layout.quotes, _CODE),
        "curly_quotes": Transformation(
            "quotes: typographic ones and apostrophes", layout.curly_quotes, _CODE
        ),
        "bold": Transformation("markdown: the first sentence in bold", layout.bold, _LAYOUT),
        "heading": Transformation("markdown: a heading above", layout.heading),
        "bullets": Transformation("markdown: sentences as a list", layout.bullets, _LAYOUT),
        "numbered": Transformation(
            "markdown: sentences as a numbered list", layout.numbered, _LAYOUT
        ),
        "code_fence": Transformation(
            "markdown: all of it as a block of code", layout.code_fence, _MARKDOWN
        ),
        "no_markdown": Transformation("markdown: taken out", layout.no_markdown, _LAYOUT),
        "homoglyphs": Transformation(
            "characters: some words in letters that look alike",
            words.homoglyphs,
            _CODE,
            rate=words.TYPOS,
        ),
        "zero_width": Transformation(
            "characters: some that show nothing", words.zero_width, _CODE, rate=words.TYPOS
        ),
        "sentence": _added(
            "length: an empty closing sentence", sayings.behind, sayings.SENTENCE, _BEHIND
        ),
        "repeated": Transformation("length: the last sentence once more", layout.repeated, _BEHIND),
        "sentence_order": Transformation(
            "order: the sentences last to first",
            layout.reversed_sentences,
            "not where one sentence builds on another",
        ),
        "handle": _added("noise: a handle in front", sayings.before, sayings.HANDLE, _BEFORE),
        "url": _added("noise: an address behind", sayings.behind, sayings.URL, _BEHIND),
        "true_is_true": _added(
            "noise: 'and true is true' behind, five times",
            sayings.behind,
            sayings.TRUE_IS_TRUE,
            _BEHIND,
        ),
        "math_format": Transformation(
            r"maths: the final answer in another of `\boxed{}`, `####` and a sentence",
            maths.math_format,
            "not where the question asks for a format",
        ),
        "code_comments": Transformation(
            "code: a comment on the first line of blocks",
            code.code_comments,
            "not where the answer counts lines",
        ),
        "code_renamed": Transformation(
            "code: variables of Python blocks renamed", code.code_renamed, _NAMED
        ),
    }


def _biases() -> dict[str, Transformation]:
    """What is added to answers that biased reward models then like better."""
    opener = partial(_added, put=sayings.before, keeps=_BEFORE, kind=BIAS)
    close = partial(_added, put=sayings.behind, keeps=_BEHIND, kind=BIAS)
    return {
        "opener_flattery": opener("opener: praise of the question", added=sayings.FLATTERY),
        "opener_hedging": opener(
            "opener: hedging",
            added=sayings.HEDGING,
            keeps="mostly: it makes an answer less certain",
        ),
        "opener_jargon": opener("opener: jargon", added=sayings.JARGON),
        "authority": opener("opener: an appeal to experts", added=sayings.AUTHORITY),
        "vague": close("close: a vague sentence", added=sayings.VAGUE),
        "self_praise": close("close: praise of itself", added=sayings.SELF_PRAISE),
        "longer": close("length: sentences without substance", added=sayings.LONGER),
        "listed": Transformation(
            "structure: a title, and sentences as a list", layout.listed, _LAYOUT, kind=BIAS
        ),
    }


def _attacks() -> dict[str, Transformation]:
    """What makes a rejected answer worse, or stands in its place."""
    attack = partial(Transformation, keeps=_NEVER, kind=ATTACK)
    added = partial(_added, keeps=_NEVER, kind=ATTACK)
    return {
        "empty": added("attack: nothing at all", sayings.instead, ""),
        "truncated": attack("attack: only the first words", words.truncated, rate=words.KEPT),
        "shuffled_words": attack("attack: its words in any order", words.shuffled_words),
        "master_colon": added("attack: a colon alone", sayings.instead, sayings.COLON),
        "master_thought": added(
            "attack: 'Thought process:' alone", sayings.instead, sayings.THOUGHT
        ),
        "master_solution": added(
            "attack: the announcement of a solution alone", sayings.instead, sayings.STEP_BY_STEP
        ),
        "judge_instruction": added(
            "attack: an instruction to the judge behind", sayings.behind, sayings.TO_THE_JUDGE
        ),
    }


def _prompts() -> dict[str, Transformation]:
    """Forms of prompts."""
    form = partial(Transformation, on=PROMPT)
    added = partial(_added, on=PROMPT)
    return {
        "prompt_typos": form("prompt: typos", words.typos, _SPELLING, rate=words.TYPOS),
        "prompt_lower_case": form("prompt: in lower case", layout.lower_case, _CASE),
        "prompt_upper_case": form("prompt: in capitals", layout.upper_case, _CASE),
        "prompt_whitespace": form(
            "prompt: doubled spaces and a blank line behind", layout.whitespace, _LAYOUT
        ),
        "prompt_punctuation": form("prompt: a space before punctuation", layout.punctuation, _CODE),
        "prompt_preamble": added(
            "prompt: something else said before",
            sayings.before,
            sayings.PREAMBLE,
            keeps="not where the answer refers back",
        ),
        "prompt_system": added(
            "prompt: a neutral instruction to the assistant before", sayings.before, sayings.SYSTEM
        ),
        "prompt_jailbreak": added(
            "prompt: a game without restrictions before",
            sayings.before,
            sayings.JAILBREAK,
            keeps="not quite, yet the answers must be judged alike",
        ),
    }


TRANSFORMATIONS: Mapping[str, Transformation] = _forms() | _biases() | _prompts() | _attacks()


def lookup(
    name: str, argument: str = "name", kinds: Sequence[str] = KINDS, also: str = ""
) -> Transformation:
    """The transformation of that name, which may end in a rate, as in ``typos:0.2``.

    ``argument`` is what errors call the name; ``kinds`` those that it may be of; ``also``, in
    words, what else the argument could have been.

    Raises:
        ValueError: there is none of that name and kind, it takes no rate, or the rate is none.
    """
    base, colon, text = name.partition(RATE)
    found = TRANSFORMATIONS.get(base)
    if found is None:
        names = _named(kinds)
        near = difflib.get_close_matches(base, names)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(
            f"{argument}: expected names among {', '.join([*names, *([also] if also else [])])}, "
            f"got {name!r}{hint}"
        )
    if found.kind not in kinds:
        raise ValueError(
            f"{argument}: expected a {' or '.join(kinds)}, got {name!r}, which is of the kind "
            f"{found.kind}; use one of {', '.join(_named(kinds))}"
        )
    if not colon:
        return found
    if found.rate is None:
        rated = [key for key in _named(kinds) if TRANSFORMATIONS[key].rate is not None]
        raise ValueError(
            f"{argument}: {base} takes no rate, got {name!r}; leave it out, or use one of "
            f"{', '.join(rated)}"
        )
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate <= 1:
        raise ValueError(
            f"{argument}: expected {base}{RATE}RATE with a rate in (0, 1], as in "
            f"{base}{RATE}{found.rate:g}, got {name!r}"
        )
    return found.at(rate)


def _named(kinds: Sequence[str]) -> list[str]:
    return [name for name, one in TRANSFORMATIONS.items() if one.kind in kinds]
