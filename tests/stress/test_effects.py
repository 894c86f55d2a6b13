"""Changes of the text: accuracy lost, attacks, the worst change, biases, styles, words, gates.

Expected numbers come from loops over pairs, of a judge whose rewards are known.
"""

from __future__ import annotations

import itertools
import json
import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pyarrow as pa
import pytest

from drrlhf.stress import Attribute, Scores, parse_requirement, stress_test, write_junit
from drrlhf.stress.changes import changed, chosen_changes, drawn_pairs, scored
from drrlhf.stress.effects import Bootstrap, effects, worst_change
from drrlhf.stress.scores import from_table
from drrlhf.transformations import TRANSFORMATIONS, lookup

N = 60
RNG = np.random.default_rng(0)
NAMES = ("typos", "sentence", "bullets", "self_praise", "empty", "prompt_typos")


def made(n=N, missing=0.2, **more):
    """Scores with rewards of random forms, some of which there are not."""
    rng = np.random.default_rng(1)
    rewards = rng.normal([0.8, 0.0], size=(n, 2))
    forms = {}
    for name in NAMES:
        form = rewards + rng.normal(scale=0.8, size=(n, 2))
        form[rng.random((n, 2)) < missing] = np.nan
        if name == "empty":
            form[:, 0] = np.nan
        if name == "prompt_typos":
            form[np.isnan(form).any(1)] = np.nan
        forms[name] = form
    margin = rewards[:, 0] - rewards[:, 1]
    given = {"margin": margin, "prompts": np.arange(n), "rows": n, "rewards": rewards}
    return Scores(**given | {"forms": forms} | more)


def report(scores, **options):
    return stress_test(scores, **{"resamples": 20, "min_support": 5} | options)["models"]["model"]


def find(model, change, sides):
    return next(one for one in model["changes"] if (one["change"], one["sides"]) == (change, sides))


def test_each_change_on_each_side_by_a_loop():
    scores = made()
    model = report(scores)
    for name, form in scores.forms.items():
        sides = {"prompt_typos": ["prompt"], "empty": ["rejected"]}.get(
            name, ["chosen", "rejected", "both"]
        )
        assert {one["sides"] for one in model["changes"] if one["change"] == name} == {*sides}
        for side in sides:
            lost, right, turned, pairs = 0.0, 0, 0, 0
            for (c, r), (new_c, new_r) in zip(scores.rewards, form, strict=True):
                c2 = c if side == "rejected" else new_c
                r2 = r if side == "chosen" else new_r
                if np.isnan(c2) or np.isnan(r2):
                    continue
                pairs += 1
                lost += float(c > r) - float(c2 > r2)
                right += c > r
                turned += c > r and c2 <= r2
            one = find(model, name, side)
            assert one["pairs"] == pairs
            assert one["lost"]["value"] == pytest.approx(lost / pairs)
            assert one["success"]["value"] == pytest.approx(turned / right)
            assert one["success"]["low"] <= one["success"]["value"] <= one["success"]["high"]


def test_the_worst_change_tries_every_combination():
    scores = made()
    worst, tried, names, by = worst_change(scores)
    answers = ["typos", "sentence", "bullets"]  # no bias, no attack
    assert names == [*answers, "prompt_typos"]
    for i in range(N):
        own = scores.rewards[i]
        sides = [[own[side], *(scores.forms[name][i, side] for name in answers)] for side in (0, 1)]
        margins = [c - r for c, r in itertools.product(*sides)]
        margins.append(scores.forms["prompt_typos"][i] @ [1, -1])
        assert worst[i] == pytest.approx(np.nanmin(margins))
    assert tried.all()
    model = report(scores)
    found = model["worst_change"]
    assert found["accuracy"]["value"] == pytest.approx((worst > 0).mean())
    right = scores.margin > 0
    assert found["success"]["value"] == pytest.approx((worst[right] <= 0).mean())
    # An answer's form is to blame where no change of the prompt is worse.
    table = np.column_stack([scores.rewards[:, 0], *(scores.forms[n][:, 0] for n in answers)])
    prompts = scores.forms["prompt_typos"] @ [1, -1] == worst
    least = np.where(prompts, 0, np.nanargmin(table, 1))
    shares = dict(zip(["as it is", *answers], np.bincount(least, minlength=4) / N))
    assert found["by"] == by and found["by"]["chosen"] == pytest.approx(shares)
    assert found["by"]["prompt"] == pytest.approx(
        {"as it is": 1 - prompts.mean(), "prompt_typos": prompts.mean()}
    )


