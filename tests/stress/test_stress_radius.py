"""A radius from scored pairs: it covers what it says, and nothing weaker does."""

from __future__ import annotations

import json
import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from drrlhf.ambiguity import TV, CVaR, parse_ambiguity
from drrlhf.cli import app
from drrlhf.stress import radius, suggest_radius
from drrlhf.stress.curves import worst_case
from drrlhf.stress.scores import from_table

FAMILIES = tuple(radius.STRONGEST)


def scores(margin, **columns):
    return from_table(pa.table({"margin": margin, **columns}), "made up", all_right=True)


def two_domains(n=600, seed=0):
    rng = np.random.default_rng(seed)
    domain = rng.choice(["film", "law"], n, p=[0.8, 0.2])
    return scores(rng.normal(1.5 - 1.2 * (domain == "law"), 1), domain=domain)


# ---- covering ------------------------------------------------------------------------------------


@given(
    st.lists(st.floats(0, 8), min_size=2, max_size=40),
    st.floats(0.001, 1.2),
    st.sampled_from(FAMILIES),
)
def test_the_suggested_set_covers_and_a_weaker_one_does_not(losses, share, family):
    """``share`` places the target between the mean (0) and the largest loss (1)."""
    values = np.array(losses)
    target = values.mean() + share * (values.max() - values.mean())
    found = radius.covering(values, target, family)
    if found is None:
        strongest = radius._of_strength(family, radius.STRONGEST[family])
        assert worst_case(values, None, strongest) < target
        return
    assert worst_case(values, None, found) >= target - 1e-12
    strength = radius.strength_of(found)
    if strength > 20 * radius.WEAKEST and target > values.mean() + 1e-9:
        weaker = radius._of_strength(family, strength * 0.85)
        assert worst_case(values, None, weaker) < target + 1e-12


def test_by_hand():
    losses = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    # Moving r of mass from 0 to 1 makes the mean 0.1 + r; CVaR at alpha is 0.1 / alpha.
    assert radius.covering(losses, 0.35, "tv") == TV(radius=0.25)
    assert radius.covering(losses, 0.4, "cvar") == CVaR(alpha=0.25)
    assert radius.covering(losses, 0.1, "tv") == TV(radius=0)
    assert radius.covering(losses, 0.05, "cvar") == CVaR(alpha=1)
    assert radius.covering(losses, 1.01, "tv") is None


@pytest.mark.parametrize(
    ("target", "alpha"),
    # Of 999 losses of 0 and one of 10 the worst alpha >= 0.001 have the mean 0.01 / alpha.
    [(0.99, 0.01), (1.05, 0.0095), (2.45, 0.004), (3.0, 0.0033), (9.6, 0.001)],
)
def test_a_small_alpha_has_two_digits_of_its_own(target, alpha):
    """Its strength 1 - alpha would be 1.0 to two digits, an alpha of 0."""
    losses = np.array([0.0] * 999 + [10.0])
    assert radius.covering(losses, target, "cvar") == CVaR(alpha=alpha)


@pytest.mark.parametrize(
    ("strength", "up"),
    [(0.1, 0.1), (0.1001, 0.11), (0.0994, 0.1), (0.999, 1.0), (1.23e-5, 1.3e-5), (34.2, 35)],
)
def test_rounding_is_up_to_two_digits(strength, up):
    assert radius._rounded(strength, up=True) == pytest.approx(up, rel=1e-12)


# ---- the two rules -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["kl", "chi2"])
@pytest.mark.parametrize("n", [1000, 4000])
def test_chance_alone_is_the_radius_of_theory(family, n):
    """z² / (2n) for n independent pairs, to the noise of the bootstrap's quantile."""
    found = suggest_radius(scores(np.random.default_rng(n).normal(0.5, 1, n)), resamples=4000)
    got = radius.strength_of(parse_ambiguity(found["bootstrap"]["sets"][family]))
    assert got == pytest.approx(1.6449**2 / (2 * n), rel=0.2)


def test_pairs_of_a_prompt_are_resampled_together():
    """Ten copies of each pair are no more knowledge than one, when they share a prompt."""
    margin = np.random.default_rng(1).normal(0.5, 1, 300)
    copied = {"margin": np.repeat(margin, 10), "prompt_id": np.repeat(np.arange(300), 10)}
    together = suggest_radius(from_table(pa.table(copied), "made up"), resamples=2000)
    single = suggest_radius(scores(margin), resamples=2000)
    apart = suggest_radius(scores(np.repeat(margin, 10)), resamples=2000)
    one, same, less = (
        radius.strength_of(parse_ambiguity(found["bootstrap"]["sets"]["kl"]))
        for found in (single, together, apart)
    )
    assert same == pytest.approx(one, rel=0.15) and less < one / 5


