"""The evidence on views: held-out forms, the marks, and that a run goes on."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

from transformers import AutoModelForSequenceClassification
from trl_fixtures import WORDS, tiny_encoder_dir, tiny_llama_dir, tiny_tokenizer

from drrlhf.demo.sentiment import DOMAINS, Pair, Text
from drrlhf.files import json_lines
from drrlhf.transformations import TRANSFORMATIONS
from evidence import pays
from evidence.shift import tasks
from evidence.views import confirm, dpo, expected, length, run, summary


def made_up(n=120):
    rng = random.Random(0)
    texts = []
    for domain in DOMAINS:
        for i in range(n):
            words = " ".join(rng.choice(WORDS) for _ in range(6))
            text = f"{domain} {i} {words}. {words}."
            texts.append(Text(domain, f"{domain}-{i}", text, rng.uniform(-4, 4), (0, 1)))
    return texts


def test_what_is_tested_was_not_trained_on():
    assert not set(run.WIDE) & set(run.HELD_OUT) and set(run.TRAINED) < set(run.WIDE)
    kinds = {
        name: TRANSFORMATIONS[name].what.partition(":")[0] for name in (*run.WIDE, *run.HELD_OUT)
    }
    added = {"length"}  # `repeated` adds what the text has said, `sentence` and `longer` what not
    assert {kinds[name] for name in run.WIDE} & {kinds[name] for name in run.HELD_OUT} == added
    for name in (*run.WIDE, *run.HELD_OUT):
        text = "The film was great. We loved it, and so did they!"
        assert name in TRANSFORMATIONS and run.changed(name, text) != text
        assert run.changed(name, text) == run.changed(name, text)
    long = run.METHODS["augment-long"].longer
    assert long == pytest.approx((3 + 1 + run.METHODS["worst"].options["views_per_pair"]) / 3)
    for name in (*run.ATTEMPTS, *run.BASES, "augment-long", "worst"):  # all at one compute
        method = run.METHODS[name]
        options = {"views_scored_from": 0.0, "views_scored": 1.0} | method.options
        share = (1 - options["views_scored_from"]) * options["views_scored"]
        scored = share if options["view_ambiguity"] == "max" else 0.0
        passes = 3 + scored * (1 + options["views_per_pair"])
        assert method.longer * passes == pytest.approx(7)


def test_marks_of_a_judge_that_counts_characters():
    """It prefers longer texts: what lengthens the rejected one alone turns close pairs round."""
    good, bad = "a good film, said they", "a bad film, said we"
    pairs = [Pair("p", good + "x" * i, bad, "movie", 1.0) for i in range(12)]
    found = run.marks(pairs, lambda some: torch.tensor([float(len(text)) for text in some]))
    lengths = [(len(pair.chosen), len(pair.rejected)) for pair in pairs]
    assert found["clean"] == sum(a > b for a, b in lengths) / 12 == 1
    handle = len(run.changed("handle", "")) - 0
    assert found["changes"]["handle/rejected"] == pytest.approx(
        sum(a > b + handle for a, b in lengths) / 12, abs=1e-5
    )
    assert found["changes"]["handle/chosen+rejected"] == 1
    assert len(found["changes"]) == 24
    assert found["right"] <= min(found["changes"].values()) < 1


def test_a_run_is_kept_and_goes_on(tmp_path, monkeypatch):
    folder = tiny_encoder_dir(tmp_path, with_eos=False)
    monkeypatch.setattr(run, "texts", made_up)
    monkeypatch.setattr(run.material, "fetch", lambda name: folder)
    monkeypatch.setattr(run, "BATCH", 4)
    monkeypatch.setattr(run, "METHODS", {k: run.METHODS[k] for k in ("plain", "worst-group")})
    path = tmp_path / "found.jsonl"
    arguments = ["run", "--output", str(path), "--seeds", "1", "--quick"]
    monkeypatch.setattr("sys.argv", arguments)
    monkeypatch.setattr(run, "SHARES", {"movie": 0.5, "amazon": 0.25, "tweets": 0.25})
    run.main()
    first = path.read_text().splitlines()
    assert [json.loads(line)["method"] for line in first[1:]] == ["plain", "worst-group"]
    path.write_text("\n".join(first[:2]) + "\n")
    run.main()
    assert [json.loads(line) for line in path.read_text().splitlines()[1:]] == [
        json.loads(line) for line in first[1:]
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_are_tested_in_float32_whatever_they_were_trained_in(tmp_path, monkeypatch, dtype):
    """Autocast would round rewards to 8 bits, so that close ones are equal, and so wrong."""
    folder = tiny_encoder_dir(tmp_path, with_eos=False)
    monkeypatch.setattr(run.material, "fetch", lambda name: folder)
    monkeypatch.setattr(run, "BATCH", 4)
    monkeypatch.setattr(run, "SHARES", {"movie": 0.5, "amazon": 0.25, "tweets": 0.25})
    splits = {domain: [t for t in made_up() if t.domain == domain] for domain in DOMAINS}
    model, tokenizer = run.trained(splits, run.Task(0, "plain", dtype, run.QUICK))
    ids = tokenizer("the film was not very good", return_tensors="pt")
    with torch.no_grad():
        assert model(**ids).logits.dtype == torch.float32
        states = model.bert.embeddings(ids["input_ids"])
        for layer in model.bert.encoder.layer:
            states = layer(states)
        exact = model.classifier(model.bert.pooler(states))
    assert model(**ids).logits.item() == pytest.approx(exact.item(), rel=1e-6)


def test_a_file_gains_methods_but_keeps_those_that_it_has(tmp_path):
    path = tmp_path / "found.jsonl"
    path.write_text('{"methods": {"plain": 1}, "date": "d"}\n{"seed": 0}\n')
    assert tasks.done_already(path, {"methods": {"plain": 1, "new": 2}}) == [{"seed": 0}]
    first, record = json_lines(path)
    assert first == {"methods": {"plain": 1, "new": 2}, "date": "d"} and record == {"seed": 0}
    for methods in ({"plain": 2, "new": 2}, {"new": 2}):
        with pytest.raises(ValueError, match="another methods"):
            tasks.done_already(path, {"methods": methods})


def test_a_seed_goes_on_in_the_precision_that_it_began_in(monkeypatch):
    records = [{"seed": 0, "method": "plain", "dtype": "torch.float32"}]
    records += [{"seed": 1, "method": "plain", "dtype": "torch.bfloat16"}]

    def found(fast):
        monkeypatch.setattr(run, "fast_dtype", lambda: fast)
        wanted = run.stages(records, range(3), ("augment", "plain", "worst"))
        tasks = run.missing(records, wanted, None)
        return [(task.seed, task.method, task.dtype) for task in tasks]

    exact, short = torch.float32, torch.bfloat16
    first = [(0, "worst", exact), (2, "plain", exact), (2, "worst", exact)]
    assert found(exact) == first
    between = [(0, "worst", exact), (1, "worst", short), (2, "plain", short), (2, "worst", short)]
    assert found(short) == between
    records += [
        {"seed": seed, "method": method, "dtype": str(dtype)} for seed, method, dtype in first
    ]
    assert found(exact) == [(0, "augment", exact), (2, "augment", exact)]


def made_records(gains, seeds=10):
    """Records of seeds whose `right` is above that of `plain` by a method's gain, give or take."""
    return [
        {
            "seed": seed,
            "method": name,
            "dtype": "torch.float32",
            "test": {
                domain: {"clean": 0.9, "right": 0.5 + gain + 0.001 * (seed % 3) * (gain > 0)}
                | {"nll": 0.3, "ece": 0.1, "changes": {"a": 0.7}}
                for domain in DOMAINS
            },
        }
        for name, gain in gains.items()
        for seed in range(seeds)
    ]


