"""Best of n against plain enumeration, exact fractions, scipy and numbers by hand."""

from __future__ import annotations

import itertools
import json
from fractions import Fraction
from math import comb, log

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from drrlhf.data import DataError
from drrlhf.stress import Attribute, Scores, load_candidates, load_scores
from drrlhf.stress import best_of as b
from drrlhf.stress.benchmarks import read_pairs

RNG = np.random.default_rng(0)


def enumerated(scores, gold, n):
    """The mean over all subsets of n of the gold of the first; ties for it share."""
    found = []
    for drawn in itertools.combinations(range(len(scores)), n):
        best = max(scores[i] for i in drawn)
        first = [gold[i] for i in drawn if scores[i] == best]
        found.append(sum(first) / len(first))
    return sum(found) / len(found)


def values(curve, key="gold"):
    return [one[key]["value"] if key == "gold" else one[key] for one in curve["points"]]


# ---- the curve -----------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [2, 3, 100], ids=["many ties", "ties", "few ties"])
def test_curve_is_the_mean_over_all_subsets(levels):
    rng = np.random.default_rng(levels)
    for size in range(1, 8):
        scores, gold = rng.integers(0, levels, (2, size)).astype(float)
        counts = [*range(1, size + 1)]
        found = b.best_of_curve([scores], [gold], counts, resamples=20)
        assert values(found) == pytest.approx([enumerated(scores, gold, n) for n in counts])
        best = [enumerated(gold, gold, n) for n in counts]
        assert values(found, "best_possible") == pytest.approx(best)


def test_curve_averages_prompts_of_different_sizes():
    scores = [RNG.normal(size=size) for size in (3, 5, 7)]
    gold = [RNG.normal(size=size) for size in (3, 5, 7)]
    found = b.best_of_curve(scores, gold, resamples=20)
    assert [one["n"] for one in found["points"]] == [1, 2, 3]
    wanted = [np.mean([enumerated(s, g, n) for s, g in zip(scores, gold)]) for n in (1, 2, 3)]
    assert values(found) == pytest.approx(wanted)
    assert values(found, "kl") == pytest.approx([0, log(2) - 1 / 2, log(3) - 2 / 3])
    assert found["candidates"] == {"smallest": 3, "largest": 7}


def test_curve_is_exact_for_thousands_of_candidates():
    """n = 1 is the mean and n = N the gold of the top; between, sums of fractions of whole numbers
    say what it must be."""
    size = 4096
    gold = np.random.default_rng(1).integers(-9, 9, size).astype(float)
    counts = [1, 2, 64, 1000, 2048, 4095, 4096]
    found = values(b.best_of_curve([np.arange(size)], [gold], counts, resamples=20))
    assert found[0] == pytest.approx(gold.mean(), rel=1e-13) and found[-1] == gold[-1]
    for n, value in zip(counts[1:-1], found[1:-1]):
        parts = sum(comb(k - 1, n - 1) * int(gold[k - 1]) for k in range(n, size + 1))
        assert value == pytest.approx(float(Fraction(parts, comb(size, n))), rel=1e-11)
    tied = np.minimum(np.arange(size), size - 3)  # three share the top
    last = b.best_of_curve([tied], [gold], [size], resamples=20)["points"][0]["gold"]["value"]
    assert last == pytest.approx(gold[-3:].mean(), rel=1e-15)


def test_default_counts():
    def counts(size):
        found = b.best_of_curve([np.arange(size)], [np.arange(size)], resamples=20)
        return [one["n"] for one in found["points"]]

    assert counts(1) == [1] and counts(2) == [1, 2] and counts(6) == [1, 2, 4, 6]
    assert counts(16) == [1, 2, 4, 8, 16]


