"""Transformations: what each must not change, on text of many kinds."""

from __future__ import annotations

import re
from functools import partial
from itertools import groupby
from random import Random

import pytest

from drrlhf.transformations import PROMPT, TRANSFORMATIONS, from_column, transformed
from drrlhf.transformations.text import HANDLE, NEIGHBOURS, PREAMBLE, SENTENCE, URL

TEXTS = [
    "The film was great. We loved it, and so did they! Would we go again? Yes, of course: surely.",
    "# Title\n\n- first **point** of all\n- second `point`, really\n\nThat is everything there is.",
    "one two",
    "Ein Übermaß von Straßenlärm stört. Деревья растут медленно.",
    "x = f(a, b)  # 12 34",
    "",
    "   ",
]
words = re.compile(r"\w+").findall


def same(of):
    """Whether a text and what was made of it agree in ``of``."""
    return lambda old, new: of(old) == of(new)


def without(*parts):
    def of(text):
        for part in parts:
            text = text.replace(part, "")
        return text

    return of


def is_subsequence(old, new):
    rest = iter(words(old))
    return all(word in rest for word in words(new)) and len(words(old)) > len(words(new))


def one_key_apart(old, new):
    """Every word that changed is one typing error away, behind its first letter."""
    pairs = [(a, b) for a, b in zip(old.split(), new.split(), strict=True) if a != b]
    return bool(pairs) and all(
        a.lstrip("*`_([")[0] == b.lstrip("*`_([")[0] and abs(len(a) - len(b)) <= 1 and edits(a, b)
        for a, b in pairs
    )


def edits(a, b):
    start = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    end = next((i for i, (x, y) in enumerate(zip(a[::-1], b[::-1])) if x != y), min(len(a), len(b)))
    changed, now = a[start : len(a) - end], b[start : len(b) - end]
    return len(changed) <= 2 and len(now) <= 2


def undone(letters):
    return letters.translate(str.maketrans("асеорхуАСЕОРХ", "aceopxyACEOPX"))


def sentences(text):
    return sorted(re.split(r"(?<=[.!?])\s+", text.strip()))


KEEPS = {
    "typos": one_key_apart,
    "dropped_words": is_subsequence,
    "doubled_words": lambda old, new: [w for w, _ in groupby(words(new))] == words(old),
    "lower_case": same(str.casefold),
    "upper_case": same(str.casefold),
    "whitespace": same(str.split),
    "punctuation": same(without(" ")),
    "quotes": lambda old, new: new == f'"{old}"',
    "bold": same(lambda text: words(text)),
    "bullets": same(lambda text: words(text)),
    "no_markdown": same(lambda text: words(text)),
    "homoglyphs": lambda old, new: undone(new) == undone(old),
    "zero_width": lambda old, new: new.replace("\u200b", "") == old,
    "sentence": lambda old, new: new == old + SENTENCE,
    "repeated": lambda old, new: new.startswith(old) and set(words(new)) == set(words(old)),
    "sentence_order": same(sentences),
    "handle": lambda old, new: new == HANDLE + old,
    "url": lambda old, new: new == old + URL,
    "prompt_typos": one_key_apart,
    "prompt_lower_case": same(str.casefold),
    "prompt_whitespace": same(str.split),
    "prompt_preamble": lambda old, new: new == PREAMBLE + old,
}
# What these find nothing to act on in: by the place of the text.
NOTHING = {"typos": {2, 4}, "dropped_words": {2, 4}}


def test_every_transformation_has_a_property():
    assert set(KEEPS) == set(TRANSFORMATIONS)
    assert {name for name, one in TRANSFORMATIONS.items() if one.on == PROMPT} == {
        name for name in KEEPS if name.startswith("prompt_")
    }


@pytest.mark.parametrize("name", KEEPS)
def test_what_it_keeps_and_that_it_changes_something(name):
    apply, changed = TRANSFORMATIONS[name].apply, 0
    for text in TEXTS:
        for seed in range(20):
            new = apply(text, draw=Random(seed))
            assert new == apply(text, draw=Random(seed))
            if new != text:
                changed += 1
                assert KEEPS[name](text, new), (text, new)
    assert changed >= 20
    draws = {apply(TEXTS[0], draw=Random(seed)) for seed in range(20)}
    drawn = {"typos", "prompt_typos", "dropped_words", "doubled_words", "homoglyphs", "zero_width"}
    assert (len(draws) > 5) == (name in drawn)


def test_neighbouring_keys_are_mutual():
    assert set(NEIGHBOURS) == set("abcdefghijklmnopqrstuvwxyz")
    assert all(
        key in NEIGHBOURS[other]
        for key, others in NEIGHBOURS.items()
        for other in others
        if other.isalpha()
    )


def test_what_joins_an_answer_to_its_prompt_stays():
    row = {"prompt": "Q:", "chosen": " Yes it is.", "rejected": "\n\nNo."}
    new = transformed(row, chosen=str.upper, rejected=str.upper)
    assert new == {"prompt": "Q:", "chosen": " YES IT IS.", "rejected": "\n\nNO."}
    assert transformed(row, prompt=str.lower) == row | {"prompt": "q:"}


def test_of_messages_the_last_one_changes():
    talk = [
        {"role": "user", "content": "A"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "C"},
        {"role": "assistant", "content": "d"},
    ]
    row = {"chosen": talk, "rejected": talk[:2]}
    new = transformed(row, chosen=str.upper)
    assert [m["content"] for m in new["chosen"]] == ["A", "b", "C", "D"]
    assert new["rejected"] == talk[:2] and [m["content"] for m in talk] == ["A", "b", "C", "d"]
    new = transformed(row, prompt=str.lower)  # it lies in both answers
    assert [m["content"] for m in new["chosen"]] == ["A", "b", "c", "d"]
    assert [m["content"] for m in new["rejected"]] == ["a", "b"]
    long = [{"role": "user", "content": "explain gravity slowly please"}, talk[1]]
    mistyped = partial(TRANSFORMATIONS["prompt_typos"].apply, draw=Random(0))
    new = transformed({"chosen": long, "rejected": [*long]}, prompt=mistyped)
    assert new["chosen"][0] == new["rejected"][0] != long[0]
    called = [{"role": "assistant", "tool_calls": []}]
    assert transformed({"chosen": called, "rejected": called}, chosen=str.upper)["chosen"] == called


def test_forms_from_columns():
    row = {"chosen": "a", "rejected": "b", "chosen@long": "aa", "rejected@long": None}
    assert from_column(row, "chosen", "long") == row | {"chosen": "aa"}
    assert from_column(row, "rejected", "long") == row
    assert from_column(row, "chosen", "short") == row
