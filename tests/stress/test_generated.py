"""The numbers of a policy's own answers, by plain loops; gates, findings and the page."""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
import pytest
from scipy import stats
from test_page import browse

from drrlhf.files.tables import DataError
from drrlhf.stress import Attribute, Generated, stress_generated, write_junit
from drrlhf.stress.report import render
from drrlhf.stress.student import above_zero, students_t

TYPOS, MINE = "prompt_typos", "prompt@mine"
EVIL = "<script>alert('evil')</script>"
NAN = float("nan")


# ---- numbers -------------------------------------------------------------------------------------


def made(prompts=40, answers=4, seed=0, text="good film", **more):
    """Rewards in which topic "law" earns 1 less, and capitals cost 0.5."""
    rng = np.random.default_rng(seed)
    codes = np.arange(prompts) % 2
    plain = rng.normal(1.0 - codes[:, None], 0.5, (prompts, answers))
    upper = plain + rng.normal(-0.5, 0.2, plain.shape)
    upper[::5] = NAN
    typos = plain + rng.normal(0.0, 0.3, plain.shape)
    texts = [[f"answer {i} {k % 3} {text}" for k in range(answers)] for i in range(prompts)]
    forms = [None if i % 5 == 0 else f"PROMPT {i} {text}" for i in range(prompts)]
    given = {
        "rewards": {"": plain, "prompt_upper_case": upper, TYPOS: typos},
        "prompts": [f"prompt {i} {text}" for i in range(prompts)],
        "forms": {
            "prompt_upper_case": forms,
            TYPOS: [f"rpompt {i} {text}" for i in range(prompts)],
        },
        "completions": {
            "": texts,
            "prompt_upper_case": [[] if one is None else texts[0] for one in forms],
            TYPOS: texts,
        },
        "cut": dict.fromkeys(("", "prompt_upper_case", TYPOS), plain < 0),
        "attributes": {"topic": Attribute(codes, ("film", "law"))},
    }
    return Generated(**given | more)


def report(generated=None, **options):
    usual = {"resamples": 50, "min_support": 5}
    result = stress_generated(made() if generated is None else generated, **usual | options)
    (model,) = result["models"].values()
    return model


def test_mean_and_worst_cases_by_loops():
    model, values = report(), sorted(made().rewards[""].mean(1))
    n = len(values)
    assert model["reward"]["value"] == pytest.approx(sum(values) / n)
    assert model["reward"]["low"] < model["reward"]["value"] < model["reward"]["high"]
    # tv:0.1 takes a tenth of the weight from the best prompts and gives it to the worst one.
    weights, left = [1 / n] * n, 0.1
    for i in reversed(range(n)):
        taken = min(left, weights[i])
        weights[i] -= taken
        left -= taken
    weights[0] += 0.1
    moved = sum(w * v for w, v in zip(weights, values, strict=True))
    assert model["worst"]["tv:0.1"]["value"] == pytest.approx(moved)
    assert model["worst"]["cvar:0.3"]["value"] == pytest.approx(sum(values[:12]) / 12)
    for found in model["worst"].values():
        assert found["low"] <= found["value"] < model["reward"]["value"]


def test_changes_by_loops():
    generated, model = made(), report()
    assert [one["change"] for one in model["changes"]] == ["prompt_upper_case", TYPOS]
    for one in model["changes"]:
        old, new = [], []
        for before, after in zip(
            generated.rewards[""], generated.rewards[one["change"]], strict=True
        ):
            if not np.isnan(after).any():
                old.append(sum(before) / 4)
                new.append(sum(after) / 4)
        pairs = list(zip(old, new, strict=True))
        assert one["prompts"] == len(pairs) == (32 if one["change"] != TYPOS else 40)
        assert one["reward_before"] == pytest.approx(sum(old) / len(old))
        assert one["reward"]["value"] == pytest.approx(sum(new) / len(new))
        assert one["lost"]["value"] == pytest.approx(sum(a - b for a, b in pairs) / len(pairs))
        least = stats.t.interval(1 - 0.05 / 2, len(pairs) - 1, 0, 1)[1]
        differences = [a - b for a, b in pairs]
        above = np.mean(differences) - least * stats.sem(differences) > 0
        assert one["beyond_chance"] == above == (one["change"] != TYPOS)
        assert one["falls"]["value"] == sum(b < a for a, b in pairs) / len(pairs)
        assert one["rises"]["value"] == sum(b > a for a, b in pairs) / len(pairs)
    assert model["changes"][0]["lost"]["low"] > 0 > model["changes"][1]["lost"]["low"]