def test_an_overoptimised_model_turns_over():
    """Gold rises with the score up to the seventh of eight candidates; the eighth is a hack."""
    gold = np.array([0, 1, 2, 3, 4, 5, 6, -4.0])
    shifts = RNG.normal(0, 0.1, 40)
    found = b.best_of_curve([np.arange(8)] * 40, [gold + shift for shift in shifts])
    means = np.array([enumerated(range(8), gold, n) for n in (1, 2, 4, 8)]) + shifts.mean()
    peak = int(means.argmax())
    turned = found["turns_over"]
    assert turned["n"] == [1, 2, 4, 8][peak] == 2
    # What prompts differ in is the same at both n, so the paired difference has no band.
    assert turned["difference"]["value"] == pytest.approx(means[-1] - means[peak])
    assert turned["difference"]["high"] == pytest.approx(turned["difference"]["low"])
    assert turned["beyond_band"] and not found["notes"]


def test_what_does_not_turn_over():
    right = b.best_of_curve([np.arange(8)] * 40, [np.arange(8.0)] * 40)
    assert right["turns_over"]["n"] == 8 and not right["turns_over"]["beyond_band"]
    assert values(right) == values(right, "best_possible")
    # A fall that prompts do not agree on, and one that a single prompt shows.
    scores, gold = np.arange(4), [np.array([0, 0, 0, -0.1 + 5 * (-1) ** i]) for i in range(40)]
    noise = b.best_of_curve([scores] * 40, gold)
    fall = noise["turns_over"]["difference"]
    assert fall["value"] == pytest.approx(-0.1 * (1 - 1 / 4)) and fall["low"] < 0 < fall["high"]
    assert not noise["turns_over"]["beyond_band"]
    alone = b.best_of_curve([scores], [-scores])
    assert alone["turns_over"]["difference"]["value"] < 0
    assert not alone["turns_over"]["beyond_band"]
    assert alone["notes"] == ["Only 1 prompt: bands rest on so few, and are rough."]


def test_few_prompts_do_not_turn_over_by_chance():
    """Gold that the scores know nothing of has no n that is better. Of three prompts all fall from
    the best n of five with a probability of a seventh, which is no proof."""
    rng, found = np.random.default_rng(0), 0
    for _ in range(100):
        scores, gold = rng.normal(size=(2, 3, 16))
        curve = b.best_of_curve(list(scores), list(gold), resamples=40)
        found += curve["turns_over"]["beyond_band"]
    assert found <= 5


def test_bands_are_those_of_the_mean_over_prompts():
    gold = RNG.normal(size=(400, 2))
    found = b.best_of_curve([[0, 1]] * 400, list(gold), resamples=2000)
    top = found["points"][-1]["gold"]
    width = 2 * 1.96 * gold[:, 1].std() / 400**0.5
    assert top["high"] - top["low"] == pytest.approx(width, rel=0.1)
    assert top["low"] < gold[:, 1].mean() < top["high"]
    assert found == b.best_of_curve([[0, 1]] * 400, list(gold), resamples=2000)
    assert found != b.best_of_curve([[0, 1]] * 400, list(gold), resamples=2000, seed=1)


def test_prompts_without_a_score_are_left_out_and_counted():
    scores = [[1.0, 2.0], [np.nan, 1.0], [2.0, 1.0]]
    gold = [[0.0, 4.0], [100.0, 100.0], [1.0, 3.0]]
    found = b.best_of_curve(scores, gold)
    assert (found["prompts"], found["left_out"]) == (2, 1)
    assert values(found) == pytest.approx([2.0, 2.5])
    assert "1 of 3 prompts are left out" in found["notes"][1]