def test_attempts_run_on_five_seeds_first_and_those_below_the_aim_end():
    core = {name: 0.0 if name == "plain" else 0.02 for name in run.METHODS if name not in run.LATER}

    def stage(records):
        wanted = run.stages(records, range(10), run.METHODS)
        return [task[:2] for task in run.missing(records, wanted, None)]

    records = made_records(core)
    first = [(seed, name) for name in run.ATTEMPTS for seed in range(3, 8)]
    assert stage(records) == first and not run.ended(records)
    tried = made_records({"worst-late": 0.02, "worst-quarter": 0.05, "worst-wide": 0.03}, 8)
    records += [record for record in tried if record["seed"] >= 3]
    assert run.ended(records) == {"worst-late", "worst-wide"}
    assert {name for _, name in stage(records)} == {"augment", "worst-half", "worst-quarter"}
    assert [s for s, name in stage(records) if name == "worst-quarter"] == [0, 1, 2, 8, 9]
    text = summary.tables(records)
    whole, of_first = text.split("Of 5 seeds, after which they ended:")
    assert "worst-late" not in whole and "worst-quarter" not in of_first
    assert "| worst-late over plain | +0.0 [+0.0, +0.0] | +0.0 [+0.0, +0.0] | **+2.1**" in of_first


def test_a_finding_is_confirmed_on_the_seeds_that_had_no_part_in_it():
    """There the gain is 1, where it was found 9: that is what the confirmation says."""
    core = {name: 0.0 for name in run.METHODS if name not in run.LATER}
    found = [one for one in made_records({"worst-wide": 0.09}) if one["seed"] in run.FIRST]
    records = made_records(core) + found

    def stage():
        wanted = confirm.stages(records, range(10), run.METHODS)
        return [task[:2] for task in run.missing(records, wanted, None)]

    new = [(seed, name) for seed in (0, 1, 2, 8, 9) for name in ("worst-wide", "augment-wide")]
    assert stage() == new
    assert expected.table(records, expected.CONFIRMED) == "Nothing can be said yet."
    again = made_records({"worst-wide": 0.01, "augment-wide": 0.005})
    records += [record for record in again if record["seed"] not in run.FIRST]
    assert stage() == [(seed, "augment-wide") for seed in run.FIRST]
    rows = [line.split(" | ") for line in expected.table(records, expected.CONFIRMED).splitlines()]
    assert [(row[0], row[2], row[3][:4], row[4], row[5]) for row in rows[2:]] == [
        ("| worst-wide over plain", "above 0", "+1.1", "5", "yes |"),
        ("| worst-wide over plain", "+2.0", "+1.1", "5", "no |"),
        ("| worst-wide over augment-wide", "+1.0", "+0.5", "5", "no |"),
        ("| worst-wide over plain", "-0.5", "+0.0", "5", "yes |"),
        ("| worst-wide over plain", "-0.5", "+0.0", "5", "yes |"),
    ]
    records += [record for record in again if record["method"] == "augment-wide"]
    assert not stage()


