"""The reward demonstration on made-up material: texts, pairs, embeddings, the whole run."""

from __future__ import annotations

import io
import json
import random
import re
from itertools import product
from pathlib import Path
from statistics import fmean

import pytest
import torch
from rich.console import Console

from drrlhf.batching import by_length
from drrlhf.demo import embeddings, reward, sentiment
from drrlhf.demo.material import DOMAIN_FILES
from drrlhf.demo.sentiment import DOMAINS, SPLITS, Text, make_pairs, split_texts

QUIET = Console(file=io.StringIO())


# ---- ratings, as their files hold them -----------------------------------------------------------


def write_domain(folder: Path, domain: str, rows: list[tuple[str, list[int], str]]) -> None:
    truth = [f"{key}\t{fmean(votes):.9f}\t{text}\r\n" for key, votes, text in rows]
    rated = [f"{key}\t{fmean(votes):.9f}\t1.0\t{votes}\r\n" for key, votes, _ in rows]
    for part, lines in (("GroundTruth", truth), ("anonDataRatings", reversed(rated))):
        path = folder / f"{DOMAIN_FILES[domain]}_{part}.txt"
        path.write_bytes(("\ufeff" + "".join(lines)).encode())


@pytest.fixture
def folder(tmp_path) -> Path:
    """Four domains of 40 texts; amazon and nyt have documents of four sentences."""
    rng = random.Random(0)
    for domain in DOMAINS:
        rows = []
        for i in range(40):
            key = f"{i // 4 + 1}_{i % 4 + 1}" if domain in ("amazon", "nyt") else str(i + 1)
            votes = [max(-4, min(4, round(rng.gauss(i / 5 - 4, 1)))) for _ in range(15)]
            rows.append((key, votes, f"{domain} text {i}"))
        write_domain(tmp_path, domain, rows)
    return tmp_path


def test_texts_are_read_with_their_votes_and_documents(folder):
    write_domain(folder, "nyt", [("7_3", [1, 2, 3], "  So   it\u00a0goes. ")])
    texts = sentiment.load_texts(folder)
    assert len(texts) == 3 * 40 + 1
    assert texts[-1] == Text("nyt", "7", "So it goes.", 2.0, (1, 2, 3))
    amazon = [text for text in texts if text.domain == "amazon"]
    assert [text.document for text in amazon[:5]] == ["1", "1", "1", "1", "2"]
    assert all(text.rating == pytest.approx(fmean(text.votes), abs=1e-6) for text in texts)


def test_repeated_texts_and_votes_of_another_text_are_set_aside(folder):
    rows = [
        ("1", [1, 1], "Fine."),
        ("2", [2, 2], "FINE."),
        ("3", [3, 3], "Good."),
        ("4", [0], "Ok."),
    ]
    write_domain(folder, "tweets", rows)
    write_domain(folder, "movie", [("1", [-1], "good."), ("2", [-1], "Bad.")])
    path = folder / "tweets_anonDataRatings.txt"
    path.write_text(path.read_text("utf-8-sig").replace("[0]", "[1]"))  # not the mean of "Ok."
    texts = [text.text for text in sentiment.load_texts(folder) if "text" not in text.text]
    assert texts == ["Fine.", "Good.", "Bad."]


def test_no_document_is_in_two_splits(folder):
    texts = sentiment.load_texts(folder)
    splits = split_texts(texts)
    assert set(splits) == set(SPLITS)
    for domain in DOMAINS:
        documents = [{t.document for t in splits[split][domain]} for split in SPLITS]
        assert all(documents)
        assert sum(map(len, documents)) == len(set.union(*documents))
    together = [t for split in splits.values() for domain in split.values() for t in domain]
    assert sorted(together, key=repr) == sorted(texts, key=repr)
    assert split_texts(texts) == splits
    assert split_texts(texts, seed=1) != splits


# ---- pairs ---------------------------------------------------------------------------------------


def made_up(domain: str, n: int, votes: int = 5) -> list[Text]:
    rng = random.Random(domain)
    texts = []
    for i in range(n):
        centre = rng.uniform(-3, 3)
        cast = tuple(max(-4, min(4, round(rng.gauss(centre, 1.5)))) for _ in range(votes))
        texts.append(
            Text(domain, str(i), f"{domain} {i} feels {fmean(cast):.2f}", fmean(cast), cast)
        )
    return texts


