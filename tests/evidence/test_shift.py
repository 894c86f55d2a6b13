"""The evidence on shifts: what is trained on and tested, the marks, and that a run goes on."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from drrlhf.demo.sentiment import DOMAINS, Text, make_pairs, split_texts
from evidence.shift import findings, methods, page, radius, run, shifts, tasks

SIZES = shifts.Sizes(train=64, val=20, test=30)


def made_up(n=200):
    """Texts of every domain, ratings from -4 to 4, votes about them."""
    rng = random.Random(0)
    texts = []
    for domain in DOMAINS:
        for i in range(n):
            votes = tuple(rng.randint(-4, 4) for _ in range(5))
            rating = sum(votes) / 5
            texts.append(Text(domain, f"{domain}-{i}", f"{domain} says {i}", rating, votes))
    return texts


@pytest.fixture
def texts(monkeypatch):
    found = made_up()
    vectors = torch.randn(len(found), 8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(run, "load", lambda: (found, vectors))
    return found


def drawn(scenario, seed=0):
    texts = made_up()
    rows = {text.text: row for row, text in enumerate(texts)}
    return texts, shifts.draw(scenario, split_texts(texts, seed), rows, seed, SIZES)


@pytest.mark.parametrize("scenario", shifts.SCENARIOS, ids=lambda s: s.name)
def test_splits_share_no_text_and_held_out_domains_stay_out(scenario):
    texts, found = drawn(scenario)
    assert sum(scenario.train.values()) == pytest.approx(1)

    def domains(rows):
        return {texts[row].domain for row in rows.flatten().tolist()}

    train = set(found.train.rows.flatten().tolist())
    val = {row for one in found.val.values() for row in one.rows.flatten().tolist()}
    test = {row for one in found.test.values() for row in one.rows.flatten().tolist()}
    assert not train & val and not train & test and not val & test
    assert domains(found.train.rows) == set(scenario.train) == set(found.val)
    assert len(found.groups) == len(found.train.rows)
    if scenario.family == "unseen":
        (out,) = (one.domain for one in scenario.tests if not one.like_training)
        assert out not in scenario.train and f"{out}/out" in found.test
    for test in scenario.tests:
        gaps = [texts[a].rating - texts[b].rating for a, b in found.test[test.name].rows.tolist()]
        assert all(test.kind.gap - 1e-6 <= abs(gap) < test.kind.below for gap in gaps)
        assert test.kind.noisy or min(gaps) > 0


def test_shares_of_a_rare_domain_and_noise_in_votes_alone():
    (rare,) = (one for one in shifts.SCENARIOS if one.name == "rare-movie-tweets")
    _, found = drawn(rare)
    assert torch.bincount(found.groups).tolist() == [61, 3]
    wrong = {}
    for name in ("votes", "clean"):
        (scenario,) = (one for one in shifts.SCENARIOS if one.name == name)
        texts, found = drawn(scenario)
        wrong[name] = sum(texts[a].rating < texts[b].rating for a, b in found.train.rows.tolist())
    assert wrong["clean"] == 0 < wrong["votes"]


def test_pairs_below_a_gap_are_all_of_them():
    texts = [text for text in made_up() if text.domain == "nyt"]
    close = [
        (a.text, b.text) for a in texts for b in texts if 0.5 <= a.rating - b.rating + 1e-9 < 1.0
    ]
    found = make_pairs(texts, len(close), seed=0, gap=0.5, below=1.0)
    assert {(pair.chosen, pair.rejected) for pair in found} == set(close)
    with pytest.raises(ValueError, match="n must be at most"):
        make_pairs(texts, len(close) + 1, seed=0, gap=0.5, below=1.0)
    with pytest.raises(ValueError, match=r"below must be more than gap=1; got 0\.5"):
        make_pairs(texts, 1, seed=0, below=0.5)


def test_every_method_may_tune_equally():
    assert {len(grid) for grid in methods.METHODS.values()} == {6}
    assert len({config for grid in methods.METHODS.values() for config in grid}) == 66


def test_marks_by_hand():
    rewards = torch.tensor([0.0, 1.0, -2.0])
    pairs = shifts.Drawn(torch.tensor([[1, 0], [2, 1], [0, 0]]), torch.tensor([0.9, 0.8, 0.5]))
    found = methods.marks(rewards, pairs)
    p = torch.sigmoid(torch.tensor([1.0, -3.0, 0.0], dtype=torch.double))
    assert found["accuracy"] == pytest.approx(1.5 / 3)
    assert found["nll"] == pytest.approx(-p.log().mean().item())
    assert found["brier"] == pytest.approx(
        (p - pairs.human.double()).square().mean().item(), abs=1e-7
    )
    # Confidences 0.73 (right), 0.95 (wrong), 0.5 (half right) lie in three bins.
    wanted = (abs(p[0] - 1) + abs(1 - p[1] - 0) + abs(p[2] - 0.5)).item() / 3
    assert found["ece"] == pytest.approx(wanted)


def test_calibration_error_by_definition():
    generator = torch.Generator().manual_seed(1)
    confidence = 0.5 + 0.5 * torch.rand(500, generator=generator, dtype=torch.double)
    right = (torch.rand(500, generator=generator) < 0.7).double()
    wanted = 0.0
    for k in range(10):
        low, high = 0.5 + 0.05 * k, 0.55 + 0.05 * k
        inside = (confidence >= low) & (confidence < high)
        if inside.any():
            wanted += inside.sum() / 500 * (confidence[inside].mean() - right[inside].mean()).abs()
    assert methods.calibration_error(confidence, right) == pytest.approx(float(wanted))


def test_balanced_weighs_domains_equally_and_group_knows_them():
    """Equal domains make balanced training plain training; unequal ones do not."""
    vectors = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    rows = torch.randint(0, 40, (64, 2), generator=torch.Generator().manual_seed(1))

    def weights(groups, **options):
        config = methods.Config(**{"ambiguity": "erm", "lr": 1e-2} | options)
        head = methods.train_head(vectors, rows, groups, config, seed=0)
        return torch.cat([p.detach().flatten() for p in head.parameters()])

    even, uneven = torch.arange(64) % 2, (torch.arange(64) < 3).long()
    plain = weights(even)
    torch.testing.assert_close(weights(even, balanced=True), plain, atol=1e-4, rtol=1e-3)
    assert (weights(uneven, balanced=True) - plain).abs().max() > 1e-3
    grouped = weights(uneven, ambiguity="group:G,step_size=1")
    assert (grouped - plain).abs().max() > 1e-3
    assert torch.equal(weights(uneven), plain)


def test_a_stopped_run_goes_on_where_it_stood(tmp_path, texts, monkeypatch):
    path = tmp_path / "reward.jsonl"
    monkeypatch.setattr(run, "SCENARIOS", shifts.SCENARIOS[:2])
    monkeypatch.setattr(run, "QUICK", SIZES)
    monkeypatch.setattr("sys.argv", ["run", "--quick", "--seeds", "2", "--output", str(path)])
    run.main()
    whole = path.read_text().splitlines(keepends=True)
    assert len(whole) == 1 + 2 * 2
    path.write_text("".join(whole[:3]) + whole[3][:20])  # a crash in the middle of a line
    run.main()
    again = path.read_text().splitlines(keepends=True)
    assert again[1:] == whole[1:]
    record = json.loads(whole[1])
    assert record["methods"].keys() == methods.METHODS.keys()
    assert record["methods"]["tv"][0]["test"].keys() == {t.name for t in shifts.SCENARIOS[0].tests}


def test_a_file_of_another_run_is_not_continued(tmp_path):
    path = tmp_path / "reward.jsonl"
    path.write_text(json.dumps(tasks.header(**run.own_facts(SIZES, 1))) + "\n")
    assert tasks.done_already(path, run.own_facts(SIZES, 1)) == []
    with pytest.raises(ValueError, match="was made with another sizes"):
        tasks.done_already(path, run.own_facts(shifts.Sizes(), 1))


# ---- from marks to findings ----------------------------------------------------------------------


def test_paired_interval_and_p_by_hand():
    """1 to 5: mean 3, standard error sqrt(2.5 / 5); the 97.5 % quantile of t with 4 degrees of
    freedom is 2.776445, and 0.013236 of it lies beyond 3 sqrt(2)."""
    p, interval = findings.paired(np.arange(1.0, 6.0))
    half = 2.776445 * 0.5**0.5
    assert p == pytest.approx(0.0132356, abs=1e-6)
    assert interval == pytest.approx((3 - half, 3 + half), abs=1e-5)
    assert findings.paired(np.zeros(5)) == (1.0, (0.0, 0.0))
    assert findings.paired(np.full(5, 0.25)) == (0.0, (0.25, 0.25))
    # One seed says nothing of others.
    assert findings.paired(np.array([0.25])) == (1.0, (-np.inf, np.inf))


def test_holm_by_hand():
    assert findings.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert findings.holm([0.9, 0.8]) == [1.0, 1.0]


def config(val, **accuracy):
    test = {
        k.replace("_", "/"): {"accuracy": a, "nll": 1 - a, "ece": 0.1, "brier": 0.2}
        for k, a in accuracy.items()
    }
    return {"val": val, "test": test}


def test_validation_alone_chooses():
    """By the worst training domain; the best test accuracy has no say."""
    tuned = [
        config({"a": 0.9, "b": 0.5}, a_in=0.5, c_out=0.9),
        config({"a": 0.7, "b": 0.6}, a_in=0.6, c_out=0.4),
        config({"a": 0.6, "b": 0.8}, a_in=0.7, c_out=0.3),
    ]
    assert findings.chosen(tuned) == 1
    assert findings.measures(tuned[1]) == {
        "in": 0.6,
        "out": 0.4,
        "worst": 0.4,
        "out nll": pytest.approx(0.6),
        "out ece": 0.1,
        "out brier": 0.2,
    }


def test_words_follow_from_the_differences():
    """A method always better, one always worse, one that only differs by chance."""
    rng = np.random.default_rng(1)
    records = []
    for seed in range(10):
        for scenario in ("unseen-nyt", "unseen-movie"):
            base = 0.7 + 0.02 * rng.normal()
            gains = {"erm": 0, "tv": 0.02, "kl": -0.02, "cvar": 0.001 * (-1) ** seed}
            found = {
                method: [config({"a": 0.5}, a_in=base, nyt_out=base + gain)]
                for method, gain in gains.items()
            }
            records.append({"scenario": scenario, "seed": seed, "methods": found})
    result = findings.findings(findings.table(records, "unseen", "out"))
    assert {m: one.word for m, one in result.items()} == {
        "tv": "helps",
        "kl": "hurts",
        "cvar": "nothing",
    }
    assert result["tv"].difference == pytest.approx(0.02)
    assert findings.table(records, "rare", "out") == {}


def test_page_says_what_the_numbers_say(tmp_path, texts, monkeypatch):
    path = tmp_path / "reward.jsonl"
    monkeypatch.setattr(run, "SCENARIOS", [shifts.SCENARIOS[0], shifts.SCENARIOS[8]])
    monkeypatch.setattr(run, "QUICK", SIZES)
    monkeypatch.setattr("sys.argv", ["run", "--quick", "--seeds", "3", "--output", str(path)])
    run.main()
    monkeypatch.setattr("sys.argv", ["page", "--results", str(tmp_path), "--output", str(tmp_path)])
    page.main()
    text = (tmp_path / "README.md").read_text()
    assert (tmp_path / "plots" / "differences.png").stat().st_size > 10_000
    assert "3 paired seeds" in text and "Preference derived from human" in text
    values = findings.table(findings.read(path)[1], "votes", "out")
    erm = next(line for line in text.splitlines() if line.startswith("| erm |"))
    assert erm.split("|")[3].strip() == f"{100 * values['erm'].mean():.1f}"
    for family in ("unseen", "votes"):
        said = next(line for line in text.splitlines() if line.startswith(f"**{family}**"))
        found = findings.findings(findings.table(findings.read(path)[1], family, "out"))
        mean = said.split(". In the worst domain")[0]
        clauses = {
            word: next((one for one in mean.split(";") if one.endswith(verb)), "")
            for word, verb in (("helps", "helped"), ("hurts", "hurt"))
        }
        for method, one in found.items():
            if one.word == "nothing":
                assert f"`{method}`" not in mean
            else:
                number = f"({100 * one.difference:+.1f} points)"
                assert f"`{method}` {number}" in clauses[one.word]


def test_words_of_every_kind():
    def finding(difference, p):
        return findings.Finding(0.5, difference, difference - 0.01, difference + 0.01, p)

    found = {"tv": finding(0.02, 0.01), "kl": finding(-0.03, 0.01), "cvar": finding(0.03, 0.2)}
    said = page._said(found, lambda x: f"{100 * x:+.1f}")
    assert said == (
        "`tv` (+2.0) helped; `kl` (-3.0) hurt; none of the others made a difference that these "
        "seeds can show"
    )
    nothing = {"cvar": found["cvar"]}
    assert page._said(nothing, str) == "no method made a difference that these seeds can show"


def test_the_kept_page_is_that_of_the_kept_results():
    assert page.from_results(page.HERE / "results") == (page.HERE / "README.md").read_text()


# ---- the chooser of the radius -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "text", "tried"),
    [
        ("tv", "tv:0.001", "tv:0.02"),
        ("tv", "tv:0.033", "tv:0.05"),  # 0.02 to 0.05 meet at their geometric mean, 0.0316
        ("tv", "tv:0.031", "tv:0.02"),
        ("tv", None, "tv:0.1"),
        ("cvar", "cvar:0.8", "cvar:0.7"),  # 1 - alpha: 0.2 is nearer to 0.3 than to 0.1
        ("cvar", "cvar:1", "cvar:0.9"),
        ("chi2", "chi2:3", "chi2:0.5"),
    ],
)
def test_nearest_tried_strength(family, text, tried):
    assert radius.nearest(family, text) == tried


def test_coverage_and_training_at_the_suggestion(tmp_path, texts, monkeypatch):
    path, out = tmp_path / "reward.jsonl", tmp_path / "radius.jsonl"
    monkeypatch.setattr(run, "SCENARIOS", [shifts.SCENARIOS[0]])
    monkeypatch.setattr(run, "QUICK", shifts.Sizes(train=64, val=40, test=30))
    monkeypatch.setattr("sys.argv", ["run", "--quick", "--seeds", "3", "--output", str(path)])
    run.main()
    header, records = findings.read(path)
    for record in records:  # as if every strength and rate had been tried
        for configs in record["methods"].values():
            configs += [configs[0]] * 5
    lines = [json.dumps(one) for one in (header, *records)]
    path.write_text("\n".join(lines) + "\n")
    arguments = ["radius", "--reward", str(path), "--output", str(out)]
    monkeypatch.setattr("sys.argv", arguments)
    radius.main()
    _, suggestions = findings.read(out)
    assert len(suggestions) == 3
    for one in suggestions:
        for found in one["rules"]["groups"].values():
            # Every group's loss is covered by those outside, so the mean of all is, by all.
            assert found["worst"] is None or found["worst"] >= one["validation loss"]
    share, median = radius.coverage(suggestions, "unseen", "groups", "tv")
    covered = [
        one["rules"]["groups"]["tv"]["worst"] is not None
        and one["rules"]["groups"]["tv"]["worst"] >= one["out loss"]
        for one in suggestions
    ]
    assert share == pytest.approx(sum(covered) / 3) and median.startswith(("tv:", "none"))
    values = radius.suggested(records, suggestions, "unseen", "out")
    assert len(values) == 1 + 2 * 4
    wanted = findings.measures(records[0]["methods"]["kl"][0])["out"]
    assert values["kl by groups"][0] == pytest.approx(wanted)
    monkeypatch.setattr("sys.argv", ["page", "--results", str(tmp_path), "--output", str(tmp_path)])
    page.main()
    text = (tmp_path / "README.md").read_text()
    assert "| tv by groups |" in text and f"({median})" in text
