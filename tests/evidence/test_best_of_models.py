"""The evidence on best of n: what is drawn and trained, and the summary by hand."""

from __future__ import annotations

import json
import random
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch

from drrlhf.demo import sentiment
from drrlhf.files import json_lines
from evidence.best_of import run, summary

KEPT = Path(run.__file__).parent / "results" / "best_of.jsonl"


def texts():
    draw = random.Random(0)
    found = []
    for domain in sentiment.DOMAINS:
        for i in range(160):
            rating = draw.uniform(-4, 4)
            votes = tuple(round(rating + draw.choice((-1, 0, 1))) for _ in range(9))
            found.append(
                sentiment.Text(domain, f"{domain}{i}", f"{domain} {i} is {rating}", rating, votes)
            )
    return found


def test_models_of_other_domains_pick_what_people_like(monkeypatch):
    """Where a text's vector is its rating, all models find the best, and additions change nothing
    but the vectors of changed texts."""
    some = texts()
    vectors = torch.tensor([[text.rating] for text in some]).float() @ torch.ones(1, 4)
    monkeypatch.setattr(run, "load", lambda: (some, vectors))
    asked = []

    def encode(changed, folder):
        asked.extend(changed)
        return torch.full((len(changed), 4), 9.0)

    monkeypatch.setattr(run.embeddings, "encode", encode)
    monkeypatch.setattr(run.material, "fetch", lambda name: Path("nowhere"))
    seen, shown = [], []
    whole, head = run.votes, run.train_head
    monkeypatch.setattr(run, "votes", lambda *a: seen.append(a[1]) or whole(*a))
    monkeypatch.setattr(run, "train_head", lambda *a: shown.append(a[1]) or head(*a))
    sizes = run.Sizes(models=3, pairs=40, pool=30, prompts=5, candidates=8, lr=1e-2)
    found = run.one((0, "movie", sizes))
    pairs = ("amazon", "nyt"), ("amazon", "tweets"), ("nyt", "tweets")
    assert {frozenset(one) for one in seen} == {frozenset(one) for one in pairs}
    own = {text.text for text in some if text.domain == "movie"}
    ratings = {one.split()[-1] for one in own}
    assert len(asked) == 30 and all(any(one in changed for one in ratings) for changed in asked)
    # A list needs two sentences, which these texts have not: they get another addition.
    assert not any(changed in own for changed in asked)
    *alone, together = shown
    assert torch.equal(together, torch.cat(alone)) and len(together) == 3 * 40
    real, gamed = found["gold"]["real"], found["gold"]["gamed"]
    for pick in ("model 0", "min", "mean", run.POOLED):
        assert real[pick] == pytest.approx(real["best possible"], abs=0.02)
        # Every changed candidate looks best, and all alike: the pick is any of them.
        assert gamed[pick][8] < real[pick][8] - 0.5
    assert run.one((0, "movie", sizes)) == found


def test_the_summary_pairs_seeds_over_domains():
    def record(seed, domain, gain):
        curve = lambda last: {"1": 0.0, "2": 1.0, "4": last}  # noqa: E731
        picks = {name: curve(0.5 + gain + 0.01 * seed) for name in summary.COMBINED}
        singles = {"model 0": curve(0.25), "model 1": {"1": 0.0, "2": 0.5, "4": 0.75}}
        pool = singles | picks | {run.POOLED: curve(0.4), "best possible": curve(2.0)}
        return {"seed": seed, "domain": domain, "gold": dict.fromkeys(run.POOLS, pool)}

    records = [record(s, d, 0.2) for s in range(4) for d in sentiment.DOMAINS]
    counts, of = summary.curves(records[:-1], "real")
    assert counts == [1, 2, 4] and len(of["single"]) == 3
    assert of["single"].shape == (3, 4, 2, 3)
    assert of["single"][0, 0].tolist() == [[0.0, 1.0, 0.25], [0.0, 0.5, 0.75]]
    text = summary.tables(records)
    # One of the two falls, by 0.75, whatever their mean does.
    assert "| single models | 0.500 | 0.375 |" in text
    assert "| `min` over them | **+0.215**" in text and "| **-0.090**" in text
    assert "| one of all pairs | 0.400 | 0.600 |" in text
    assert "| `min` over it | **+0.315**" in text and "| **-0.315**" in text


def test_the_kept_table_by_hand():
    _, *records = json_lines(KEPT)
    assert len(records) == 40 and len({(r["seed"], r["domain"]) for r in records}) == 40
    gains, over_one = [], []
    for seed in range(10):
        mine = [r["gold"]["real"] for r in records if r["seed"] == seed]
        single = fmean(fmean(one[f"model {i}"]["256"] for i in range(8)) for one in mine)
        gains.append(fmean(one["min"]["256"] for one in mine) - single)
        over_one.append(fmean(one["min"]["256"] - one[run.POOLED]["256"] for one in mine))
    page = (KEPT.parents[1] / "README.md").read_text()
    assert f"| `min` over them | **{np.mean(gains):+.3f}**" in page
    assert f"| `min` over it | {np.mean(over_one):+.3f} [" in page
    assert json.loads(KEPT.read_text().splitlines()[0])["sizes"]["pairs"] == 100
