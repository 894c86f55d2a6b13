"""What the worst case piles onto: whom the words name, and whom chance does not make them name."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats
from test_stress import grouped

from drrlhf.ambiguity import parse_ambiguity
from drrlhf.stress import Attribute, Scores, load_scores, stress_test
from drrlhf.stress.adversary import adversary_of
from drrlhf.stress.resample import Bootstrap, blocks_of
from drrlhf.stress.student import above
from drrlhf.stress.styles import styles_of


def named(margin, ambiguity="cvar:0.2", prompts=None, **attributes):
    """The groups that are named, as (attribute, value); attributes are masks of pairs."""
    n = len(margin)
    made = {
        name: Attribute(np.asarray(mask).astype(np.int64), ("out", "in"))
        for name, mask in attributes.items()
    }
    prompts = np.arange(n) if prompts is None else prompts
    given = Scores(margin=margin, prompts=prompts, attributes=made, rows=n)
    found = adversary_of(given, blocks_of(prompts, 0), parse_ambiguity(ambiguity), 5)
    return [(one["attribute"], one["value"]) for one in found["piled"]]


def test_words_name_what_the_adversary_piles_onto():
    result = stress_test(grouped(), resamples=20)["models"]["model"]
    said = " ".join(result["adversary"]["sentences"])
    assert "domain = law" in said and "side" not in said
    assert "Length bias: not known" in said and "Position bias: not known" in said


def test_a_single_heavy_pair_names_no_group():
    """tv puts its mass on the largest loss alone, which lies in some group by chance."""
    result = stress_test(grouped(), ambiguity="tv:0.1", resamples=20)["models"]["model"]
    assert "No group gains clearly" in " ".join(result["adversary"]["sentences"])


def test_length_and_position_bias_are_measured(tmp_path):
    rng = np.random.default_rng(5)
    longer = rng.normal(0, 50, 1000).round()
    first = rng.choice(2, 1000)
    margin = 0.05 * longer + rng.normal(0, 0.5, 1000) - first
    lines = [
        {
            "margin": m,
            "chosen_length": 300 + g,
            "rejected_length": 300,
            "chosen_position": "first" if f == 0 else "second",
        }
        for m, g, f in zip(margin, longer, first, strict=True)
    ]
    path = tmp_path / "s.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    given = load_scores(path)
    facts = stress_test(given, resamples=20)["models"]["model"]["adversary"]
    length, known = facts["length"], longer != 0
    assert length["rank_correlation"] == pytest.approx(
        stats.spearmanr(longer[known], margin[known]).statistic, abs=1e-12
    )
    assert length["prefers_longer"] == pytest.approx((margin * longer > 0)[known].mean())
    assert facts["position"] == {
        "accuracy_chosen_first": pytest.approx((margin[first == 0] > 0).mean()),
        "accuracy_chosen_second": pytest.approx((margin[first == 1] > 0).mean()),
    }
    assert "chosen_length" not in given.attributes and "answer lengths" in given.attributes


def positions(tmp_path, values):
    """The position of each pair as it is read, the sentence, and why the column is not used; the
    even pairs are right."""
    path = tmp_path / "s.parquet"
    margin = [1.0, -1.0] * (len(values) // 2)
    pq.write_table(pa.table({"margin": margin, "chosen_position": values}), path)
    given = load_scores(path)
    facts = stress_test(given, resamples=20)["models"]["model"]["adversary"]
    return given.position, facts["sentences"][-1], given.ignored.get("chosen_position")


@pytest.mark.parametrize(
    "values",
    [[0.0, 1.0, None, 0.0], [0, 1, None, 0], ["A", "b", "", "a"], ["0.0", " Second", None, "0"]],
)
def test_positions_as_files_have_them(tmp_path, values):
    found, said, why = positions(tmp_path, values)
    assert found.tolist() == pytest.approx([0, 1, float("nan"), 0], nan_ok=True) and why is None
    # Of the two that stand first one is right, of the one that stands second none.
    assert "50.0% when the chosen answer stands first" in said
    assert "0.0% when the chosen answer stands second" in said and "nan" not in said


@pytest.mark.parametrize("values", [[1, 2, 1, 2], ["left", "right"] * 2, [0.5, 1.0, 0.0, 1.0]])
def test_positions_that_say_neither_are_not_used(tmp_path, values):
    found, said, why = positions(tmp_path, values)
    assert found is None and "Position bias: not known" in said
    assert why == "a value is none of first and second, a and b, 0 and 1"


def test_a_half_without_pairs_is_not_told(tmp_path):
    _, said, _ = positions(tmp_path, [0, 0, 0, 0])
    assert said == "Position: accuracy is 50.0% when the chosen answer stands first."
    _, said, _ = positions(tmp_path, [float("nan")] * 4)
    assert "Position bias: not known" in said


def test_a_correlation_with_what_is_constant_is_not_told():
    margin = np.array([1.0, -2.0, 3.0, -4.0])
    given = Scores(margin=margin, prompts=np.arange(4), longer=np.full(4, 7.0), rows=4)
    sentences = stress_test(given, resamples=20)["models"]["model"]["adversary"]["sentences"]
    assert sentences[-2].endswith("accuracy is 50.0% when the chosen answer is longer.")


def test_a_group_that_carries_all_weight_is_named():
    for seed in range(60):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(200, 3000))
        hard = rng.random(n) < 0.3  # more than the fifth that carries the weight
        margin = np.where(hard, rng.normal(-3, 1, n), rng.normal(6, 1, n))
        assert named(margin, hard=hard) == [("hard", "in")], seed


@pytest.mark.parametrize(("heavy", "sure"), [(2, False), (8, False), (12, True)])
def test_so_few_pairs_lie_in_a_group_by_chance(heavy, sure):
    """All weight on k pairs of a group: it rises by 1 - p, and k terms of (1 - p) / k each have a
    standard error of (1 - p) / sqrt(k), of which 1 - p is more than three for k > 9."""
    n, worst = 1000, np.arange(1000) < heavy
    margin = np.where(worst, -5.0, 1.0 + np.arange(n) / n)
    group = np.arange(n) < 50
    assert bool(named(margin, f"cvar:{heavy / n}", group=group)) is sure
    # Pairs of one prompt fall together: they say no more than one.
    prompts = np.where(worst, 0, np.arange(n))
    assert not named(margin, f"cvar:{heavy / n}", prompts, group=group)


@pytest.mark.parametrize("name", ["cvar:0.2", "tv:0.1", "kl:0.5"])
@pytest.mark.parametrize("each", [1, 5])
def test_groups_that_have_nothing_to_do_with_it_are_seldom_named(name, each):
    """Of a normal law three standard errors are passed once in 741 times; pairs of a prompt have
    one group, and losses that are alike."""
    rng = np.random.default_rng(8)
    prompts, alarms, asked = np.arange(500).repeat(each), 0, 0
    for _ in range(100):
        margin = rng.normal(1, 1, len(prompts)) + 2 * rng.normal(0, 1, 500).repeat(each)
        masks = {
            f"{share}/{i}": (rng.random(500) < share).repeat(each)
            for share in (0.03, 0.1, 0.5)
            for i in range(5)
        }
        alarms += len(named(margin, name, prompts, **masks))
        asked += 2 * len(masks)
    assert alarms <= stats.poisson.ppf(0.999, asked / 741), (alarms, asked)


def misled(margin, longer, prompts=None):
    prompts = np.arange(len(margin)) if prompts is None else prompts
    given = Scores(margin, prompts, longer=longer, rows=len(margin))
    found = adversary_of(given, blocks_of(prompts, 0), parse_ambiguity("cvar:0.2"), 30)
    return found["length"]["misleads"]


def test_length_misleads_a_model_only_beyond_chance():
    """A model that is right in 70 % of the pairs, whatever their lengths, and one whose margins
    grow with length; a difference of which too few pairs tell is none."""
    rng = np.random.default_rng(0)
    draws = [(rng.normal(0.52, 1, 100), rng.choice([-9.0, 9.0], 100)) for _ in range(200)]
    assert sum(misled(*one) for one in draws) <= 10  # of them 2.5 % by chance
    margin, longer = draws[0]
    assert misled(margin + longer / 9, longer)
    few = np.where(np.arange(100) < 5, -9.0, 9.0)
    assert not misled(np.where(few < 0, -1.0, margin), few)
    # Ten pairs of each prompt, all alike, are no more than one of it.
    each = np.arange(1000) // 10
    assert sum(misled(m[each], more[each], each) for m, more in draws) <= 10
    assert sum(misled(m[each], more[each]) for m, more in draws) > 40


def test_style_misleads_a_model_only_beyond_chance():
    rng = np.random.default_rng(1)
    attributes = {
        name: Attribute(np.tile(codes, 60), ("concise", "detailed", "markdown"))
        for name, codes in (("chosen_style", [0, 2]), ("rejected_style", [2, 0]))
    }
    prompts = np.arange(120) // 2
    bootstrap = Bootstrap.of(prompts, 20, 0)

    def styled(margin):
        return styles_of(Scores(margin, prompts, attributes), bootstrap, 30)["misleads"]

    assert sum(styled(rng.normal(0.5, 1, 120)) for _ in range(200)) <= 10
    assert styled(rng.normal(0.5, 1, 120) + np.tile([-1.0, 1.0], 60))


def test_a_part_that_is_all_right_is_not_certain():
    """Of 30 pairs all are right with a probability of a half, where 98 % of all pairs are."""
    right = np.ones(1030)
    right[30:51] = 0
    first = np.arange(1030) < 30
    assert not above(right, first, ~first, np.arange(1030), 30)
    right[30:430] = 0
    assert above(right, first, ~first, np.arange(1030), 30)
    assert not above(right, first, ~first, np.arange(1030), 31)


def test_what_does_not_mislead_is_no_finding():
    rng = np.random.default_rng(5)
    longer, even = rng.choice([-9.0, 9.0], 100), np.where(np.arange(100) % 10 < 3, -1.0, 1.0)
    even[longer < 0] = np.where(np.arange((longer < 0).sum()) % 10 < 4, -1.0, 1.0)
    for margin, told in ((even, False), (even + longer / 9, True)):
        given = Scores(margin, np.arange(100), longer=longer, rows=100)
        model = stress_test(given, resamples=20)["models"]["model"]
        half = model["adversary"]["length"]
        assert half["accuracy_chosen_longer"] > half["accuracy_chosen_shorter"] + 0.05
        assert ("length" in {one["subject"] for one in model["findings"]}) == told
