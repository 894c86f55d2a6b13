"""The DPO evidence on a tiny random model: log-probs, the start, that it learns and goes on."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from trl_fixtures import WORDS, tiny_llama_dir

from drrlhf.demo.sentiment import DOMAINS, Text
from evidence.shift import dpo, findings, page, shifts, tasks

SETTINGS = dpo.Settings(pairs=48, epochs=2, batch=16, lr=0.02, rank=4, test_texts=20, test_pairs=40)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Made-up texts, high ratings with other words than low ones, and a tiny model."""
    rng = random.Random(0)
    texts = []
    for domain in DOMAINS:
        for i in range(120):
            votes = tuple(rng.randint(-4, 4) for _ in range(5))
            rating = sum(votes) / 5
            words = rng.sample(WORDS[20:100] if rating > 0 else WORDS[100:], rng.randint(3, 9))
            texts.append(Text(domain, f"{domain}-{i}", " ".join(words), rating, votes))
    return texts, tiny_llama_dir(tmp_path_factory.mktemp("ood"))


@pytest.fixture(autouse=True)
def loaded(monkeypatch, material):
    monkeypatch.setattr(dpo, "load", lambda: material)
    monkeypatch.setattr(dpo, "fast_dtype", lambda: torch.float32)
    dpo._reference.cache_clear()
    yield
    dpo._reference.cache_clear()


def test_logps_are_those_of_full_logits_one_text_at_a_time(material):
    texts, model_dir = material
    policy = dpo.Policy(model_dir, SETTINGS, seed=0)
    policy.model.eval()
    answers = [policy.answer(text) for text in texts[::29]]
    found = policy.logps(answers, chunk=7)
    for one, got in zip(answers, found):
        ids = torch.tensor(one.ids)[None]
        with torch.no_grad():
            logps = policy.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        wanted = logps.gather(1, ids[0, 1:, None])[one.start - 1 :].sum()
        torch.testing.assert_close(got, wanted, atol=2e-4, rtol=1e-5)


def test_before_training_nothing_is_preferred(material):
    record = dpo.one(shifts.DPO_SCENARIOS[0], 0, "erm", replace(SETTINGS, epochs=0))
    assert record["test"].keys() == {"movie/in", "tweets/out", "amazon/out", "nyt/out"}
    for marks in record["test"].values():
        assert marks["nll"] == pytest.approx(0.6931, abs=1e-3)


def test_training_is_alike_for_a_seed_and_otherwise_for_a_method():
    scenario, settings = shifts.DPO_SCENARIOS[0], replace(SETTINGS, epochs=8)
    plain, again = (dpo.one(scenario, 1, "erm", settings) for _ in range(2))
    assert plain == again
    for method in ("tv", "group"):
        assert dpo.one(scenario, 1, method, settings)["test"] != plain["test"]


def test_training_learns():
    """Which words are liked, in the domain trained on. Forty pairs of twenty texts judge one random
    model by luck, so five are trained; untrained ones have accuracy 1/2."""
    settings = replace(SETTINGS, pairs=192, epochs=4, lr=0.01)
    found = [dpo.one(shifts.DPO_SCENARIOS[0], seed, "erm", settings)["test"] for seed in range(5)]
    assert sum(test["movie/in"]["accuracy"] for test in found) / len(found) > 0.6


def test_test_texts_are_few_and_never_trained_on(material):
    from drrlhf.demo.sentiment import split_texts

    texts, _ = material
    rows = {text.text: row for row, text in enumerate(texts)}
    for scenario in shifts.DPO_SCENARIOS:
        splits = dpo.fewer(split_texts(texts, 0), 10)
        drawing = shifts.draw(scenario, splits, rows, 0, replace(SETTINGS, test_pairs=5).sizes)
        train = set(drawing.train.rows.flatten().tolist())
        tested = [set(one.rows.flatten().tolist()) for one in drawing.test.values()]
        assert not drawing.val[next(iter(scenario.train))].rows.numel()
        assert all(len(one) <= 10 and not one & train for one in tested)


def test_a_stopped_run_goes_on_and_has_its_page(tmp_path, monkeypatch):
    path = tmp_path / "dpo.jsonl"
    quick = replace(SETTINGS, pairs=16, epochs=1, test_texts=16, test_pairs=20)
    monkeypatch.setattr(dpo, "QUICK", quick)
    monkeypatch.setattr("sys.argv", ["dpo", "--quick", "--seeds", "2", "--output", str(path)])
    dpo.main()
    whole = path.read_text().splitlines(keepends=True)
    assert len(whole) == 1 + 2 * (6 + 5)  # equal groups are left out where domains are equal
    path.write_text("".join(whole[:5]) + whole[5][:20])
    dpo.main()
    assert sorted(path.read_text().splitlines(keepends=True)[1:]) == sorted(whole[1:])
    _, lines = findings.read(path)
    records = findings.by_method(lines)
    assert {(r["scenario"], r["seed"]) for r in records} == {
        (name, seed) for name in ("dpo-far", "dpo-votes") for seed in (0, 1)
    }
    table = page._results(records, findings.DPO_FAMILIES, "dpo")
    group = next(line for line in table[3].splitlines() if line.startswith("| group"))
    assert group.endswith("| – |")
    with pytest.raises(ValueError, match="was made with another settings"):
        tasks.done_already(path, dpo.own_facts(SETTINGS))