@pytest.mark.parametrize("later", [{}, {"worst-half": 0.01}])
def test_what_views_bought_is_told_once_all_seeds_are_there(later):
    """By the numbers alone: the methods that run later may be missing."""
    core = {name: 0.0 for name in run.METHODS if name not in run.LATER}
    records = made_records(core | {"worst": 0.05} | later)
    for record in records:
        if record["method"] == "worst":
            record["test"]["nyt"]["clean"] -= 0.03 + 0.001 * (record["seed"] % 3)
        if record["method"] == "augment-long":
            record["test"]["movie"]["right"] += 0.1
    over_plain, over_long = pays._of_views(records, "worst").split("; ")
    assert over_plain == (
        "over no views: pairs right in every form +5.1 (seen), +5.1 (rare), +5.1 (unseen), "
        "as they are -3.1 (unseen)"
    )
    assert over_long == (
        "over augmentation at equal compute: pairs right in every form +0.1 (seen), +5.1 (rare), "
        "+5.1 (unseen), as they are -3.1 (unseen)"
    )
    assert pays._of_views(records, "worst-group").startswith(
        "over no views: no significant difference; "
    )
    wide = records + made_records({"worst-wide": 0.02})  # whose base has not run on all seeds
    assert pays._of_views(wide, "worst-wide") == (
        "over no views: pairs right in every form +2.1 (seen), +2.1 (rare), +2.1 (unseen)"
    )
    assert pays._of_views(records[1:], "worst") == "being measured (9 of 10 seeds)"