def test_margins_that_a_file_gives_are_tried_unless_they_are_attacks():
    margin = np.array([1.0, 2.0, -1.0, 0.5])
    given = {"seed:1": np.array([np.nan, -3.0, 0.0, 0.4]), "empty": np.full(4, -9.0)}
    found = worst_change(Scores(margin, np.arange(4), counterfactuals=given, rows=4))
    assert found.margin.tolist() == [1.0, -3.0, -1.0, 0.4] and found.names == ["seed:1"]
    assert found.tried.tolist() == [False, True, True, True]
    assert found.by == {"prompt": pytest.approx({"seed:1": 2 / 3, "as it is": 1 / 3})}


def test_a_band_of_few_pairs_rests_on_the_draws_that_have_any():
    draws = np.array([[0.0, 2.0], [1.0, 1.0], [2.0, 0.0], [1.0, 1.0]])
    found = Bootstrap(np.array([0, 0, 1, 1]), draws).mean(np.array([1.0, np.nan, np.nan, np.nan]))
    assert found == {"value": 1.0, "low": 1.0, "high": 1.0}


def test_a_pair_that_no_change_touches_is_not_counted():
    scores = made(missing=0.0)
    forms = {name: form.copy() for name, form in scores.forms.items()}
    for form in forms.values():
        form[10:] = np.nan
    model = report(made(forms=forms))
    assert model["worst_change"]["pairs"] == 10 and find(model, "typos", "both")["pairs"] == 10
    assert model["pairs"] == N


def test_attacks_take_the_best_of_biases_and_attacks_on_the_rejected_answer():
    scores = made()
    table = np.column_stack([scores.forms[name][:, 1] for name in ("self_praise", "empty")])
    known = ~np.isnan(table).all(1)
    right = (scores.margin > 0) & known
    turned = right & (np.nanmax(np.nan_to_num(table, nan=-9), 1) >= scores.rewards[:, 0])
    found = report(scores)["attacks"]
    assert found["changes"] == ["self_praise", "empty"] and found["pairs"] == known.sum()
    assert found["success"]["value"] == pytest.approx(turned.sum() / right.sum())


def test_biases_are_shares_of_answers_that_gain():
    scores = made(missing=0.0)
    found = {one["change"]: one for one in report(scores)["biases"]}
    assert found.keys() == {"self_praise"}
    gains = scores.forms["self_praise"] > scores.rewards
    assert found["self_praise"]["preferred"]["value"] == pytest.approx(gains.mean())
    assert found["self_praise"]["answers"] == 2 * N


def test_a_bias_counts_answers_where_pairs_have_one_or_two():
    """The first pair's answers do not gain, the only form of the second pair's does: one of three,
    where the mean of the pairs' means would be a half."""
    forms = {"authority": np.array([[0.0, -1.0], [2.0, np.nan]])}
    rewards = np.array([[1.0, 0.0], [1.0, 0.0]])
    scores = Scores(np.ones(2), np.arange(2), rewards=rewards, forms=forms)
    (found,) = effects(scores, Bootstrap.of(scores.prompts, 50, 0))["biases"]
    assert found["answers"] == 3 and found["preferred"]["value"] == pytest.approx(1 / 3)
    assert (found["preferred"]["low"], found["preferred"]["high"]) == (0.0, 1.0)