def test_a_prompt_that_cuts_the_curve_short_is_told():
    many = [np.arange(16.0) for _ in range(39)]
    (note,) = b.best_of_curve([np.ones(1), *many], [np.ones(1), *many])["notes"]
    assert note == (
        "The curve ends at n = 1: 1 of 40 prompts have fewer candidates than the 16 that it would "
        "reach without them."
    )
    halves = [np.arange(9.0), *many]  # no n is twice as many
    assert b.best_of_curve(halves, halves)["notes"] == []
    short = [np.ones(1)] * 8 + many[:32]  # a fifth of them
    assert b.best_of_curve(short, short)["notes"] == []
    assert b.best_of_curve([np.ones(1), *many], [np.ones(1), *many], [1])["notes"] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gold": [[1.0, 2.0]]}, "gold: expected 2 prompts, as in scores; got 1"),
        ({"gold": [[1.0, 2.0], [1.0]]}, "gold: expected 2 candidates for prompt 1, .*got 1; give"),
        ({"scores": [[1.0], []]}, r"scores: expected .*got shape \(0,\) for prompt 1"),
        ({"scores": [], "gold": []}, "scores: .*got no prompt"),
        ({"scores": [[np.nan, 1.0]] * 2}, "all finite, got none of 2; score them again"),
        ({"counts": [1, 3]}, r"counts: expected whole numbers from 1 to 2, .*got \[1, 3\]"),
        ({"counts": [0]}, "counts: expected"),
        ({"counts": [1.5]}, "counts: expected"),
        ({"counts": []}, "counts: expected"),
        ({"resamples": 5}, "resamples: expected at least 20, for a band; got 5"),
    ],
)
def test_arguments_of_a_curve(change, message):
    given = {"scores": [[1.0, 2.0]] * 2, "gold": [[1.0, 2.0]] * 2} | change
    with pytest.raises(ValueError, match=message):
        b.best_of_curve(**given)


# ---- several models ------------------------------------------------------------------------------

MODELS = {
    "a": [[0.0, 1.0, 2.0], [3.0, 4.0]],
    "b": [[5.0, -5.0, 0.0], [0.0, 10.0]],
}


def standardised():
    flat = np.array([np.concatenate(one) for one in MODELS.values()])
    return (flat - flat.mean(1, keepdims=True)) / flat.std(1, keepdims=True)


@pytest.mark.parametrize(
    ("how", "formula"),
    [
        ("min", lambda z: z.min(0)),
        ("mean", lambda z: z.mean(0)),
        ("kl:temperature=1", lambda z: -np.log(np.exp(-z).mean(0))),
        ("uwo:1", lambda z: z.mean(0) - z.var(0)),
    ],
)
def test_combined_scores_by_their_formulas(how, formula):
    found = b.combined(MODELS, how)
    assert [len(one) for one in found] == [3, 2]
    np.testing.assert_allclose(np.concatenate(found), formula(standardised()), atol=1e-12)


def test_combined_scores_keep_ties_and_gaps():
    one = [np.repeat(RNG.normal(size=9), 31), [1.0, np.nan]]
    other = [np.repeat(RNG.normal(size=9), 31), [1.0, 2.0]]
    for how in b.COMBINED:
        first, second = b.combined({"a": one, "b": other}, how)
        assert len(np.unique(first)) == 9
        assert np.isnan(second).tolist() == [False, True]


