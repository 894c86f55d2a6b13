"""Transformations: what each must not change, on text of many kinds."""

from __future__ import annotations

import pickle
import re
import unicodedata
from functools import partial
from itertools import groupby, product
from random import Random

import pytest

from drrlhf.transformations import (
    ATTACK,
    BIAS,
    FORM,
    KINDS,
    PROMPT,
    TRANSFORMATIONS,
    from_column,
    lookup,
    sayings,
    transformed,
)
from drrlhf.transformations.layout import HEADING, KEY_POINTS
from drrlhf.transformations.words import NEIGHBOURS

CODE = """\
Here is "the" function, and how it's called.

```python
def mean(values):
    amount = 0
    for one in values:
        amount += one
    return amount / len(values)
```

It goes over all of them just once."""
MATHS = "Three boxes of twelve eggs each hold $3 \\cdot 12$ eggs:\n\n#### 36"
TEXTS = [
    "The film was great. We loved it, and so did they! Would we go again? Yes, of course: surely.",
    "# Title\n\n- first **point** of all\n- second `point`, really\n\nThat is everything there is.",
    "one two",
    "Ein Übermaß von Straßenlärm stört. Деревья растут медленно.",
    "x = f(a, b)  # 12 34",
    CODE,
    MATHS,
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


def one_error(of):
    """Every word that changed did so by one typing error as ``of(old, new, at)`` says, at a place
    behind its first letter."""

    def found(old, new):
        split = re.compile(r"[^\W\d_]+").findall
        pairs = [(a, b) for a, b in zip(split(old), split(new), strict=True) if a != b]
        return bool(pairs) and all(
            any(a[:at] == b[:at] and of(a, b, at) for at in range(1, len(a))) for a, b in pairs
        )

    return found


def swapped(old, new, at):
    return old[at : at + 2] == new[at : at + 2][::-1] and old[at + 2 :] == new[at + 2 :]


def near(old, new, at):
    return new[at].lower() in NEIGHBOURS.get(old[at].lower(), old[at])


def wrong(old, new, at):
    return len(old) == len(new) and near(old, new, at) and old[at + 1 :] == new[at + 1 :]


def extra(old, new, at):
    return len(old) < len(new) and near(old, new, at) and old[at:] == new[at + 1 :]


def missing(old, new, at):
    return old[at + 1 :] == new[at:]


def straight(text):
    return text.translate(str.maketrans("“”‘’", "\"\"''"))


def numbers_in_front(old, new):
    found = [re.match(r"(\d+)\. (.*)", line, re.S) for line in re.split(r"\n(?=\d+\. )", new)]
    return (
        [int(one[1]) for one in found] == list(range(1, len(found) + 1))
        and sorted(one[2] for one in found) == sentences(old)
        and len(found) > 1
    )


def final_answer(text):
    """Of `MATHS` and what becomes of it: the value, how it is told, and what goes before."""
    for how in (r"\n#### (\d+)", r"\nThe answer is (\d+)\.", r"\n\$\\boxed\{(\d+)\}\$"):
        found = re.search(how + r"\Z", text)
        if found:
            return found[1], how, text[: found.start()].strip()
    raise AssertionError(text)


def another_format(old, new):
    (value, how, before), (same_value, other, same_before) = final_answer(old), final_answer(new)
    return value == same_value == "36" and how != other and before == same_before


def put_before(words):
    return lambda old, new: new == words + old


def put_behind(words):
    return lambda old, new: new == old + words


def becomes(words):
    return lambda old, new: new == words


def undone(letters):
    return letters.translate(str.maketrans("асеорхуАСЕОРХ", "aceopxyACEOPX"))


def sentences(text):
    return sorted(re.split(r"(?<=[.!?])\s+", text.strip()))


KEEPS = {
    "typos": one_key_apart,
    "swapped_letters": one_error(swapped),
    "wrong_letters": one_error(wrong),
    "extra_letters": one_error(extra),
    "missing_letters": one_error(missing),
    "dropped_words": is_subsequence,
    "doubled_words": lambda old, new: [w for w, _ in groupby(words(new))] == words(old),
    "lower_case": same(str.casefold),
    "upper_case": same(str.casefold),
    "whitespace": same(str.split),
    "paragraphs": same(str.split),
    "punctuation": same(without(" ")),
    "curly_quotes": lambda old, new: straight(new) == old,
    "quotes": lambda old, new: new == f'"{old}"',
    "bold": same(lambda text: words(text)),
    "heading": put_before(HEADING),
    "bullets": same(lambda text: words(text)),
    "numbered": numbers_in_front,
    "code_fence": lambda old, new: re.fullmatch("(`{3,})\n(.*)\n\\1", new, re.S)[2] == old,
    "no_markdown": same(lambda text: words(text.replace("```python", ""))),
    "homoglyphs": lambda old, new: undone(new) == undone(old),
    "zero_width": lambda old, new: new.replace("\u200b", "") == old,
    "sentence": put_behind(sayings.SENTENCE),
    "repeated": lambda old, new: new.startswith(old) and set(words(new)) == set(words(old)),
    "sentence_order": same(sentences),
    "handle": put_before(sayings.HANDLE),
    "url": put_behind(sayings.URL),
    "true_is_true": put_behind(" and true is true" * 5),
    "math_format": another_format,
    "code_comments": lambda old, new: (
        new == old.replace("```python\n", "```python\n# This is the code.\n")
    ),
    "code_renamed": lambda old, new: new.replace("my_", "") == old and new.count("my_amount") == 3,
    "opener_flattery": put_before(sayings.FLATTERY),
    "opener_hedging": put_before(sayings.HEDGING),
    "opener_jargon": put_before(sayings.JARGON),
    "authority": put_before(sayings.AUTHORITY),
    "vague": put_behind(sayings.VAGUE),
    "self_praise": put_behind(sayings.SELF_PRAISE),
    "longer": put_behind(sayings.LONGER),
    "listed": lambda old, new: (
        new.startswith(KEY_POINTS) and words(new.removeprefix(KEY_POINTS)) == words(old)
    ),
    "prompt_typos": one_key_apart,
    "prompt_lower_case": same(str.casefold),
    "prompt_upper_case": same(str.casefold),
    "prompt_whitespace": same(str.split),
    "prompt_punctuation": same(without(" ")),
    "prompt_preamble": put_before(sayings.PREAMBLE),
    "prompt_system": put_before(sayings.SYSTEM),
    "prompt_jailbreak": put_before(sayings.JAILBREAK),
    "empty": becomes(""),
    "truncated": lambda old, new: (
        old.startswith(new) and len(new.split()) == max(1, len(old.split()) // 2)
    ),
    "shuffled_words": same(lambda text: sorted(text.split())),
    "master_colon": becomes(":"),
    "master_thought": becomes("Thought process:"),
    "master_solution": becomes("Let's solve this problem step by step."),
    "judge_instruction": put_behind(sayings.TO_THE_JUDGE),
}
RATED = {"typos", "prompt_typos", "dropped_words", "doubled_words", "homoglyphs", "zero_width"}
RATED |= {"swapped_letters", "wrong_letters", "extra_letters", "missing_letters"}
BIASES = {"opener_flattery", "opener_hedging", "opener_jargon", "authority", "vague", "self_praise"}
BIASES |= {"longer", "listed"}
ATTACKS = {"empty", "truncated", "shuffled_words", "judge_instruction"}
ATTACKS |= {"master_colon", "master_thought", "master_solution"}


def test_every_transformation_has_a_property():
    assert set(KEEPS) == set(TRANSFORMATIONS)
    assert {name: one.kind for name, one in TRANSFORMATIONS.items()} == {
        name: ATTACK if name in ATTACKS else BIAS if name in BIASES else FORM for name in KEEPS
    }
    assert len({one.what for one in TRANSFORMATIONS.values()}) == len(KEEPS)  # names in reports
    assert {name for name, one in TRANSFORMATIONS.items() if one.on == PROMPT} == {
        name for name in KEEPS if name.startswith("prompt_")
    }


def test_a_transformation_can_be_sent_to_another_process():
    for name, one in TRANSFORMATIONS.items():
        sent = pickle.loads(pickle.dumps(one))
        assert sent.apply(TEXTS[0], draw=Random(1)) == one.apply(TEXTS[0], draw=Random(1)), name


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
    assert (len(draws) > 5) == (name in RATED | {"shuffled_words"})


def test_neighbouring_keys_are_mutual():
    assert set(NEIGHBOURS) == set("abcdefghijklmnopqrstuvwxyz")
    assert all(
        key in NEIGHBOURS[other]
        for key, others in NEIGHBOURS.items()
        for other in others
        if other.isalpha()
    )


GIVEN = {
    "typos": "We loved it, and so did they! Suerly, of course.",
    "dropped_words": "We loved it, and so did they!, of course.",
    "doubled_words": "We loved it, and so did they! Surely Surely, of course.",
    "homoglyphs": "We loved it, and so did they! Sur\u0435l\u0443, of course.",
    "zero_width": "We loved it, and so did they! Sur\u200bely, of course.",
}


def test_what_a_draw_gives_has_not_changed():
    """Experiments that are kept were made with these."""
    text = "We loved it, and so did they! Surely, of course."
    assert {name: TRANSFORMATIONS[name].apply(text, draw=Random(7)) for name in GIVEN} == GIVEN


# Twenty words of four letters and more, none with the same letter twice in a row, and ten shorter.
LONG = (
    "maps show roads that lead from towns over high hard desert where winds blow sand around "
    "ancient stones beside rivers"
)
SHORT = "a is of to in it by on at we"


@pytest.mark.parametrize(("rate", "count", "kept"), [(0.04, 1, 1), (0.25, 5, 7), (1, 20, 30)])
def test_a_rate_is_the_share_of_words(rate, count, kept):
    text = f"{LONG} {SHORT}"

    def made(name):
        return lookup(f"{name}:{rate}").apply(text, draw=Random(1))

    assert len(made("dropped_words").split()) == 30 - count
    assert len(made("doubled_words").split()) == 30 + count
    assert made("zero_width").count("\u200b") == count
    assert len(made("extra_letters")) == len(text) + count
    assert len(made("missing_letters")) == len(text) - count
    for name in ("typos", "prompt_typos", "swapped_letters", "wrong_letters"):
        pairs = zip(made(name).split(), text.split(), strict=True)
        assert sum(a != b for a, b in pairs) == count, name
    assert len(undone(made("homoglyphs"))) == len(text) and undone(made("homoglyphs")) == text
    assert made("truncated") == " ".join(text.split()[:kept])


FEW = [
    "Paris",
    "Paris.",
    "42 apples",
    "Three apples and two pears",
    "The answer is certainly right.",
]


@pytest.mark.parametrize("name", ["dropped_words", "doubled_words", "dropped_words:1"])
def test_texts_of_few_words_lose_and_double_none(name):
    apply = lookup(name).apply
    assert {text: apply(text, draw=Random(0)) for text in FEW} == {text: text for text in FEW}
    for more in ("Four words that change.", "Of all the words many more may change"):
        assert apply(more, draw=Random(0)) != more


# Sentences without spaces between words, some with spaces between clauses.
UNSPACED = {
    "Chinese": "今天天气很好我们去公园玩吧。明天可能会下雨，所以我们留在家里看书。"
    "后天我们再出去走走好不好？大家都说这个主意非常不错。",
    "rare ideographs": "𠀀𠀁𠀂𠀃𠀄 㐀㐁㐂㐃㐄 豈更車賈滑 〇〇〇〇〇 人々人々人々 ㄅㄆㄇㄈㄉ",
    "Japanese": "きょうはとてもいいてんきですね。コンピューターをつかいます。"
    "東京都庁展望台に行きました。ﾃﾚﾋﾞﾃﾚﾋﾞ",
    "Thai": "วันนี้อากาศดีมาก เราไปเที่ยวสวนสาธารณะกันเถอะ พรุ่งนี้ฝนอาจจะตก",
    "Lao": "ມື້ນີ້ອາກາດດີຫຼາຍ ພວກເຮົາໄປສວນສາທາລະນະ ພາສາລາວ ພາສາລາວ",
    "Khmer": "អង្គរវត្ត នគរវត្ត នគរវត្ត នគរវត្ត",
    "Myanmar": "ကခဂဃင စဆဇဈည တထဒဓန ပဖဗဘမ",
    "Tai": "ᥐᥑᥒᥓᥔ ᦀᦁᦂᦃᦄ ᨠᨡᨢᨣᨤ ꪀꪁꪂꪃꪄ",
}


@pytest.mark.parametrize("script", UNSPACED)
def test_clauses_of_scripts_without_spaces_are_no_words(script):
    text = UNSPACED[script]
    assert len(re.findall(r"[^\W\d_]{4,}", text)) >= 4  # enough, were they words
    drawing = RATED | {"shuffled_words"}
    for name in drawing:
        for seed in range(5):
            assert TRANSFORMATIONS[name].apply(text, draw=Random(seed)) == text, name
    mixed = f"{text} Python makes sorting simple"
    for name in drawing:  # what has spaces changes beside it
        new = TRANSFORMATIONS[name].apply(mixed, draw=Random(3))
        assert new.startswith(text) and new != mixed, name


# Words of four letters and more, by hand, and what stands beside them.
MARKED = {
    "Hindi": ("नमकपारे समझदार अदरकवाला अकसरीन", "मुझे और में पर"),
    "Tamil": ("மிகவும் அழகானது அனைவரும் சொல்கிறார்கள்", "என்று"),
    "joiners": ("می\u200cخواهم نمی\u200cدانم کتاب\u200cها دانشگاه\u0651", "از به"),
    "accents taken apart": (unicodedata.normalize("NFD", "résumé théâtre québéc société"), "le là"),
}


@pytest.mark.parametrize("language", MARKED)
def test_a_word_has_its_marks(language):
    """Whole words are left out and doubled; no letter changes, so that none loses its mark."""
    long, short = MARKED[language]
    text = f"{short} {long}, {short}."
    dropped, doubled = set(), set()
    for seed in range(40):
        dropped.add(TRANSFORMATIONS["dropped_words"].apply(text, draw=Random(seed)))
        doubled.add(TRANSFORMATIONS["doubled_words"].apply(text, draw=Random(seed)))
        for name in RATED - {"dropped_words", "doubled_words", "homoglyphs"}:
            assert TRANSFORMATIONS[name].apply(text, draw=Random(seed)) == text, name
    words = long.split()
    assert dropped == {text.replace(f" {word}", "") for word in words}
    assert doubled == {text.replace(word, f"{word} {word}") for word in words}
    assert _typed(f"{text} Python") == {f"{text} {word}" for word in _typed("Python")}


def _typed(text):
    return {TRANSFORMATIONS["typos"].apply(text, draw=Random(seed)) for seed in range(20)}


NAMES = "https://en.example.org/wiki/Some_Page (see docs/guide/start.md) by john.miller@example.org"
NAMES += " or @someone, with __init__ and snake_case_name"
NAMES += r" $\sqrt{2}$ C:\Users\Jane \boxed{none}"


def test_addresses_paths_and_names_stay():
    """Only the word that stands between them changes."""
    changed = set()
    for name, seed in product(RATED, range(20)):
        new = TRANSFORMATIONS[name].apply(NAMES, draw=Random(seed))
        before, behind = NAMES.split("with")
        assert new.startswith(before) and new.endswith(behind), (name, new)
        changed.add(new.removeprefix(before).removesuffix(behind))
    assert len(changed) > 5


def test_a_word_has_what_follows_its_apostrophe():
    text = "It doesn't suit Peter’s brother, who'd rather 'leave' today."
    kept = {name: {""} for name in ("dropped_words", "doubled_words")}
    for name, seed in product(kept, range(30)):
        kept[name].add(TRANSFORMATIONS[name].apply(text, draw=Random(seed)))
    for whole in ("doesn't", "Peter’s"):
        assert text.replace(f" {whole}", "") in kept["dropped_words"]
        assert text.replace(whole, f"{whole} {whole}") in kept["doubled_words"]
    assert not any("It't" in one for one in kept["dropped_words"])
    assert not any("doesn doesn" in one for one in kept["doubled_words"])
    assert text.replace("leave", "leave leave") in kept["doubled_words"]
    lost = TRANSFORMATIONS["dropped_words"].at(1).apply(text, draw=Random(0))
    assert lost == "It, who'd ''."


def test_korean_has_spaces():
    text = "안녕하세요 여러분께서는 오늘날씨가 좋았습니다"
    assert len(TRANSFORMATIONS["dropped_words"].apply(text, draw=Random(0)).split()) == 3
    assert len(TRANSFORMATIONS["doubled_words"].apply(text, draw=Random(0)).split()) == 5


def test_what_a_name_means():
    for name, one in TRANSFORMATIONS.items():
        assert lookup(name) is one
        at = 0.05 if name in ("dropped_words", "doubled_words") else 0.08
        assert one.rate == (at if name in RATED else 0.5 if name == "truncated" else None)
        if one.rate:  # the function's own
            text = " ".join([LONG] * 5)
            same = lookup(f"{name}:{one.rate}").apply(text, draw=Random(3))
            assert one.apply(text, draw=Random(3)) == same != text
    rated, plain = lookup("typos:0.20"), lookup("typos")
    assert (rated.rate, rated.kind, rated.keeps) == (0.2, FORM, plain.keeps)
    assert rated.what == f"{plain.what} (0.2)"


@pytest.mark.parametrize(
    ("name", "kinds", "words"),
    [
        ("typo", KINDS, r"name: expected names among typos, .*got 'typo'; did you mean 'typos'"),
        ("typo:0.2", KINDS, r"got 'typo:0.2'; did you mean 'typos'"),
        ("zzzzzzzz", KINDS, r"master_colon.*, got 'zzzzzzzz'$"),
        ("empti", [FORM], r"^((?!empty).)*got 'empti'$"),
        ("", KINDS, r"expected names among .*got ''"),
        ("bullets:0.2", KINDS, r"name: bullets takes no rate, got .*; leave it out, .*typos"),
        ("typos:", KINDS, r"name: expected typos:RATE with a rate in \(0, 1\], .*got 'typos:'"),
        ("typos:0", KINDS, r"as in typos:0.08, got 'typos:0'"),
        ("typos:1.01", KINDS, r"got 'typos:1.01'"),
        ("typos:-0.1", KINDS, r"got 'typos:-0.1'"),
        ("typos:nan", KINDS, r"got 'typos:nan'"),
        ("typos:much", KINDS, r"got 'typos:much'"),
        ("typos:0.1:0.2", KINDS, r"got 'typos:0.1:0.2'"),
        (
            "truncated:0.2",
            [FORM, BIAS],
            r"expected a form or bias, got 'truncated:0.2', .* kind attack; use one of typos, .*",
        ),
    ],
)
def test_names_that_mean_nothing_are_refused(name, kinds, words):
    with pytest.raises(ValueError, match=words):
        lookup(name, kinds=kinds)


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
    assert [m["content"] for m in new["chosen"]] == ["a", "b", "C", "d"]
    assert [m["content"] for m in new["rejected"]] == ["a", "b"]
    apart = {"chosen": talk, "rejected": [*talk[:2], {"role": "user", "content": "E"}, talk[3]]}
    new = transformed(apart, prompt=str.lower)  # not what was asked behind one of them alone
    assert [m["content"] for m in new["chosen"]] == ["a", "b", "C", "d"]
    assert [m["content"] for m in new["rejected"]] == ["a", "b", "E", "d"]
    long = [{"role": "user", "content": "explain gravity slowly please"}, talk[1]]
    mistyped = partial(TRANSFORMATIONS["prompt_typos"].apply, draw=Random(0))
    new = transformed({"chosen": long, "rejected": [*long]}, prompt=mistyped)
    assert new["chosen"][0] == new["rejected"][0] != long[0]
    called = [{"role": "assistant", "tool_calls": []}]
    assert transformed({"chosen": called, "rejected": called}, chosen=str.upper)["chosen"] == called


CALL = {"role": "assistant", "content": None, "tool_calls": "[f]"}


@pytest.mark.parametrize("silent", [{"role": "assistant", "content": ""}, CALL])
def test_what_both_answers_begin_with_is_no_answer(silent):
    """One of them says nothing behind it, and stays; the earlier answer is part of the prompt."""
    begin = [
        {"role": "user", "content": "A", "tool_calls": None},
        {"role": "assistant", "content": "b", "tool_calls": None},
        {"role": "user", "content": "C"},
    ]
    other = [{**message, "name": None} for message in begin]  # as Arrow has it
    row = {
        "chosen": [*begin, {"role": "assistant", "content": "d"}],
        "rejected": [*other, silent],
    }
    new = transformed(row, chosen=str.upper, rejected=str.upper)
    assert new == row | {"chosen": [*begin, {"role": "assistant", "content": "D"}]}
    # With a prompt of its own all that an answer says is it.
    row = {"prompt": begin, "rejected": [{"role": "assistant", "content": "b"}, silent]}
    row["chosen"] = [row["rejected"][0], {"role": "assistant", "content": "d"}]
    new = transformed(row, rejected=str.upper)
    assert new["rejected"] == [{"role": "assistant", "content": "B"}, silent]
    # Of two equal answers the last messages are the answers.
    equal = transformed({"chosen": begin[:2], "rejected": other[:2]}, chosen=str.upper)
    assert [message["content"] for message in equal["chosen"]] == ["A", "B"]


def test_parts_of_a_message_change_together():
    def said(*texts, role="assistant"):
        return [{"role": role, "content": [{"type": "text", "text": text} for text in texts]}]

    image = {"type": "image", "text": None}
    row = {"prompt": said("q", role="user"), "chosen": said("a b"), "rejected": said("c ", "d")}
    row["rejected"][0]["content"].insert(1, image)
    around = {side: lambda text: f"<{text}>" for side in ("chosen", "rejected", "prompt")}
    new = transformed(row, **around)
    assert new["prompt"] == said("<q>", role="user") and new["chosen"] == said("<a b>")
    assert new["rejected"][0]["content"] == [{"type": "text", "text": "<c d>"}, image]
    assert transformed(row, rejected=str.lower) == row  # what changes nothing joins nothing
    only = {"chosen": [{"role": "assistant", "content": [image]}], "rejected": said("c")}
    assert transformed(only, chosen=str.upper) == only


def test_forms_from_columns():
    row = {"chosen": "a", "rejected": "b", "chosen@long": "aa", "rejected@long": None}
    for blank in ("", " \n", []):
        assert from_column(row | {"rejected@long": blank}, "rejected", "long")["rejected"] == "b"
    assert from_column(row, "chosen", "long") == row | {"chosen": "aa"}
    assert from_column(row, "rejected", "long") == row
    assert from_column(row, "chosen", "short") == row