def test_a_judge_by_length_is_found_out():
    """Every right pair has the longer answer; a judge of lengths ranks them all right, and loses
    to whatever is longer."""
    rows = [
        {"prompt": f"p{i}", "chosen": f"It is good. {'very ' * (i % 5)}", "rejected": f"Bad {i}."}
        for i in range(40)
    ]

    def judge(some):
        return np.array([[len(r["chosen"]), len(r["rejected"])] for r in some], dtype=float)

    names = ["sentence", "empty", "upper_case"]
    rewards, forms = scored(rows, names, np.arange(40), judge)
    rewards[0] = rewards[0][::-1]  # one wrong pair, without which there is nothing to rank
    margin = rewards[:, 0] - rewards[:, 1]
    model = report(Scores(margin, np.arange(40), rewards=rewards, forms=forms, rows=40))
    assert find(model, "sentence", "rejected")["success"]["value"] == 1
    assert find(model, "empty", "rejected")["success"]["value"] == 0
    # No length changes: but for the pair that was turned by hand, all stay.
    assert find(model, "upper_case", "both")["lost"]["value"] == pytest.approx(-1 / 40)
    assert "sentence" in model["findings"][0]["text"]
    assert model["findings"][0]["costs"] == pytest.approx(39 / 40)


def test_a_margin_that_is_not_finite_is_none_and_one_of_two_rewards_is_no_margin():
    """The second pair is worst under "b"; the prompt's change has both rewards in the first."""
    columns = {
        "chosen_reward": [3.0, 3.0, -1.0],
        "rejected_reward": [1.0, 1.0, 1.0],
        "margin@a": [1.0, -math.inf, 1.0],
        "margin@b": [1.0, -0.5, math.inf],
        "chosen_reward@prompt_typos": [0.5, 0.5, None],
        "rejected_reward@prompt_typos": [0.0, None, 0.0],
    }
    model = report(from_table(pa.table(columns), "made up"))
    assert find(model, "prompt_typos", "prompt")["pairs"] == 1
    assert find(model, "prompt_typos", "prompt")["accuracy"]["value"] == 1
    worst = model["worst_change"]
    assert worst["pairs"] == 3 and worst["accuracy"]["value"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("liked", [60, 75])
def test_a_bias_that_chance_may_make_is_no_finding(liked):
    """Of 100 cases so many prefer the addition. Eight additions were tried; by the binomial
    distribution 60 or more come about by chance in 2.8 % of cases, 75 or more in 3e-7."""
    chance = sum(math.comb(100, k) for k in range(liked, 101)) / 2**100
    names = [name for name in TRANSFORMATIONS if lookup(name).kind == "bias"]
    assert len(names) == 8
    rewards = np.column_stack([np.where(np.arange(50) < 40, 1.0, -1.0), np.zeros(50)])
    gains = np.where(np.arange(100) < liked, 0.1, -0.1).reshape(50, 2)
    forms = dict.fromkeys(names, rewards - 0.1) | {names[0]: rewards + gains}
    model = report(Scores(rewards[:, 0], np.arange(50), rewards=rewards, forms=forms, rows=50))
    found = [one for one in model["findings"] if one["subject"] == "biases"]
    assert bool(found) == (chance < 0.025 / len(names)) == (liked == 75)


@pytest.mark.parametrize("touched, told", [(2, False), (30, True)])
@pytest.mark.parametrize("name", ["math_format", "empty"])
def test_what_a_handful_of_pairs_show_is_no_finding(name, touched, told):
    """Every pair that the change touches is turned. Two of one sign are as likely as one in four,
    and an attack on two pairs is none on a group of 30 prompts."""
    rewards = np.column_stack([np.where(np.arange(100) < 80, 1.0, -1.0), np.zeros(100)])
    form = np.full((100, 2), np.nan)
    form[:touched, 1] = 2.0
    scores = Scores(rewards[:, 0], np.arange(100), rewards=rewards, forms={name: form}, rows=100)
    model = report(scores, min_support=30)
    assert find(model, name, "rejected")["success"]["value"] == 1
    assert [
        f"of {touched} pairs" in one["text"] or f"of the {touched} pairs" in one["text"]
        for one in model["findings"]
    ] == [True] * told


def test_all_changes_are_those_of_the_table_and_of_columns():
    columns = ["prompt", "chosen", "chosen@a", "rejected@a", "prompt@b", "margin@c", "x@y"]
    assert chosen_changes("all", columns) == [*TRANSFORMATIONS, "@a", "prompt@b"]
    assert chosen_changes("typos:0.3,@a", columns) == ["typos:0.3", "@a"]
    row = {"prompt": "what is it", "chosen": "a thing indeed", "rejected": "something else"}
    assert changed(row, "typos:0.9", 4) == changed(row, "typos:0.9", 4)
    assert changed(row, "typos:0.9", 4) != changed(row, "typos:0.9", 5)


@pytest.mark.parametrize(
    "kind, parts", [("attack", {"rejected"}), ("bias", {"chosen", "rejected"})]
)
def test_an_attack_is_tried_on_the_rejected_answer_alone(kind, parts):
    row = {"prompt": "What is it? Say.", "chosen": "A thing.", "rejected": "It is some. Really."}
    names = [name for name in TRANSFORMATIONS if lookup(name).kind == kind]
    assert len(names) >= 5
    for name in names:
        new = changed(row, name, 0)
        assert {part for part in row if new[part] != row[part]} <= parts


def test_pairs_of_a_prompt_are_drawn_together():
    prompts = [i // 3 for i in range(300)]
    pairs = drawn_pairs(prompts, 100, 0)
    assert len(pairs) == 99 and all(
        len({*pairs} & {i, i + 1, i + 2}) in (0, 3) for i in range(0, 300, 3)
    )
    assert drawn_pairs(prompts, 300, 0).tolist() == [*range(300)]
    assert len(drawn_pairs(["one"] * 50, 10, 0)) == 50
    for blank in ("", " \n", None):  # each a prompt of its own
        assert len(drawn_pairs([blank] * 50, 10, 0)) == 10
    assert len(drawn_pairs([0] * 50, 10, 0)) == 50


# ---- styles --------------------------------------------------------------------------------------


def test_styles_are_a_matrix_with_an_order():
    order, n = ("concise", "detailed", "markdown"), 90
    chosen, rejected = np.arange(n) % 3, np.arange(n) // 3 % 3
    margin = np.where(RNG.random(n) < 0.7, 1.0, -1.0)
    names = ("markdown", "concise", "detailed")  # as a file has them
    codes = {style: names.index(style) for style in order}
    attributes = {
        name: Attribute(np.array([codes[order[i]] for i in which]), names)
        for name, which in (("chosen_style", chosen), ("rejected_style", rejected))
    }
    scores = Scores(margin, np.arange(n), attributes, rows=n)
    found = report(scores)["styles"]
    assert found["styles"] == [*order]
    right = margin > 0
    for i, j in itertools.product(range(3), repeat=2):
        expected = right[(chosen == i) & (rejected == j)].mean()
        assert found["matrix"][i][j]["value"] == pytest.approx(expected)
    assert found["hard"]["value"] == pytest.approx(right[chosen < rejected].mean())
    assert found["easy"]["value"] == pytest.approx(right[chosen > rejected].mean())
    assert found["normal"]["value"] == pytest.approx(right[chosen == rejected].mean())
    gate = report(scores, require=["hard accuracy>=0.99"])["requirements"][0]
    assert not gate["met"] and gate["found"]["value"] == found["hard"]["value"]


# ---- gates ---------------------------------------------------------------------------------------


def test_gates_judge_the_numbers_of_the_report():
    groups = {"topic": Attribute(np.arange(N) % 2, ("a b", "c"))}
    scores = made(attributes=groups)
    plain = report(scores)
    group = next(g for g in plain["groups"]["single"] if g["group"] == {"topic": "a b"})
    expected = {
        "typos accuracy>=0.9": find(plain, "typos", "both")["accuracy"],
        "typos/chosen lost<=0.9": find(plain, "typos", "chosen")["lost"],
        "empty success<=1": find(plain, "empty", "rejected")["success"],
        "self_praise preferred<=0.2": next(
            b for b in plain["biases"] if b["change"] == "self_praise"
        )["preferred"],
        "worst-change accuracy>=0.99": plain["worst_change"]["accuracy"],
        "attacks success<=0.01": plain["attacks"]["success"],
        "topic=a b accuracy>=0.5": group["accuracy"],
        "prompt_typos accuracy>=typos": find(plain, "prompt_typos", "prompt")["accuracy"],
    }
    judged = report(scores, require=list(expected))["requirements"]
    for one, (text, number) in zip(judged, expected.items(), strict=True):
        assert one["requirement"] == text and one["found"] == pytest.approx(number)
        bound = text.split("=")[-1]
        if bound != "typos":
            high = ">=" in text
            assert one["met"] == (
                number["value"] >= float(bound) if high else number["value"] <= float(bound)
            )
    typos = find(plain, "typos", "both")["accuracy"]["value"]
    assert judged[-1]["met"] == (judged[-1]["found"]["value"] >= typos)


@pytest.mark.parametrize(
    "text, said",
    [
        ("typoss accuracy>=0.5", "no accuracy of 'typoss'; it has that of typos"),
        ("subset=maths accuracy>=0.5", "no accuracy of 'subset=maths'"),
        ("typos preferred<=0.5", "no preferred of 'typos'"),
        ("tv:0.1 gold>=0.5", "a set has accuracy and loss"),
        ("typos accuracy<=0.5", "accuracy takes >="),
        ("typos success<=1.5", r"must lie in \[0, 1\]"),
        ("worst-change loss<=-1", r"must lie in \[0, inf\)"),
        ("worst-change success<=little", "'little' is not a number"),
    ],
)
def test_gates_that_cannot_be_judged(text, said):
    with pytest.raises(ValueError, match=said):
        report(made(), require=[text])


def test_a_change_on_one_answer_of_each_pair_has_no_number_of_its_name_alone(tmp_path):
    """The chosen answer loses 3 where it changes, the rejected one nothing: neither is meant."""
    rows = [{"chosen_reward": 1.0 + i % 5, "rejected_reward": 2.5} for i in range(60)]
    for i, row in enumerate(rows):
        side, less = ("rejected", 0.0) if i % 2 else ("chosen", 3.0)
        row[f"{side}_reward@mine"] = row[f"{side}_reward"] - less
        row["chosen_reward@other"] = row["chosen_reward"] - 3.0
    path = tmp_path / "scores.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    said = "no pair has both answers changed; expected one of mine/chosen, mine/rejected"
    for gate in ("mine accuracy>=0.5", "mine lost<=0.05"):
        with pytest.raises(ValueError, match=said):
            report(path, require=[gate])
    gates = ["mine/chosen lost<=0.05", "mine/rejected lost<=0.05", "other lost<=0.05"]
    judged = report(path, require=gates)["requirements"]
    right = [np.mean([row["chosen_reward"] - less > 2.5 for row in rows]) for less in (0, 3)]
    assert [one["met"] for one in judged] == [False, True, False]
    assert judged[2]["found"]["value"] == pytest.approx(right[0] - right[1])


@pytest.mark.parametrize("size", [40, 2])
def test_a_gate_on_groups_of_one_name_is_refused(size):
    """Of these two groups, both called a=b=c, one has everything right and the other nothing;
    with two pairs it is too small to rank."""
    half = np.arange(80) < 40
    groups = {
        "a=b": Attribute(half.astype(np.int64), ("c", "d")),
        "a": Attribute((~half | (np.arange(80) >= size)).astype(np.int64), ("b=c", "e")),
    }
    scores = Scores(np.where(half, 1.0, -1.0), np.arange(80), groups, rows=80)
    (other,) = report(scores, require=["a=e accuracy>=0.5"])["requirements"]
    assert other["found"]["value"] == pytest.approx((40 - size) / (80 - size))
    with pytest.raises(ValueError, match="expected one group that is called so"):
        report(scores, require=["a=b=c accuracy>=0.5"])


@pytest.mark.parametrize("column", ["group", "tv=x", "kl"])
def test_groups_whose_columns_are_called_as_sets(column):
    """3 of the 40 pairs of the group are right."""
    groups = {column: Attribute(np.arange(80) // 40, ("math:algebra", "math:sets"))}
    margin = np.where(np.arange(80) < 37, -1.0, 1.0)
    gate = f"{column}=math:algebra accuracy>=0.1"
    judged = report(Scores(margin, np.arange(80), groups, rows=80), require=[gate])["requirements"]
    assert judged[0]["found"]["value"] == pytest.approx(3 / 40) and not judged[0]["met"]
    if column == "kl":
        with pytest.raises(ValueError, match="did you mean 'kl'"):
            parse_requirement("kk:0.1 accuracy>=0.5")


def test_junit_says_what_missed(tmp_path):
    result = stress_test(
        made(), require=["typos accuracy>=0.01", "worst-change accuracy>=0.99"], resamples=20
    )
    root = ElementTree.parse(write_junit(result, tmp_path / "ci" / "gates.xml")).getroot()
    (suite,) = root
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    fine, missed = suite
    assert fine.get("name") == str(parse_requirement("typos accuracy>=0.01"))
    assert fine.find("failure") is None and missed.find("failure") is not None
    assert missed.get("name") == "worst-change accuracy>=0.99"


def test_a_change_of_a_file_may_be_called_as_anything():
    margin = np.array([1.0, 2.0, -1.0, 0.5] * 10)
    styles = {
        name: Attribute(np.arange(40) // at % 2, ("concise", "markdown"))
        for name, at in (("chosen_style", 1), ("rejected_style", 2))
    }
    given = {"seed:1": margin, "hard": np.full(40, -1.0)}
    scores = Scores(margin, np.arange(40), styles, counterfactuals=given, rows=40)
    gates = ["seed:1 accuracy>=0.5", "hard accuracy>=0.5", "tv:0.1 accuracy>=seed:1"]
    judged = report(scores, require=gates)["requirements"]
    assert [one["found"]["value"] for one in judged[:2]] == pytest.approx([0.75, 0.0])
    assert [one["met"] for one in judged] == [True, False, False]


def test_every_pair_of_groups_can_be_required():
    n = 1200
    groups = {
        name: Attribute(np.arange(n) // at % size, tuple(f"{name}{i}" for i in range(size)))
        for name, at, size in (("g", 1, 12), ("k", 12, 10))
    }
    margin = np.where(np.arange(n) % 12 == 0, 1.0, np.where(np.arange(n) % 7 == 0, -1.0, 1.0))
    gates = ["g=g0, k=k0 accuracy>=1"]
    model = report(Scores(margin, np.arange(n), groups, rows=n), require=gates)
    assert model["requirements"][0]["met"] and len(model["groups"]["paired"]) == 20


def test_a_name_that_xml_cannot_hold(tmp_path):
    result = stress_test({"a\x01b": made()}, require=["typos accuracy>=0"], resamples=20)
    root = ElementTree.parse(write_junit(result, tmp_path / "gates.xml")).getroot()
    assert root[0].get("name") == "a\ufffdb"