def test_the_worst_change_by_loops():
    generated, worst = made(), report()["worst_change"]
    least, checked, which = [], [], []
    for i in range(40):
        forms = {
            name: rewards[i]
            for name, rewards in generated.rewards.items()
            if not np.isnan(rewards[i]).any()
        }
        means = {name: rewards.mean() for name, rewards in forms.items()}
        which.append(min(means, key=means.get) or "as it is")
        least.append(min(means.values()))
        half = []
        for picks, judges in (((0, 2), (1, 3)), ((1, 3), (0, 2))):
            name = min(forms, key=lambda one: sum(forms[one][k] for k in picks))
            half.append(sum(forms[name][k] for k in judges) / 2)
        checked.append(sum(half) / 2)
    assert worst["prompts"] == 40
    assert worst["reward"]["value"] == pytest.approx(sum(least) / 40)
    assert worst["checked"]["value"] == pytest.approx(sum(checked) / 40)
    assert worst["by"] == {name: which.count(name) / 40 for name in worst["by"]}
    assert sum(worst["by"].values()) == pytest.approx(1)


def test_the_checked_worst_change_knows_chance():
    """Where changes do nothing, the least of nine means is far below the mean, the checked not."""
    rng = np.random.default_rng(0)
    names = ["", *(f"prompt@{i}" for i in range(8))]
    prompts = [f"prompt {i}" for i in range(400)]
    generated = Generated(
        rewards={name: rng.normal(0, 1, (400, 4)) for name in names},
        prompts=prompts,
        forms=dict.fromkeys(names[1:], prompts),
        completions={name: [["a"] * 4] * 400 for name in names},
        cut={name: np.zeros((400, 4), dtype=bool) for name in names},
    )
    worst = report(generated)["worst_change"]
    assert worst["reward"]["value"] < -0.5
    assert abs(worst["checked"]["value"]) < 0.1


def test_groups_have_students_intervals():
    generated, model = made(), report()
    values = generated.rewards[""].mean(1)
    assert model["groups"]["looked_at"] == 2
    assert [one["group"] for one in model["groups"]["single"]] == [
        {"topic": "law"},
        {"topic": "film"},
    ]
    for part, one in ((1, model["groups"]["single"][0]), (0, model["groups"]["single"][1])):
        some = values[part::2]
        assert one["prompts"] == 20
        low, high = stats.t.interval(1 - 0.05 / 2, 19, some.mean(), stats.sem(some))
        assert one["reward"]["value"] == pytest.approx(some.mean())
        assert one["reward"]["low"] == pytest.approx(low)
        assert one["reward"]["high"] == pytest.approx(high)
        assert one["below"] == (high < values.mean()) == bool(part)


