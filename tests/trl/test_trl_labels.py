"""A column ``p_chosen``: labels that are probabilities, in the trainers of pairs."""

from __future__ import annotations

import pytest

pytest.importorskip("trl")

import steps
import torch
from trl_fixtures import quiet, tiny_pairs, tiny_tokenizer

from drrlhf.trl import RewardConfig, RewardTrainer

METHODS = ["dpo", "reward"]


@pytest.fixture
def run(models, tmp_path):
    def run(method, data, **options):
        return steps.run(method, models[method], str(tmp_path / "out"), data=data, **options)

    return run


def assert_same(found, expected):
    for ours, theirs in zip(found["gradients"], expected["gradients"], strict=True):
        scale = theirs.abs().max()
        assert scale > 1e-4
        torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-6 * max(float(scale), 1.0))


@pytest.mark.parametrize("method", METHODS)
def test_certain_labels_are_no_labels_and_impossible_ones_the_other_way_round(run, method):
    pairs = tiny_pairs(8)
    assert_same(run(method, tiny_pairs(8, p_chosen=[1.0] * 8)), run(method, pairs))
    other = pairs.rename_columns({"chosen": "rejected", "rejected": "chosen"})
    assert_same(run(method, tiny_pairs(8, p_chosen=[0] * 8)), run(method, other))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ambiguity", ["erm", "tv:0.3"])
@pytest.mark.parametrize("labels", ["erm", "chi2:0.4"])
def test_a_step_is_the_same_however_it_is_cut(run, method, ambiguity, labels):
    data = tiny_pairs(8, p_chosen=[0.1, 0.9, 0.5, 1.0, 0.0, 0.7, 0.3, 0.6])
    options = {"ambiguity": ambiguity, "label_ambiguity": labels}
    whole = run(method, data, per_device_train_batch_size=8, **options)
    cut = run(method, data, per_device_train_batch_size=2, gradient_accumulation_steps=4, **options)
    assert_same(cut, whole)
    plain = run(method, tiny_pairs(8), per_device_train_batch_size=8, ambiguity=ambiguity)
    assert not torch.allclose(whole["gradients"][0], plain["gradients"][0], rtol=1e-3)


def test_the_worst_probability_costs(run):
    """The loss that is logged is over the worst probabilities: larger, and by definition."""
    data = tiny_pairs(8, p_chosen=[0.8] * 8)
    options = {"per_device_train_batch_size": 8}
    found = [
        run("reward", data, label_ambiguity=text, **options)["logs"][0]["loss"]
        for text in ("erm", "chi2:0.02", "chi2:0.5", "chi2:100")
    ]
    losses = [float(loss) for loss in found]
    assert losses == sorted(losses) and losses[0] < losses[1] < losses[2] < losses[3]


@pytest.mark.parametrize(
    ("values", "options", "words"),
    [
        ([0.5] * 7 + [1.5], {}, r"column 'p_chosen' of train_dataset holds 1.5: .*\[0, 1\]"),
        ([0.5] * 7 + [-0.1], {}, "holds -0.1"),
        (None, {"label_ambiguity": "chi2:0.1"}, "needs a column 'p_chosen'"),
        ([0.5] * 8, {"label_ambiguity": "tv:0.1"}, "label_ambiguity: expected 'erm' or 'chi2"),
    ],
)
def test_what_is_wrong_is_named(models, tmp_path, values, options, words):
    data = tiny_pairs(8, **({} if values is None else {"p_chosen": values}))
    with pytest.raises(ValueError, match=words):
        RewardTrainer(
            model=models["reward"],
            args=RewardConfig(str(tmp_path), **quiet(**options)),
            train_dataset=data,
            processing_class=tiny_tokenizer(),
        )