def test_curves_of_several_models_and_their_worst_case():
    gold = [[1.0, 2.0, 4.0], [0.0, 1.0]]
    found = b.best_of_curves(MODELS, gold, resamples=20)
    assert [*found] == ["a", "b", *b.COMBINED]
    assert found["a"] == b.best_of_curve(MODELS["a"], gold, resamples=20)
    worst = np.split(standardised().min(0), [3])
    assert found["min"] == b.best_of_curve(worst, gold, resamples=20)
    assert [*b.best_of_curves({"a": MODELS["a"]}, gold, resamples=20)] == ["a"]
    # All curves are over the prompts that every model has scored.
    lost = MODELS | {"b": [[5.0, -5.0, 0.0], [0.0, np.nan]]}
    curves = b.best_of_curves(lost, gold, resamples=20)
    assert {one["prompts"] for one in curves.values()} == {1}
    assert values(curves["a"])[-1] == 4.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: b.combined({}), "at least one model, got none"),
        (lambda: b.combined({"a": [[1.0, 1.0]]}), "'a' that differ, got 1 everywhere; leave"),
        (lambda: b.combined({"a": [[1.0, 2.0]], "b": [[1.0]]}), "b: expected 2 candidates"),
        (lambda: b.combined(MODELS, "most"), "most"),
        (lambda: b.best_of_curves({"min": [[1.0]]}, [[1.0]]), "got 'min'; rename the model"),
        (lambda: b.best_of_curves({"a": [[1.0]]}, [[1.0, 2.0]]), "gold: expected 1 candidates"),
    ],
)
def test_models_that_cannot_be_combined(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- right answers -------------------------------------------------------------------------------


def test_share_of_prompts_whose_first_answer_is_right():
    """By hand: right; wrong; a right one ties with two wrong ones; two right with one wrong."""
    scores = [[3, 1, 2], [1, 2, 0], [5, 5, 5, 0], [4, 4, 4]]
    right = [[1, 0, 0], [1, 0, 0], [True, False, False, False], [1, 1, 0]]
    found = b.best_of_right(scores, right, ["x", "x", "y", None])
    assert found["share"]["value"] == pytest.approx((1 + 0 + 1 / 3 + 2 / 3) / 4)
    assert found["chance"] == pytest.approx((1 / 3 + 1 / 3 + 1 / 4 + 2 / 3) / 4)
    shares = {name: one["share"]["value"] for name, one in found["subsets"].items()}
    assert shares == {"x": 0.5, "y": pytest.approx(1 / 3)}
    assert found["subsets"]["x"]["prompts"] == 2 and found["left_out"] == 0
    assert "Only 4 prompts: bands" in found["notes"][0]


def test_a_prompt_without_all_scores_is_left_out():
    found = b.best_of_right([[1, 0], [np.nan, 0]], [[1, 0], [1, 0]], ["x", "y"])
    assert (found["share"]["value"], found["prompts"], found["left_out"]) == (1, 1, 1)
    assert [*found["subsets"]] == ["x"]


@pytest.mark.parametrize("levels", [3, 1000], ids=["ties", "no ties"])
def test_pairs_say_what_lists_of_scores_say(tmp_path, levels):
    rng = np.random.default_rng(levels)
    rows = []
    for i in range(60):
        size = int(rng.integers(2, 7))
        scores = rng.integers(0, levels, size).astype(float).tolist()
        first = int(rng.integers(1, size))
        rows.append({"id": i, "scores": scores, "num_correct": first, "subset": "xyz"[i % 3]})
    path = tmp_path / "scores.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = b.best_of_right_of_pairs(load_scores(path))
    wanted = b.best_of_right(
        [row["scores"] for row in rows],
        [[i < row["num_correct"] for i in range(len(row["scores"]))] for row in rows],
        [row["subset"] for row in rows],
    )
    assert found == wanted and [*found["subsets"]] == ["x", "y", "z"]
    assert 0 < found["share"]["value"] < 1


def pairs(margin, prompts, chosen, rejected, **attributes):
    return Scores(
        np.array(margin, float),
        np.array(prompts),
        {name: Attribute(np.array(codes), ("m", "n", "o")) for name, codes in attributes.items()},
        answers=(np.array(chosen), np.array(rejected)),
    )


def test_pairs_of_which_one_is_missing_are_left_out():
    """The second prompt lacks a pair, the third an answer in between, the fourth knows none."""
    given = pairs(
        [1, 2, -1, 1, 1, 1, -1, 1],
        [0, 0, 1, 1, 1, 2, 2, 3],
        [0, 0, 0, 0, 1, 0, 0, -1],
        [1, 2, 2, 3, 2, 1, 3, -1],
    )
    found = b.best_of_right_of_pairs(given)
    assert (found["prompts"], found["left_out"], found["share"]["value"]) == (1, 3, 1)


@pytest.mark.parametrize(
    ("scores", "by", "message"),
    [
        (Scores(np.ones(2), np.arange(2)), None, "none; give columns chosen_answer and rejected"),
        (pairs([1], [0], [0], [1]), "domain", "expected one of the attributes .* none; got 'domai"),
        (pairs([1, 1], [0, 0], [0, 0], [1, 1]), None, "got 2 pairs of 1; tell prompts apart"),
        (pairs([1, 1], [0, 0], [0, 0], [1, 2], style=[0, 1]), "style", "attribute of prompts"),
        (pairs([1], [0], [0], [2]), None, "got none of 1"),
    ],
)
def test_pairs_that_do_not_say_it(scores, by, message):
    with pytest.raises(ValueError, match=message):
        b.best_of_right_of_pairs(scores, by)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"right": [[1, 1]]}, r"at least one of each in every prompt; got \[1.0\] in prompt 0"),
        ({"right": [[1, 2]]}, r"got \[1.0, 2.0\]"),
        ({"right": [[1, 0, 0]]}, "right: expected 2 candidates for prompt 0"),
        ({"subsets": []}, "subsets: expected 1 names, got 0"),
        ({"scores": [[np.nan, 1]]}, "got none of 1"),
    ],
)
def test_arguments_of_right_answers(change, message):
    with pytest.raises(ValueError, match=message):
        b.best_of_right(**{"scores": [[1, 2]], "right": [[1, 0]]} | change)


