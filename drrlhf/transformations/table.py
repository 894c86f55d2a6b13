"""The transformations: what each does, to what, and where it stops keeping the meaning."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from drrlhf.transformations import code, layout, maths, sayings, words
from drrlhf.transformations.sayings import before, behind, instead

ANSWER, PROMPT = "answer", "prompt"
FORM, BIAS, ATTACK = KINDS = ("form", "bias", "attack")
RATE = ":"  # typos:0.2 has typing errors in 20 % of the words
_ALWAYS = "always"
_NEVER = "no"
_CASE = "not where case carries meaning, as in code"
_LAYOUT = "not where the layout carries meaning, as in code or poems"
_CODE = "not in code"
_SPELLING = "not in code, numbers with letters, spelling questions, or answers of one word"
_MARKDOWN = "not where markdown carries meaning, as in an answer with code"
_BEFORE = "not where code or a heading begins it"
_BEHIND = "not where code or a final answer ends it"
_NAMED = "not where something else reads a variable by its name"


# (text, draw), and the rate where there is one: of `words`, `layout`, `sayings`, `maths` or `code`.
Apply = Callable[..., str]


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
        what, apply = f"{self.what} ({rate:g})", partial(self.apply, rate=rate)
        return replace(self, what=what, apply=apply, rate=rate)


_spelling = partial(Transformation, keeps=_SPELLING, rate=words.TYPOS)
_bias = partial(Transformation, kind=BIAS)
_prompt = partial(Transformation, on=PROMPT)
_attack = partial(Transformation, keeps=_NEVER, kind=ATTACK)

TRANSFORMATIONS: Mapping[str, Transformation] = {
    # Forms of answers.
    "typos": _spelling(
        "typos: letters of some words swapped, mistaken, doubled or left out", words.typos
    ),
    "swapped_letters": _spelling("typos: two letters of some words swapped", words.swapped_letters),
    "wrong_letters": _spelling(
        "typos: a letter of some words mistaken for its neighbour", words.wrong_letters
    ),
    "extra_letters": _spelling("typos: a letter more in some words", words.extra_letters),
    "missing_letters": _spelling("typos: a letter of some words left out", words.missing_letters),
    "dropped_words": Transformation(
        "words: some words left out",
        words.dropped_words,
        "mostly: a lost 'never' or 'cannot' turns it",
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
    "heading": Transformation("markdown: a heading above", layout.heading, _BEFORE),
    "bullets": Transformation("markdown: sentences as a list", layout.bullets, _LAYOUT),
    "numbered": Transformation("markdown: sentences as a numbered list", layout.numbered, _LAYOUT),
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
    "sentence": Transformation(
        "length: an empty closing sentence", behind(sayings.SENTENCE), _BEHIND
    ),
    "repeated": Transformation("length: the last sentence once more", layout.repeated, _BEHIND),
    "sentence_order": Transformation(
        "order: the sentences last to first",
        layout.reversed_sentences,
        "not where one sentence builds on another",
    ),
    "handle": Transformation("noise: a handle in front", before(sayings.HANDLE), _BEFORE),
    "url": Transformation("noise: an address behind", behind(sayings.URL), _BEHIND),
    "true_is_true": Transformation(
        "noise: 'and true is true' behind, five times", behind(sayings.TRUE_IS_TRUE), _BEHIND
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
    # What is added to answers that biased reward models then like better.
    "opener_flattery": _bias("opener: praise of the question", before(sayings.FLATTERY), _BEFORE),
    "opener_hedging": _bias(
        "opener: hedging", before(sayings.HEDGING), "mostly: it makes an answer less certain"
    ),
    "opener_jargon": _bias("opener: jargon", before(sayings.JARGON), _BEFORE),
    "authority": _bias("opener: an appeal to experts", before(sayings.AUTHORITY), _BEFORE),
    "vague": _bias("close: a vague sentence", behind(sayings.VAGUE), _BEHIND),
    "self_praise": _bias("close: praise of itself", behind(sayings.SELF_PRAISE), _BEHIND),
    "longer": _bias("length: sentences without substance", behind(sayings.LONGER), _BEHIND),
    "listed": _bias("structure: a title, and sentences as a list", layout.listed, _LAYOUT),
    # Forms of prompts.
    "prompt_typos": _prompt("prompt: typos", words.typos, _SPELLING, rate=words.TYPOS),
    "prompt_lower_case": _prompt("prompt: in lower case", layout.lower_case, _CASE),
    "prompt_upper_case": _prompt("prompt: in capitals", layout.upper_case, _CASE),
    "prompt_whitespace": _prompt(
        "prompt: doubled spaces and a blank line behind", layout.whitespace, _LAYOUT
    ),
    "prompt_punctuation": _prompt("prompt: a space before punctuation", layout.punctuation, _CODE),
    "prompt_preamble": _prompt(
        "prompt: something else said before",
        before(sayings.PREAMBLE),
        "not where the answer refers back",
    ),
    "prompt_system": _prompt(
        "prompt: a neutral instruction to the assistant before", before(sayings.SYSTEM)
    ),
    "prompt_jailbreak": _prompt(
        "prompt: a game without restrictions before",
        before(sayings.JAILBREAK),
        "not quite, yet the answers must be judged alike",
    ),
    # What makes a rejected answer worse, or stands in its place.
    "empty": _attack("attack: nothing at all", instead("")),
    "truncated": _attack("attack: only the first words", words.truncated, rate=words.KEPT),
    "shuffled_words": _attack("attack: its words in any order", words.shuffled_words),
    "master_colon": _attack("attack: a colon alone", instead(sayings.COLON)),
    "master_thought": _attack("attack: 'Thought process:' alone", instead(sayings.THOUGHT)),
    "master_solution": _attack(
        "attack: the announcement of a solution alone", instead(sayings.STEP_BY_STEP)
    ),
    "judge_instruction": _attack(
        "attack: an instruction to the judge behind", behind(sayings.TO_THE_JUDGE)
    ),
}


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