def test_pairs_are_an_even_sample_of_all_that_are_a_point_apart():
    texts = made_up("movie", 30)
    wanted = {(a.text, b.text) for a, b in product(texts, texts) if a.rating >= b.rating + 1 - 1e-9}
    everything = make_pairs(texts, len(wanted), seed=3)
    assert {(pair.chosen, pair.rejected) for pair in everything} == wanted
    some = make_pairs(texts, 20, seed=3)
    assert len({(p.chosen, p.rejected) for p in some} & wanted) == 20
    assert some == make_pairs(texts, 20, seed=3)
    assert some != make_pairs(texts, 20, seed=4)
    assert {pair.prompt for pair in some} == {sentiment.PROMPTS["movie"]}
    with pytest.raises(ValueError, match=f"n must be at most {len(wanted)}.*got {len(wanted) + 1}"):
        make_pairs(texts, len(wanted) + 1, seed=3)
    with pytest.raises(ValueError, match="n must be at most 0"):
        make_pairs([], 1, seed=0)


def test_the_human_chance_is_counted_over_all_pairs_of_votes():
    texts = {text.text: text for text in made_up("nyt", 20)}
    for pair in make_pairs(list(texts.values()), 40, seed=0):
        votes = list(product(texts[pair.chosen].votes, texts[pair.rejected].votes))
        assert pair.human == pytest.approx(fmean((a > b) + (a == b) / 2 for a, b in votes))


def test_noisy_labels_follow_single_votes_and_never_a_tie():
    high = Text("movie", "1", "high", 1.5, (0, 2, 2, 2))
    low = Text("movie", "2", "low", 0.25, (0, 0, 0, 1))
    pairs = [make_pairs([high, low], 1, seed=seed, noisy=True)[0] for seed in range(2000)]
    # of 16 pairs of votes 12 are for the high one, 1 for the low one and 3 tie
    wrong = fmean(pair.chosen == "low" for pair in pairs)
    assert wrong == pytest.approx(1 / 13, abs=0.02)
    assert {pair.human for pair in pairs if pair.chosen == "high"} == {13.5 / 16}
    assert {pair.human for pair in pairs if pair.chosen == "low"} == {2.5 / 16}


