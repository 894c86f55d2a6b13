"""The transformations: what each does, to what, and where it stops keeping the meaning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Protocol

from drrlhf.transformations import text as texts

ANSWER, PROMPT = "answer", "prompt"
_ALWAYS = "always"


class Apply(Protocol):
    """A function of `drrlhf.transformations.text`."""

    def __call__(self, text: str, draw: Random) -> str: ...


@dataclass(frozen=True)
class Transformation:
    """``apply(text, draw)`` to answers or to prompts (``on``); ``what`` it is, in words, and when
    it ``keeps`` the meaning."""

    what: str
    apply: Apply
    keeps: str = _ALWAYS
    on: str = ANSWER


def _names() -> Mapping[str, Transformation]:
    case = "not where case carries meaning, as in code"
    layout = "not where the layout carries meaning, as in code or poems"
    answers = {
        "typos": Transformation(
            "typos: letters of some words swapped, mistaken, doubled or left out",
            texts.typos,
            "not in code, numbers with letters, or spelling questions",
        ),
        "dropped_words": Transformation(
            "words: some words left out", texts.dropped_words, "mostly: a lost 'not' turns it"
        ),
        "doubled_words": Transformation("words: some words written twice", texts.doubled_words),
        "lower_case": Transformation("case: in lower case", texts.lower_case, case),
        "upper_case": Transformation("case: in capitals", texts.upper_case, case),
        "whitespace": Transformation(
            "whitespace: doubled spaces and a blank line behind", texts.whitespace, layout
        ),
        "punctuation": Transformation(
            "punctuation: a space before it", texts.punctuation, "not in code"
        ),
        "quotes": Transformation("quotes: around the text", texts.quotes),
        "bold": Transformation("markdown: the first sentence in bold", texts.bold, layout),
        "bullets": Transformation("markdown: sentences as a list", texts.bullets, layout),
        "no_markdown": Transformation("markdown: taken out", texts.no_markdown, layout),
        "homoglyphs": Transformation(
            "characters: some words in letters that look alike", texts.homoglyphs, "not in code"
        ),
        "zero_width": Transformation(
            "characters: some that show nothing", texts.zero_width, "not in code"
        ),
        "sentence": Transformation("length: an empty closing sentence", texts.sentence),
        "repeated": Transformation("length: the last sentence once more", texts.repeated),
        "sentence_order": Transformation(
            "order: the sentences last to first",
            texts.reversed_sentences,
            "not where one sentence builds on another",
        ),
        "handle": Transformation("noise: a handle in front", texts.handle),
        "url": Transformation("noise: an address behind", texts.url),
    }
    prompts = {
        "prompt_typos": Transformation(
            "prompt: typos", texts.typos, answers["typos"].keeps, PROMPT
        ),
        "prompt_lower_case": Transformation(
            "prompt: in lower case", texts.lower_case, case, PROMPT
        ),
        "prompt_whitespace": Transformation(
            "prompt: doubled spaces and a blank line behind", texts.whitespace, layout, PROMPT
        ),
        "prompt_preamble": Transformation(
            "prompt: something else said before",
            texts.preamble,
            "not where the answer refers back",
            PROMPT,
        ),
    }
    return answers | prompts


TRANSFORMATIONS: Mapping[str, Transformation] = _names()
