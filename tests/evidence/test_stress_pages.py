"""The kept pages of the stress test, and the commands that make them."""

from __future__ import annotations

import html
import json
import shlex

import pytest

pytest.importorskip("trl")

from test_views import made_up

from drrlhf.data import load_preference_data
from drrlhf.demo.sentiment import DOMAINS
from drrlhf.stress.candidates import load_candidates
from evidence.stress import run


@pytest.mark.parametrize("page", ["reward", "policy"])
def test_kept_pages_end_with_the_commands_that_make_them(page):
    text = html.unescape((run.PAGES / f"{page}.html").read_text(encoding="utf-8"))
    (words,) = (one for one in run.commands(run.Sizes()) if one[1] == "stress" and page in one)
    assert shlex.join(words) in text


def test_the_kept_numbers_are_those_of_the_models_on_the_pages():
    models = json.loads((run.PAGES / "kept.json").read_text(encoding="utf-8"))
    stressed = [words for words in run.commands(run.Sizes()) if words[1] == "stress"]
    named = [words[i + 1] for words in stressed for i, one in enumerate(words) if one == "--model"]
    assert list(models) == named
    assert all(tuple(model) == run.KEPT for model in models.values())


def test_the_files_that_the_commands_read(tmp_path, monkeypatch):
    """Training never sees a text that is tested, and gold scores are the ratings."""
    texts = made_up()
    monkeypatch.setattr(run.sentiment, "load_texts", lambda folder: texts)
    monkeypatch.setattr(run.material, "fetch", lambda name: tmp_path)
    sizes = run.Sizes(steps=10, pairs=20, prompts=8, candidates=16, policy_pairs=4)
    run.write_data(tmp_path, sizes)
    named = {word for words in run.commands(sizes) for word in words if word.endswith(".jsonl")}
    assert named == {path.name for path in tmp_path.iterdir()}
    pairs = {
        name: load_preference_data(str(tmp_path / name)).dataset
        for name in named - {"candidates.jsonl"}
    }
    trained = {row[side] for row in pairs["train.jsonl"] for side in ("chosen", "rejected")}
    assert len(pairs["train.jsonl"]) == 10 * run.BATCH
    ratings = {text.text: text.rating for text in texts}
    for name, a_domain in (("held_out.jsonl", 20), ("held_out_prompts.jsonl", 4)):
        rows = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        assert [row["domain"] for row in rows] == [d for d in DOMAINS for _ in range(a_domain)]
        assert not {row[side] for row in rows for side in ("chosen", "rejected")} & trained
        assert all(ratings[row["chosen"]] > ratings[row["rejected"]] for row in rows)
    found = load_candidates(tmp_path / "candidates.jsonl")
    assert len(found) == 8 and all(len(texts) == 16 for texts in found.texts)
    for some, gold in zip(found.texts, found.gold, strict=True):
        assert [ratings[text] for text in some] == gold.tolist() and not set(some) & trained