def test_rows_are_in_the_format_that_training_reads(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(sentiment, "fetch", lambda name: folder)
    rows = sentiment.preference_rows("train", ("tweets", "nyt"), 11, seed=1)
    assert rows == sentiment.preference_rows("train", ("tweets", "nyt"), 11, seed=1)
    assert sorted(row["domain"] for row in rows) == ["nyt"] * 5 + ["tweets"] * 6
    assert all(row["group"] == ("tweets", "nyt").index(row["domain"]) for row in rows)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = pytest.importorskip("drrlhf.data").load_preference_data(path)
    assert data.dataset["chosen"][:] == [row["chosen"] for row in rows]
    with pytest.raises(ValueError, match="split must be one of train, val, test; got 'dev'"):
        sentiment.load_pairs("dev")
    with pytest.raises(ValueError, match=r"domain must be one of tweets.*got 'book'"):
        sentiment.load_pairs("train", ["book"])


# ---- embeddings ----------------------------------------------------------------------------------


@pytest.fixture
def encoder_dir(tmp_path) -> Path:
    """A random BERT of two layers that knows ten words."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *"abcdefgh"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=10,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        pad_token_id=0,
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_embeddings_do_not_depend_on_the_batch_and_are_cached(encoder_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(embeddings, "fast_dtype", lambda: torch.float32)
    monkeypatch.setattr(embeddings, "BATCH_TOKENS", 12)
    texts = ["a b c d e f", "a", "h g", "b b b b b b b b b b b b b b b", "c d e"]
    together = embeddings.encode(texts, encoder_dir, cache=tmp_path / "cache", console=QUIET)
    alone = [
        embeddings.encode([t], encoder_dir, cache=tmp_path / "cache", console=QUIET) for t in texts
    ]
    assert together.shape == (5, 16)
    assert together.dtype == torch.float32
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)

    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModel.from_pretrained(encoder_dir).eval()
    expected = model(torch.tensor([[9, 8]])).last_hidden_state.mean(1)
    torch.testing.assert_close(together[2:3], expected.detach(), rtol=1e-5, atol=1e-6)

    monkeypatch.setattr(embeddings, "_encode", None)  # what is cached needs no model
    again = embeddings.encode(texts, encoder_dir, cache=tmp_path / "cache")
    assert torch.equal(again, together)
    with pytest.raises(TypeError):
        embeddings.encode(texts[::-1], encoder_dir, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.part"))


def test_batches_hold_every_text_once_within_the_token_limit():
    lengths = [random.Random(0).randint(1, 300) for _ in range(200)] + [5000]
    batches = list(by_length(lengths, embeddings.BATCH_TOKENS))
    assert sorted(i for batch in batches for i in batch) == list(range(201))
    assert all(
        len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= embeddings.BATCH_TOKENS
        for batch in batches
    )


# ---- training and the report ---------------------------------------------------------------------


def feeling_of(texts) -> torch.Tensor:
    """Stands for the encoder: six noise numbers, and the rating, which the text ends with."""
    noise = torch.randn(len(texts), 6, generator=torch.Generator().manual_seed(0))
    rating = torch.tensor([float(re.search(r"feels (.*)", text)[1]) for text in texts])
    return torch.cat([noise, rating[:, None] + noise[:, :1]], dim=1)


@pytest.fixture(scope="module")
def splits():
    return split_texts(text for domain in DOMAINS for text in made_up(domain, 900))


@pytest.fixture(scope="module")
def finished(splits, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    console = Console(file=io.StringIO(), width=80)
    result = reward.run(out, quick=True, console=console, splits=splits, encoder=feeling_of)
    assert result == json.loads((out / "results.json").read_text())
    return result, console.file.getvalue(), out


def test_the_run_prints_one_table_and_saves_json_and_png(finished):
    saved, printed, out = finished
    assert list(saved["methods"]) == ["erm", "tv", "kl", "chi2", "cvar", "group"]
    for method, row in saved["methods"].items():
        line = next(line for line in printed.splitlines() if line.split()[:1] == [method])
        shown = row["accuracy"]["worst"]
        assert f"{100 * shown['mean']:.1f} ± {100 * shown['standard_error']:.1f}" in line
        assert line.count("±") == 5 + (method != "erm")
    assert " ".join(sentiment.DERIVED.split()) in " ".join(printed.split())
    assert (out / "results.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "results.png").stat().st_size > 20_000
    assert {p.name for p in out.iterdir()} == {"results.json", "results.png"}


def test_the_numbers_are_means_over_seeds_of_what_each_seed_got(finished):
    for row in finished[0]["methods"].values():
        for one in row["per_seed"]:
            found = dict(one["accuracy"])
            assert found.pop("worst") == min(found.values())
            assert set(found) == set(DOMAINS)
        a, b = (one["accuracy"]["nyt"] for one in row["per_seed"])
        assert row["accuracy"]["nyt"]["mean"] == pytest.approx((a + b) / 2)
        assert row["accuracy"]["nyt"]["standard_error"] == pytest.approx(abs(a - b) / 2)
        assert row["accuracy"]["movie"]["mean"] > 0.8  # the made-up rating can be learned


def test_every_method_is_tuned_as_much_as_any_other(finished):
    for scale, grid in ((reward.FULL, reward.GRID), (reward.QUICK, reward.GRID)):
        assert {len(configs[: scale.configs]) for configs in grid.values()} == {scale.configs}
    for method, configs in finished[0]["protocol"]["grid"].items():
        assert len({json.dumps(config) for config in configs}) == 3
        for one in finished[0]["methods"][method]["per_seed"]:
            assert one["config"] in configs


def test_unseen_domains_are_in_no_training_or_validation_pool(splits):
    pools = reward._pools(splits, reward.QUICK)
    assert set(pools["train"]) == set(pools["val"]) == {"movie", "tweets"}
    assert set(pools["test"]) == set(DOMAINS)
    assert reward.FULL.train_pairs // reward.BATCH * reward.BATCH > 0.9 * reward.FULL.train_pairs


def test_equal_seeds_give_equal_numbers_and_a_rerun_replaces_its_files(finished, splits, tmp_path):
    (tmp_path / "results.json").write_text("an earlier run")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(12345)
    before = torch.get_rng_state()
    again = reward.run(tmp_path, quick=True, console=QUIET, splits=splits, encoder=feeling_of)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    assert again["methods"] == finished[0]["methods"]
    assert json.loads((tmp_path / "results.json").read_text()) == again


def test_group_training_lifts_a_rare_domain_that_prefers_something_else(monkeypatch):
    states, real = [], reward.dr.GroupState
    monkeypatch.setattr(reward.dr, "GroupState", lambda n: states.append(real(n)) or states[-1])
    torch.manual_seed(0)
    vectors = torch.randn(4000, 8)
    groups = (torch.arange(2000) >= 1900).long()
    pairs = torch.arange(4000).view(2000, 2)
    # movie pairs are decided by one feature, the 5 % rare ones by another
    score = torch.where(groups[:, None] == 0, vectors[pairs][..., 0], vectors[pairs][..., 1])
    pairs = torch.where(score[:, :1] >= score[:, 1:], pairs, pairs.flip(1))
    rare = {"tweets": reward._Drawn(pairs[groups == 1], 1.0)}
    found = {}
    for ambiguity in ("erm", "group:2,step_size=0.3"):
        config = reward.Config(ambiguity, 3e-3, 0.01)
        head = reward.train_head(vectors, pairs, groups, config, seed=0)
        found[ambiguity[:3]] = reward.accuracies(head, vectors, rare)["tweets"]
    assert found["gro"] > found["erm"] + 0.05
    (state,) = states  # kept from step to step, and moved towards the group that is worse off
    assert state.weights[1] > 0.51


def test_too_few_seeds_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"seeds must be at least 2.*got 1"):
        reward.run(tmp_path / "out", seeds=1)
    assert not (tmp_path / "out").exists()