def test_what_was_expected_stands_beside_what_was_found():
    """Gains over ten seeds lie 0.09 points above those that the records are made of."""
    gains = {name: 0.0 for name in run.METHODS if name not in run.LATER}
    gains |= {"worst": 0.05, "augment-long": 0.04, "worst-half": 0.04, "augment": 0.0}
    records = made_records(gains)
    tried = made_records({"worst-late": 0.02}, 8)
    records += [record for record in tried if record["seed"] in run.FIRST]
    for record in records:
        if record["method"] == "worst":
            record["test"]["nyt"]["clean"] -= 0.006
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in expected.table(records, expected.REWARD).splitlines()[2:]
    ]
    told = {(row[0], row[1]): row[2:3] + row[-2:] for row in rows}
    assert told == {
        ("worst over plain", "`right`, seen"): ["+4.0", "10", "yes"],
        ("worst over augment-long", "`right`, seen"): ["+2.0", "10", "no"],
        ("worst over plain", "`right`, unseen"): ["+2.0", "10", "yes"],
        ("worst over augment-long", "`right`, unseen"): ["+1.0", "10", "yes"],
        ("worst over plain", "`clean`, seen"): ["-0.5", "10", "yes"],
        ("worst over plain", "`clean`, unseen"): ["-0.5", "10", "no"],
        ("worst-consistent over worst", "`right`, seen"): ["above 0", "10", "no"],
        ("worst-half over augment", "`right`, seen"): [
            *("0.75 of the gain of worst, +3.82", "10", "yes"),
        ],
        ("worst-late over plain", "`right`, seen"): ["+4.0", "5", "no"],
        ("worst-late over augment-long", "`right`, seen"): ["+2.0", "5", "no"],
        ("worst-late over augment-long", "`right`, unseen"): ["+1.0", "5", "no"],
        ("worst-late over plain", "`clean`, seen"): ["-0.5", "5", "yes"],
    }
    assert rows[0][3].startswith("+5.1 [+5.0, +5.")
    nothing = expected.table([record for record in records if record["seed"]], expected.REWARD)
    assert "10" not in nothing and "worst-late" in nothing
    assert expected.table(made_records({"plain": 0.0}), expected.DPO) == "Nothing can be said yet."


@pytest.mark.parametrize("kept", sorted(Path(run.__file__).parent.glob("results/*.jsonl")), ids=str)
def test_kept_seeds_are_in_one_precision_each(kept):
    _, *records = json_lines(kept)
    found = {(record["seed"], record["dtype"]) for record in records}
    assert len(found) == len({seed for seed, _ in found})