def test_every_group_is_covered_by_the_pairs_outside():
    found = two_domains()
    result = suggest_radius(found, group_by="domain")
    codes, names = found.attributes["domain"].codes, found.attributes["domain"].names
    losses = np.logaddexp(0, -found.margin)
    for family in FAMILIES:
        chosen = parse_ambiguity(result["groups"]["sets"][family])
        for code in range(len(names)):
            outside = losses[codes != code]
            assert worst_case(outside, None, chosen) >= losses[codes == code].mean() - 1e-12
        assert result["groups"]["decided_by"][family] == "law"
        chance = parse_ambiguity(result["bootstrap"]["sets"][family])
        assert 0 < radius.strength_of(chance) < radius.strength_of(chosen)


def test_groups_that_cannot_be_covered_and_small_ones_are_named():
    margin = np.r_[np.linspace(1, 2, 100), np.linspace(-9, -8, 100), [0.5, 1.5]]
    groups = ["easy"] * 100 + ["hard"] * 100 + ["tiny"] * 2
    result = suggest_radius(scores(margin, group=groups), group_by="group")["groups"]
    assert result["sets"]["tv"] is None and result["decided_by"]["tv"] == "hard"
    assert result["too_small"] == ["tiny"] and len(result["each"]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_by": "topic"}, "no attribute 'topic' in made up; has: domain"),
        ({"group_by": "only"}, r"no attribute 'only' \(constant\)"),
        ({"group_by": "domain", "min_support": 500}, "has 0 groups of at least 500 prompts"),
        ({"families": ["group"]}, "families must be of tv, kl, chi2, cvar; got"),
        ({"quantile": 0.5}, r"quantile must lie in \(0.5, 1\), got 0.5"),
        ({"resamples": 10}, "resamples must be at least 100"),
        ({"min_support": 1}, "min_support must be at least 2"),
    ],
)
def test_mistakes(options, message):
    margin = np.random.default_rng(0).normal(1, 1, 100)
    found = scores(margin, domain=["a", "b"] * 50, only=["x"] * 100)
    with pytest.raises(ValueError, match=message):
        suggest_radius(found, **options)


# ---- as a command --------------------------------------------------------------------------------


def command(*arguments):
    return CliRunner().invoke(app, ["suggest-radius", *map(str, arguments)])


def jsonl(path, n=200):
    rng = np.random.default_rng(0)
    rows = [{"margin": rng.normal(1.5 - (i % 2)), "domain": "ab"[i % 2]} for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_command_prints_and_writes_what_the_function_says(tmp_path):
    file, out = jsonl(tmp_path / "val.jsonl"), tmp_path / "new" / "radius.json"
    done = command("--scores", file, "--group-by", "domain", "--output", out)
    assert done.exit_code == 0, done.output
    written = json.loads(out.read_text())
    for rule in ("bootstrap", "groups"):
        for text in written[rule]["sets"].values():
            assert text in done.output
    assert "b: " in done.output and [*out.parent.iterdir()] == [out]
    plain = command("--scores", file)
    assert plain.exit_code == 0 and "Chance is not shift" in plain.output
    few = "Only 29 different prompts"
    assert few in command("--scores", jsonl(file, 29)).output
    assert "different prompts" not in command("--scores", jsonl(file, 30)).output


def test_a_path_with_marks_of_a_terminal(tmp_path):
    (tmp_path / "w[").mkdir()
    (tmp_path / "w[" / "a]x").mkdir()  # in all it reads w[/a]x, the end of a mark
    done = command("--scores", jsonl(tmp_path / "w[" / "a]x" / "s.jsonl"))
    assert done.exit_code == 0, done.output


def test_pairs_that_are_all_right_are_no_mistake_here(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps({"margin": 1 + i % 7}) + "\n" for i in range(50)))
    done = command("--scores", file)
    assert done.exit_code == 0, done.output
    assert math.isfinite(float(done.output.split("Mean loss ")[1].split()[0]))


def test_a_wrong_file_is_one_line(tmp_path):
    done = command("--scores", tmp_path / "none.jsonl")
    assert done.exit_code == 2 and "no such file" in done.output and "Traceback" not in done.output
    file = jsonl(tmp_path / "val.jsonl")
    done = command("--scores", file, "--group-by", "topic", "--output", tmp_path / "out.json")
    assert done.exit_code == 2 and "has: domain" in done.output
    assert not (tmp_path / "out.json").exists()