# ---- Kendall's tau -------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [2, 5, 10_000])
def test_tau_is_scipys(levels):
    rng = np.random.default_rng(levels)
    sizes = (2, 3, 8, 300)
    scores = [rng.integers(0, levels, size).astype(float) for size in sizes]
    gold = [rng.integers(0, levels, size).astype(float) for size in sizes]
    for both in (scores, gold):  # the small ones must not be constant
        for one in both[:2]:
            one[:2] = 0, 1
    found = b.kendall_tau(scores, gold)
    each = [stats.kendalltau(s, g).statistic for s, g in zip(scores, gold)]
    assert found["tau"]["value"] == pytest.approx(np.mean(each), abs=1e-14)
    assert found["tau"]["low"] < found["tau"]["value"] < found["tau"]["high"]
    assert (found["prompts"], found["equal_gold"], found["constant_scores"]) == (4, 0, 0)


def test_prompts_without_an_order():
    """Equal gold is left out; equal scores order nothing and count as 0."""
    scores = [[1.0, 2.0], [1.0, 2.0], [3.0, 3.0], [np.nan, 1.0]]
    gold = [[1.0, 2.0], [5.0, 5.0], [1.0, 2.0], [1.0, 2.0]]
    found = b.kendall_tau(scores, gold)
    assert found["tau"]["value"] == 0.5
    assert (found["prompts"], found["equal_gold"], found["constant_scores"]) == (2, 1, 1)
    assert found["left_out"] == 1
    with pytest.raises(ValueError, match="equal ones in all 1; there is no order"):
        b.kendall_tau([[1.0, 2.0]], [[3.0, 3.0]])


# ---- files of candidates -------------------------------------------------------------------------

ROWS = [
    {"id": 5, "prompt": "p", "candidates": ["a", "b", "c"], "gold": [1, 2.5, 0], "topic": "x"},
    {"id": 6, "prompt": "q", "candidates": ["d", ""], "gold": [-1.0, 3.0], "topic": None},
]


def written(tmp_path, rows, suffix=".jsonl"):
    path = tmp_path / f"candidates{suffix}"
    if suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_candidates_with_gold(tmp_path, suffix):
    found = load_candidates(written(tmp_path, ROWS, suffix))
    assert found.ids == ("5", "6") and len(found) == 2 and found.scores is None
    assert [one.tolist() for one in found.gold] == [[1, 2.5, 0], [-1, 3]]
    assert found.attributes == {"topic": ("x", None)}
    assert found.rows() == [("p", "a"), ("p", "b"), ("p", "c"), ("q", "d"), ("q", "")]
    scored = found.scored([1, 2, 3, 4, 5])
    assert [one.tolist() for one in scored.scores] == [[1, 2, 3], [4, 5]]
    with pytest.raises(ValueError, match=r"rewards: expected shape \(5,\), .*got \(2,\)"):
        found.scored([1, 2])


@pytest.mark.parametrize("texts", ["candidates", "responses", "completions", "answers"])
@pytest.mark.parametrize("gold", ["gold", "gold_scores", "scores", "ratings", "gold_rewards"])
def test_names_of_columns(tmp_path, texts, gold):
    found = load_candidates(written(tmp_path, [{"prompt": "p", texts: ["a", "b"], gold: [1, 2]}]))
    assert found.texts == (("a", "b"),) and found.gold[0].tolist() == [1, 2]
    assert found.scores is None and found.ids == ("row 1",)