def test_scores_are_those_of_each_text_alone(tmp_path):
    folder = tiny_encoder_dir(tmp_path, with_eos=False)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = tiny_tokenizer(with_eos=False)
    texts = ["how was it", "the film was not very good", "great"]
    found = run.scores(model, tokenizer, texts)
    alone = [model(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts]
    assert found.tolist() == pytest.approx(alone, abs=1e-5)


def test_the_summary_takes_whole_seeds_and_pairs_them():
    def test(gain):
        marks = {"clean": 0.8, "right": 0.5 + gain, "nll": 0.5, "ece": 0.1}
        return {d: marks | {"changes": {"a": 0.7 + gain, "b": 0.9}} for d in DOMAINS}

    gains = {"plain": 0.0, "worst": 0.05}
    records = [
        {"seed": seed, "method": method, "test": test(gains.get(method, 0.01) + 0.001 * seed)}
        for seed in range(3)
        for method in sorted(run.METHODS, key=lambda name: name not in run.LATER)
    ]
    assert len(summary.complete(records)) == 3 and len(summary.complete(records[:-1])) == 2
    without = summary.complete(records[1:])  # a later method that a seed lacks
    assert len(without) == 3 and run.METHODS.keys() - without[0].keys() == {records[0]["method"]}
    assert f"| {records[0]['method']} over" not in summary.tables(records[1:], 3)
    assert summary.tables(records).startswith("3 of 10 seeds so far") and "|" not in summary.tables(
        []
    )
    assert summary.DOMAINS == {"seen": ("movie", "amazon"), "rare": ("tweets",), "unseen": ("nyt",)}
    text = summary.tables(records, 3)
    assert "| worst over plain | +0.0 [+0.0, +0.0] | **+5.0** [+5.0, +5.0] | **+5.0**" in text
    assert "| worst over augment-long | +0.0 [+0.0, +0.0] | **+4.0**" in text
    assert "| plain | 80.0 | 70.1 | 50.1 | 0.500 | 0.100 |" in text


def test_a_policy_is_trained_and_marked(tmp_path, monkeypatch):
    """Rewards are beta times the log-ratios that plain transformers gives of whole sequences."""
    folder = tiny_llama_dir(tmp_path)
    monkeypatch.setattr(dpo.dpo, "load", lambda: (made_up(40), folder))
    monkeypatch.setattr(dpo, "METHODS", {k: dpo.METHODS[k] for k in ("plain", "worst")})
    sizes = dpo.Sizes(dpo.Settings(pairs=8, batch=4, adapted_layers=1, lr=0.5), steps=6, test=3)
    found = dpo.one(run.Task(0, "worst", torch.float32, sizes))
    assert found["method"] == "worst" and found["test"].keys() == set(DOMAINS)
    assert found["test"]["movie"]["spread"] > 0
    policy = dpo.Policy(folder, sizes.policy, 0, torch.float32)
    splits = {domain: [t for t in made_up(40) if t.domain == domain] for domain in DOMAINS}
    dpo.train(policy, splits, run.Task(0, "plain", torch.float32, sizes))
    text = "the film was good"
    ids = policy.tokenizer(dpo.prompt("movie") + text, return_tensors="pt")["input_ids"]
    ids = torch.cat([ids, torch.tensor([[policy.tokenizer.eos_token_id]])], 1)
    start = len(policy.tokenizer(dpo.prompt("movie"))["input_ids"])

    def logp():
        logits = policy.model(ids).logits[0, start - 1 : -1].double()
        return logits.log_softmax(-1).gather(1, ids[0, start:, None]).sum()

    with torch.no_grad():
        after = logp()
        with policy.model.disable_adapter():
            before = logp()
    ours = dpo.rewards(policy, 0.1, "movie", [text])
    assert abs(after - before) > 0.1
    assert ours.item() == pytest.approx(0.1 * (after - before).item(), rel=0.05)


def test_length_bias_is_what_a_sentence_said_twice_is_worth():
    """By hand: 0.9 - 0.7 of plain in each domain, and half of that of the other method."""
    records = made_records({"plain": 0.0, "worst": 0.01})
    for record in records:
        rejected = 0.7 if record["method"] == "plain" else 0.8 + 0.001 * (record["seed"] % 3)
        for test in record["test"].values():
            test["changes"] = {"repeated/chosen": 0.9, "repeated/rejected": rejected}
    assert length.bias(records[0]["test"], ("movie", "nyt")) == pytest.approx(20)
    rows = length.table(records).splitlines()
    assert rows[2] == "| plain | 20.0 | 20.0 | 20.0 |"
    assert rows[3].startswith("| worst over plain | **-10.1** [-10.2, -10.0] |")
    assert length.table(records[1:]) == "9 of 10 seeds so far."
