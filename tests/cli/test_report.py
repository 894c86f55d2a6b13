"""Curves of a run: what is drawn from which line, and what cannot be drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from drrlhf.report import figure_of, group_columns, plot_comparison, plot_training, save


def _lines(n: int = 60, **columns) -> list[dict]:
    return [
        {"step": step, "event": "train", "loss": 1 / step}
        | {name: values[step % len(values)] for name, values in columns.items()}
        for step in range(1, n + 1)
    ]


def _write(path, lines, tail: str = ""):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return path


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, to look into."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1]
    )
    return figures


def _curves(axis) -> dict[str, list[float]]:
    lines = axis.get_lines()
    return {
        line.get_label(): list(line.get_ydata()) for line in lines if line.get_label()[0] != "_"
    }


def test_a_robust_run_with_groups_has_three_labelled_panels(tmp_path, drawn):
    robust = {"robust/effective_sample_size": [0.5], "robust/max_weight": [2.0, 4.0]}
    groups = {"group/a/nyt/weight": [0.9], "group/a/nyt/state": [0.6], "group/7/state": [0.4]}
    lines = _lines(20, **robust, **groups, **{"robust/value": [0.25]})
    lines.append({"step": 20, "event": "eval", "eval_loss": 0.7})
    path = plot_training(_write(tmp_path / "m.jsonl", lines), tmp_path / "m.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    loss, weights, group, largest = drawn[0].axes
    assert _curves(loss) == {
        "training loss": [line["loss"] for line in lines[:-1]],
        "worst case of each step": [0.25] * 20,
        "evaluation loss": [0.7],
    }
    assert _curves(weights) == {"effective sample size": [0.5] * 20}
    assert _curves(largest) == {"largest weight": [4.0, 2.0] * 10}
    assert _curves(group) == {"group 7": [0.4] * 20, "a/nyt": [0.6] * 20}
    assert group.get_xlabel() == "optimizer step"
    assert loss.get_ylabel() == "loss" and group.get_ylabel() == "group weight"


def test_a_policys_rewards_come_first_and_those_of_groups_last(tmp_path, drawn):
    columns = {"reward": [1.0], "robust/worst_case_reward": [0.5], "robust/max_weight": [2.0]}
    groups = {"group/0/weight": [0.9], "group/0/reward": [3.0, 4.0], "group/_b/reward": [5.0]}
    lines = _lines(6, **columns, **groups, **{"robust/effective_sample_size": [0.5]})
    lines.append({"step": 6, "event": "eval", "eval_reward": 1.5})
    plot_training(_write(tmp_path / "m.jsonl", lines), tmp_path / "m.png")
    rewards, _, _, weight, of_groups, _ = drawn[0].axes
    assert _curves(rewards) == {
        "mean reward": [1.0] * 6,
        "worst case of each step": [0.5] * 6,
        "held out": [1.5],
    }
    assert _curves(weight) == {"group 0": [0.9] * 6}
    assert _curves(of_groups) == {"group 0": [4.0, 3.0] * 3, "group _b": [5.0] * 6}


def test_a_plain_run_has_one_panel_and_long_curves_are_smoothed(tmp_path, drawn):
    lines = [{"step": i, "event": "train", "loss": float(i % 2)} for i in range(1, 101)]
    plot_training(_write(tmp_path / "m.jsonl", lines), tmp_path / "m.png")
    (axis,) = drawn[0].axes
    smooth = _curves(axis)["training loss"]
    assert smooth[0] == 1.0 and smooth[3:] == [0.5] * 97  # trailing mean over four steps


def test_a_loss_that_is_not_finite_is_a_gap(tmp_path, drawn):
    lines = _lines(5)
    lines[2]["loss"] = None
    plot_training(_write(tmp_path / "m.jsonl", lines), tmp_path / "m.png")
    values = _curves(drawn[0].axes[0])["training loss"]
    assert values[2] != values[2] and values[3] == 0.25


def test_equal_loss_and_worst_case_are_one_curve(tmp_path, drawn):
    lines = [line | {"robust/value": line["loss"]} for line in _lines(5)]
    plot_training(_write(tmp_path / "m.jsonl", lines), tmp_path / "m.png")
    assert list(_curves(drawn[0].axes[0])) == ["training loss (worst case of each step)"]


def test_the_plain_mean_is_drawn_beside_the_worst_case(tmp_path, drawn):
    lines = [line | {"robust/mean_loss": 0.2} for line in _lines(5)]
    plot_training(_write(tmp_path / "m.jsonl", lines), tmp_path / "m.png")
    assert set(_curves(drawn[0].axes[0])["plain mean of each step"]) == {0.2}


def test_group_weights_fall_back_to_the_batch():
    lines = [{"group/1/weight": 0.5}, {"group/0/weight": 0.5, "group/0/state": 0.2}]
    assert group_columns(lines) == {"0": "group/0/state", "1": "group/1/weight"}


def test_a_picture_that_cannot_be_finished_leaves_the_old_one(tmp_path, monkeypatch):
    metrics, picture = _write(tmp_path / "m.jsonl", _lines(2)), tmp_path / "m.png"
    picture.write_text("old")

    def half(figure, target, **_):
        Path(target).write_text("half")
        raise OSError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", half)
        with pytest.raises(OSError, match="no space"):
            plot_training(metrics, picture)
    assert picture.read_text() == "old" and len(list(tmp_path.iterdir())) == 2
    plot_training(metrics, picture)
    assert picture.read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 2


def test_nothing_to_plot_is_said(tmp_path):
    with pytest.raises(ValueError, match="no training step was logged"):
        plot_training(_write(tmp_path / "m.jsonl", []), tmp_path / "m.png")
    assert not (tmp_path / "m.png").exists()


def test_comparison_shows_every_setting_in_every_domain(tmp_path, drawn):
    def score(accuracy, margin):
        return {
            "accuracy": accuracy,
            "accuracy_error": 0.05,
            "margin": margin,
            "margin_error": 0.1,
        }

    result = {
        "settings": {"steps": 4},
        "model": "a model",
        "data": "derived",
        "domains": {"movie": "95%", "nyt": "unseen"},
        "runs": [
            {"ambiguity": "erm", "held_out": {"movie": score(0.7, 1.0), "nyt": score(0.5, -1.0)}},
            {"ambiguity": "tv:0.1", "held_out": {"movie": score(0.6, 2.0), "nyt": score(0.8, 3.0)}},
        ],
    }
    plot_comparison(result, tmp_path / "c.png")
    accuracy, margin = drawn[0].axes
    assert [patch.get_height() for patch in accuracy.patches] == [0.7, 0.5, 0.6, 0.8]
    assert [patch.get_height() for patch in margin.patches] == [1.0, -1.0, 2.0, 3.0]
    assert [text.get_text() for text in accuracy.get_legend().get_texts()] == ["erm", "tv:0.1"]
    assert "derived" in drawn[0].get_suptitle()


BROKEN = r"cost $\frac{1$ and $_$"  # no mathematics that matplotlib can read


def test_a_dollar_in_a_name_is_a_dollar(tmp_path, drawn):
    lines = _lines(20, **{f"group/{BROKEN}/weight": [0.9], "group/$a$/weight": [0.1]})
    plot_training(_write(tmp_path / "m.jsonl", lines), tmp_path / "m.png", title=BROKEN)
    score = dict.fromkeys(("accuracy", "accuracy_error", "margin", "margin_error"), 0.5)
    result = {
        "settings": {"steps": 4},
        **{"model": BROKEN, "data": BROKEN, "domains": {BROKEN: BROKEN}},
        "runs": [{"ambiguity": BROKEN, "held_out": {BROKEN: score}}],
    }
    plot_comparison(result, tmp_path / "c.png")
    for figure in drawn:
        texts = [one for one in figure.findobj(Text) if "$" in one.get_text()]
        assert len(texts) >= 3 and not any(one.get_parse_math() for one in texts)


def test_numbers_along_an_axis_keep_their_powers(tmp_path):
    figure = figure_of(3, 3)
    axis = figure.subplots()
    axis.set_xscale("log")
    axis.plot([1e-6, 1e6], [0, 1])
    save(figure, tmp_path / "p.png")
    labels = [one for one in axis.get_xticklabels() if "10^" in one.get_text()]
    assert labels and all(one.get_parse_math() for one in labels)