def test_scores_beside_gold_are_the_models(tmp_path):
    """Then answers need not be there, and a score may be missing."""
    found = load_candidates(written(tmp_path, [{"scores": [1, None], "gold": [3, 4]}] * 2))
    np.testing.assert_array_equal(found.scores, [[1, np.nan]] * 2)
    assert found.gold[0].tolist() == [3, 4] and found.ids == ("row 1", "row 2")
    with pytest.raises(ValueError, match="expected answers for a model to score, got scores alone"):
        found.rows()


def test_ids_of_two_columns_are_kept(tmp_path):
    some = [{"prompt_id": None, "id": "a", "scores": [1, 2], "gold": [3, 4]}]
    some += [{"prompt_id": "b", "id": "c", "scores": [1, 2], "gold": [3, 4]}]
    found = load_candidates(written(tmp_path, some))
    assert found.ids == ("a", "b")
    assert found.table()["prompt_id"].to_pylist() == ["a", "b"]


def test_answers_to_messages_are_messages(tmp_path):
    prompt = [{"role": "user", "content": "p"}]
    found = load_candidates(written(tmp_path, [{"prompt": prompt, "answers": ["a"], "gold": [1]}]))
    assert found.rows() == [(prompt, [{"role": "assistant", "content": "a"}])]


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ({"gold": None}, "'gold' must be a list .*got None"),
        ({"gold": [1.0]}, "lists of one length, .*got 2 in 'candidates', 1 in 'gold'"),
        ({"gold": [1.0, None]}, "'gold' must hold finite numbers; got None for candidate 2"),
        ({"gold": [1.0, float("nan")]}, "must hold finite numbers; got nan"),
        ({"gold": [True, 1.0]}, "must hold finite numbers; got True"),
        ({"gold": [1.0, 10**400]}, "must hold finite numbers; got 1000.* for candidate 2"),
        ({"candidates": "d"}, "'candidates' must be a list .*got 'd'"),
        ({"candidates": ["d", {"text": "e"}]}, "'candidates' must hold strings; got {'text'"),
        ({"candidates": [], "gold": []}, r"'candidates' must be a list .*got \[\]"),
        ({"prompt": None}, "'prompt' must be a string .*got None"),
        ({"prompt": [{"role": "user"}]}, "'prompt' must be a string"),
    ],
)
def test_candidates_that_are_broken(tmp_path, new, message):
    """The second row is, and is named."""
    path = written(tmp_path, [ROWS[0], ROWS[1] | new], ".json")
    with pytest.raises(DataError, match=f"row 2: .*{message}") as found:
        load_candidates(path)
    assert str(found.value).startswith(str(path)) and "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "p", "candidates": ["a"]},
            "no gold scores; .*score the candidates with a gold",
        ),
        ({"scores": [1.0]}, "no gold scores; expected one of gold, .*found: scores"),
        ({"prompt": "p", "gold": [1.0]}, "nothing to rank; .*found: gold, prompt"),
        ({"prompt": "p", "candidates": ["a"], "gold": [1], "ratings": [1]}, "'gold' and 'ratings'"),
        ({"answers": ["a"], "candidates": ["a"], "gold": [1]}, "'answers' and 'candidates'"),
        ({"gold": [1], "scores": [1], "rewards": [1]}, "'scores' and 'rewards'; leave all but"),
        ([1], "expected an object"),
    ],
)
def test_first_rows_without_candidates_or_gold(tmp_path, row, message):
    with pytest.raises(DataError, match=f"row 1: .*{message}"):
        load_candidates(written(tmp_path, [row, row], ".json"))


def test_a_score_beyond_doubles(tmp_path):
    path = written(tmp_path, [{"gold": [1, 2], "scores": [None, -(10**400)]}], ".json")
    with pytest.raises(DataError, match="'scores' must hold numbers, or null; got -1000"):
        load_candidates(path)


def test_no_candidates(tmp_path):
    with pytest.raises(DataError, match="empty; expected a row for each prompt"):
        load_candidates(written(tmp_path, []))
    with pytest.raises(
        DataError, match="in 'candidates', of which every two would be a pair; read"
    ):
        read_pairs(written(tmp_path, ROWS))