def test_prompts_given_twice_count_once():
    once = made()
    twice = made(prompts=40, seed=0, attributes={})
    doubled = Generated(
        rewards={"": np.repeat(once.rewards[""], 2, axis=0)},
        prompts=[one for one in once.prompts for _ in range(2)],
        forms={},
        completions={"": [one for one in once.completions[""] for _ in range(2)]},
        cut={"": np.repeat(once.cut[""], 2, axis=0)},
        attributes={"topic": Attribute(np.arange(80) // 2 % 2, ("film", "law"))},
    )
    a, b = report(twice), report(doubled)
    assert a["reward"] == pytest.approx(b["reward"]) and b["worst_change"] is None
    wide = report()["groups"]["single"][0]["reward"]
    assert b["groups"]["single"][0]["reward"] == pytest.approx(wide)


def test_a_group_of_equal_prompts_is_not_certain():
    rewards = np.zeros((40, 4))
    rewards[::2] = np.random.default_rng(0).normal(0.2, 1.0, (20, 4))
    model = report(made(rewards={"": rewards}, forms={}))
    law = next(one for one in model["groups"]["single"] if one["group"]["topic"] == "law")
    half = stats.t.ppf(1 - 0.0125, 19) * (rewards.mean(1).var() / 20) ** 0.5
    assert law["reward"]["high"] == pytest.approx(half) and half > 0.05


@pytest.mark.parametrize(
    ("prompts", "tests", "sure"),
    [(2, 1, False), (5, 1, False), (6, 1, True), (6, 20, False), (10, 20, True)],
)
def test_a_loss_that_is_equal_everywhere_needs_prompts_enough(prompts, tests, sure):
    """Chance gives all of n prompts one sign with probability 2^-n; the level is 0.025 / tests."""
    lost = np.full(prompts, 0.1)
    assert above_zero(lost, np.arange(prompts), tests) == sure
    assert not above_zero(-lost, np.arange(prompts), tests)
    assert above_zero(lost.repeat(2), np.arange(prompts).repeat(2), tests) == sure  # given twice


@pytest.mark.parametrize("freedom", [1, 2, 5, 29, 400, 100_000])
@pytest.mark.parametrize("share", [0.5, 0.9, 0.975, 0.9995, 0.999999])
def test_students_t_is_scipys(share, freedom):
    expected = stats.t.ppf(share, freedom)
    assert students_t(share, freedom) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_answers_that_were_cut_or_are_equal():
    generated, model = made(), report()
    plain, cut = generated.rewards[""], generated.cut[""]
    assert model["cut"] == cut.sum() / 160
    assert model["reward_of_cut"] == pytest.approx(plain[cut].mean())
    assert model["reward_of_whole"] == pytest.approx(plain[~cut].mean())
    assert model["equal_answers"] == pytest.approx(1 / 6)  # answers 0 and 3 of each prompt
    one = made(answers=1)
    assert np.isnan(report(one)["equal_answers"])
    assert np.isnan(report(one)["worst_change"]["checked"]["value"])


def test_rewards_that_are_none():
    generated = made()
    rewards = {name: one.copy() for name, one in generated.rewards.items()}
    rewards[""][0] = NAN
    rewards[""][1, 2] = np.inf
    lacking = made(rewards=rewards)
    with pytest.raises(DataError, match="model: 5 of 160 answers have no finite reward"):
        stress_generated(lacking, resamples=20)
    model = report(lacking, max_nan=0.1)
    assert (model["dropped"], model["prompts"]) == (5, 39)
    values = [rewards[""][1, [0, 1, 3]].mean(), *rewards[""][2:].mean(1)]
    assert model["reward"]["value"] == pytest.approx(np.mean(values))
    assert "1 prompts without any finite reward were left out." in model["notes"]
    rewards = generated.rewards | {TYPOS: np.full((40, 4), NAN)}
    with pytest.raises(DataError, match="160 of 160 answers under 'prompt_typos'"):
        stress_generated(made(rewards=rewards), resamples=20, max_nan=0.5)


# ---- gates, findings, the page -------------------------------------------------------------------


def test_gates():
    asked = [
        "mean reward>=0.5",
        "tv:0.1 reward>=-5",
        "kl:0.3 reward>=5",
        "prompt_typos lost<=0.1",
        "prompt_upper_case lost<=0.1",
        "prompt_typos reward>=-1",
        "worst-change reward>=-1",
        "topic=law reward>=0.5",
        "topic=film reward>=topic=law",
    ]
    result = stress_generated(made(), require=asked, resamples=20, min_support=5)
    (model,) = result["models"].values()
    judged = {one["requirement"]: one["met"] for one in model["requirements"]}
    mean = model["reward"]["value"]
    assert judged == dict(
        zip(asked, [mean >= 0.5, True, False, True, False, True, True, False, True], strict=True)
    )
    assert not result["passed"] and model["verdict"].startswith(f"{sum(judged.values())} of 9")


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ("tv:0.1 accuracy>=0.5", "of a policy's own answers reward and lost are known"),
        ("prompt_typo reward>=0", "it has that of prompt_typos"),
        ("mean reward<=0.5", "reward takes >="),
        ("tv:0.1 lost<=0.5", "a set has accuracy and loss, or reward"),
        ("mean reward>=inf", r"must lie in \(-inf, inf\)"),
    ],
)
def test_gates_that_cannot_be_judged(gate, message):
    with pytest.raises(ValueError, match=message):
        report(require=[gate])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resamples": 5}, "resamples must be at least 20"),
        ({"min_support": 1}, "min_support must be at least 2"),
        ({"max_nan": 1.0}, "max_nan must lie in"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_numbers_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        report(**options)
    with pytest.raises(ValueError, match="at least one policy"):
        stress_generated({})


def test_findings_have_examples_that_are_real():
    whole = np.zeros((40, 4), dtype=bool)
    generated = made(cut=dict.fromkeys(("", "prompt_upper_case", TYPOS), whole))
    model = report(generated)
    found = {one["subject"]: one for one in model["findings"]}
    assert set(found) == {"changes", "groups", "prompts"}
    assert "prompt: in capitals" in found["changes"]["text"]
    (example, *_) = found["changes"]["examples"]
    row = generated.prompts.index(example["prompt"])
    lost = generated.rewards[""].mean(1) - generated.rewards["prompt_upper_case"].mean(1)
    assert row == np.nanargmax(lost)
    assert example["prompt_after"] == generated.forms["prompt_upper_case"][row]
    place = generated.rewards[""][row].tolist().index(example["reward"])
    assert example["answer"] == generated.completions[""][row][place]
    assert example["mean"] == pytest.approx(generated.rewards[""][row].mean())
    assert example["mean"] - example["mean_after"] == pytest.approx(lost[row])
    assert "topic = law" in found["groups"]["text"]
    (example,) = found["groups"]["examples"]
    assert generated.prompts.index(example["prompt"]) % 2 == 1
    least = int(generated.rewards[""].mean(1).argmin())
    assert found["prompts"]["examples"][0]["prompt"] == generated.prompts[least]


def test_answers_that_were_cut_are_a_finding():
    generated = made()
    found = {one["subject"]: one for one in report(generated)["findings"]}
    share = generated.cut[""].mean()
    assert found["cut"]["text"].startswith(f"{share:.1%} of the answers were cut")
    (example,) = found["cut"]["examples"]
    row = generated.prompts.index(example["prompt"])
    place = generated.rewards[""][row].tolist().index(example["reward"])
    assert generated.cut[""][row, place]
    assert example["answer"] == generated.completions[""][row][place]


def test_what_chance_explains_is_not_called_a_fall():
    both = made()
    quiet = made(
        rewards={"": both.rewards[""], TYPOS: both.rewards[TYPOS] - 0.03},
        forms={TYPOS: both.forms[TYPOS]},
        attributes={},
    )
    model = report(quiet)
    assert model["changes"][0]["lost"]["low"] < 0 < model["changes"][0]["lost"]["value"]
    text = next(one["text"] for one in model["findings"] if one["subject"] == "changes")
    assert text.startswith("No change of the prompt that was tried costs reward beyond chance")


def test_a_sure_loss_is_told_before_a_larger_one_that_may_be_chance():
    both = made()
    rng = np.random.default_rng(1)
    noisy = both.rewards[""] - 0.2 + rng.normal(0, 3, (40, 4))
    noisy -= noisy.mean() - both.rewards[""].mean() + 0.2
    rewards = {"": both.rewards[""], MINE: noisy, TYPOS: both.rewards[""] - 0.1}
    texts = dict.fromkeys(rewards, both.completions[""])
    forms = {MINE: both.forms[TYPOS], TYPOS: both.forms[TYPOS]}
    cut = dict.fromkeys(rewards, both.cut[""])
    model = report(made(rewards=rewards, forms=forms, completions=texts, cut=cut, attributes={}))
    assert [one["change"] for one in model["changes"]] == [MINE, TYPOS]
    text = next(one["text"] for one in model["findings"] if one["subject"] == "changes")
    assert text.startswith("The mean reward falls by 0.100, ") and "(prompt: typos)" in text


def test_chance_seldom_makes_a_fall_of_many_changes():
    """Eight changes that do nothing, a hundred times: in about five of these one seems to fall."""
    rng = np.random.default_rng(0)
    names = [f"prompt@{i}" for i in range(8)]
    prompts = [f"prompt {i}" for i in range(40)]
    alarms = 0
    for _ in range(100):
        generated = Generated(
            rewards={name: rng.normal(0, 1, (40, 1)) for name in ("", *names)},
            prompts=prompts,
            forms=dict.fromkeys(names, prompts),
            completions={name: [["a"]] * 40 for name in ("", *names)},
            cut={name: np.zeros((40, 1), dtype=bool) for name in ("", *names)},
        )
        alarms += any(one["beyond_chance"] for one in report(generated, resamples=20)["changes"])
    assert alarms <= 10


def test_the_page():
    result = stress_generated(
        {"old": made(), "new": made(seed=1)},
        require=["mean reward>=0.5", "prompt_upper_case lost<=0.1"],
        resamples=20,
        min_support=5,
    )
    page = render(result | {"command": "drrlhf stress --generate old"})
    assert page.count("<section") == 5
    for said in ("prompt: in capitals", "topic = law", "✗ missed", "drrlhf stress --generate old"):
        assert said in page
    for model in result["models"].values():
        assert f"{model['reward']['value']:.3f} " in page
        assert f"{model['worst_change']['checked']['value']:.3f} " in page
    assert "below the whole" in page and '<mark class="new">PROMPT</mark>' in page


def test_no_text_of_answers_is_markup():
    result = stress_generated({EVIL: made(text=EVIL)}, resamples=20, min_support=5)
    page = render(result)
    assert page.count("<script>") == 1 and "<script>alert" not in page
    assert page.count("&lt;script&gt;") > 10


def test_a_browser_runs_nothing_of_the_answers(tmp_path):
    result = stress_generated({EVIL: made(text=EVIL)}, resamples=20, min_support=5)
    dom, console = browse(render(result), tmp_path)
    assert not console and "<button" in dom and dom.count("<script>") == 1


def test_one_answer_and_no_change_make_a_page():
    plain = made(answers=1)
    alone = made(answers=1, rewards={"": plain.rewards[""]}, forms={}, attributes={})
    page = render(stress_generated(alone, resamples=20))
    assert "No change of the prompts was tried" in page and "No group to rank" in page
    body = page.partition("<body>")[2].rpartition("<script>")[0]
    assert ">nan" not in body and "None" not in body


def test_junit_has_the_gates(tmp_path):
    result = stress_generated(made(), require=["mean reward>=9"], resamples=20)
    tree = ElementTree.parse(write_junit(result, tmp_path / "j.xml"))
    (case,) = tree.iter("testcase")
    assert case.get("name") == "mean reward>=9" and case.find("failure") is not None
