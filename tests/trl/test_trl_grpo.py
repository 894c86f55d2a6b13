"""GRPO against the worst distribution of prompts: TRL's step without an adversary, ours with."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("trl")

from trl_fixtures import tiny_llama_dir, tiny_mixtral_dir, tiny_pairs  # isort: skip (settles the environment)

import steps
import torch
from safetensors.torch import load_file
from test_trl_step import PARTS, WHOLE
from three_ways import in_turn

import drrlhf as dr
from drrlhf.trl import grpo
from drrlhf.trl.prompts import PassRates, identity

SETS = ["tv:0.3", "cvar:0.4", "group:2,step_size=0.5", "kl:temperature=1,momentum=0.5"]
LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_llama_dir(tmp_path_factory.mktemp("llama")))


@pytest.fixture
def run(model, tmp_path):
    def run(method="grpo", **options):
        return steps.run(method, model, str(tmp_path / "out"), **options)

    return run


def assert_same_steps(found, expected, atol=2e-6):
    assert len(found["gradients"]) == len(expected["gradients"]) > 0
    for ours, theirs in zip(found["gradients"], expected["gradients"], strict=True):
        scale = theirs.abs().max().item()
        assert scale > 1e-3
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol * max(scale, 1.0))


def robust(log):
    return {k: v for k, v in log.items() if k.startswith(("robust/", "group/"))}


def test_erm_is_trl_to_the_bit(run):
    options = {"max_steps": 3, "beta": 0.1, "gradient_accumulation_steps": 2}
    ours, theirs = run(head="trl", share_prompts=False, **options), run("trl", **options)
    assert torch.equal(ours["parameters"], theirs["parameters"])
    timed = ("step_time", "epoch")
    for mine, log in zip(ours["logs"], theirs["logs"], strict=True):
        assert {k: v for k, v in mine.items() if k not in timed} == {
            k: v for k, v in log.items() if k not in timed
        }


def test_streamed_prompts_are_trained_on_as_trl_does(run):
    data = tiny_pairs(8, group=[0, 1] * 4).to_iterable_dataset()
    options = {"data": data, "max_steps": 3, "num_train_epochs": 2}
    theirs = run("trl", **options)
    plain = run(head="trl", share_prompts=False, **options)
    assert torch.equal(plain["parameters"], theirs["parameters"])
    assert_same_steps(run(ambiguity="tv:0", share_prompts=False, **options), theirs)
    weighed = run(ambiguity="group:2,step_size=0.5", **options)["logs"]
    assert all(0 < log["group/0/weight"] < 1 for log in weighed)


@pytest.mark.parametrize("loss_type, level", in_turn(LOSSES, ["token", "sequence"]))
def test_a_radius_of_zero_is_trl(run, loss_type, level):
    """Through our loss, over accumulated batches, with a reference and several updates a batch."""
    options = {
        "loss_type": loss_type,
        "importance_sampling_level": level,
        "beta": 0.2,
        "max_steps": 3,
        "num_iterations": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.05,
    }
    # shared prompts come together, and TRL's metrics are means by batch
    ours, theirs = run(ambiguity="tv:0", share_prompts=False, **options), run("trl", **options)
    assert_same_steps(ours, theirs, atol=5e-6)
    for mine, log in zip(ours["logs"], theirs["logs"], strict=True):
        for name, number in log.items():
            if name not in ("step_time", "epoch", "grad_norm"):
                assert mine[name] == pytest.approx(number, rel=1e-4, abs=2e-5), name


@pytest.mark.parametrize("loss_type", LOSSES)
def test_weights_reach_every_completion(run, monkeypatch, loss_type):
    """Our loss, and TRL's own with its advantages multiplied by m q, are the same step."""
    options = {"ambiguity": "kl:0.3", "loss_type": loss_type, "beta": 0.0, **PARTS}
    ours = run(**options)
    monkeypatch.setattr(grpo, "_beyond", lambda config: ["everything"])
    assert_same_steps(ours, run(**options))
    plain = run(**(options | {"ambiguity": "erm"}))
    assert (ours["gradients"][0] - plain["gradients"][0]).abs().max() > 1e-3


def test_the_auxiliary_loss_of_experts_is_over_all_completions(tmp_path, monkeypatch):
    """TRL's own loss takes it over all of them, whatever their advantages."""
    model = str(tiny_mixtral_dir(tmp_path))
    options = {"ambiguity": "cvar:0.25", "beta": 0.0, "loss_type": "grpo", **WHOLE}
    ours = steps.run("grpo", model, str(tmp_path / "out"), **options)
    monkeypatch.setattr(grpo, "_beyond", lambda config: ["everything"])
    theirs = steps.run("grpo", model, str(tmp_path / "out"), **options)
    assert ours["logs"][0]["robust/kept"] == 0.25
    assert ours["logs"][0]["aux_loss"] == pytest.approx(theirs["logs"][0]["aux_loss"], rel=1e-5)
    assert_same_steps(ours, theirs)


def test_only_ratios_of_weights_matter(run):
    ratios = [1.0, 0.5, 0.0, 2.0] * 2
    for ambiguity in ("erm", "kl:0.3"):
        found, wanted = (
            run(ambiguity=ambiguity, data=tiny_pairs(8, weight=[size * w for w in ratios]), **PARTS)
            for size in (1e-300, 1.0)
        )
        assert_same_steps(found, wanted)
        assert robust(found["logs"][0]) == pytest.approx(robust(wanted["logs"][0]), rel=1e-6)


@pytest.mark.parametrize("ambiguity, loss_type", in_turn(SETS, ["grpo", "dapo"]))
def test_the_step_is_the_adversarys_however_it_is_cut(run, loss_type, ambiguity):
    data = tiny_pairs(8, group=[0, 1] * 4)
    options = {"ambiguity": ambiguity, "loss_type": loss_type, "data": data, "max_steps": 2}
    parts, whole = run(**options, **PARTS), run(**options, **WHOLE)
    assert_same_steps(parts, whole)
    for mine, log in zip(parts["logs"], whole["logs"], strict=True):
        assert robust(mine) == pytest.approx(robust(log), rel=1e-5)


def test_microbatch_scope_weighs_each_batch_alone(run):
    options = {"ambiguity": "cvar:0.5", **PARTS}
    alone = run(robust_scope="microbatch", **options)
    step = run(**options)
    assert (alone["gradients"][0] - step["gradients"][0]).abs().max() > 1e-3


def test_shared_prompts_leave_an_adversary_of_one_batch_its_prompts(run):
    """Brought together, each batch would hold one prompt, and nothing to choose from."""
    options = {"ambiguity": "cvar:0.5", "robust_scope": "microbatch", **PARTS}
    assert_same_steps(run(share_prompts=True, **options), run(share_prompts=False, **options))


def test_experts_are_balanced_over_the_batches_that_trl_makes(tmp_path):
    model = str(tiny_mixtral_dir(tmp_path))
    options = {"beta": 0.0, "loss_type": "grpo", **PARTS}
    ours, theirs = (
        steps.run(kind, model, str(tmp_path / "out"), **options) for kind in ("grpo", "trl")
    )
    assert ours["logs"][0]["aux_loss"] == pytest.approx(theirs["logs"][0]["aux_loss"], rel=1e-5)
    assert_same_steps(ours, theirs)


def test_generating_within_a_step_is_waited_for(run):
    """Fewer batches are generated at a time than a step has: the adversary sees all of them."""
    options = {"ambiguity": "tv:0.3", "loss_type": "grpo"}
    found = run(steps_per_generation=1, **options, **PARTS)
    whole = run(**options, **WHOLE)
    assert_same_steps(found, whole)


def test_completions_without_weight_are_left_out(run, monkeypatch):
    seen = []
    real = grpo.surrogate

    def watched(logps, *rest, **options):
        seen.append(len(logps))
        return real(logps, *rest, **options)

    monkeypatch.setattr(grpo, "surrogate", watched)
    run(ambiguity="cvar:0.25", **WHOLE)
    assert seen == [2]  # of four prompts one, with its two completions


def test_our_head_serves_policy_and_reference(run, monkeypatch):
    from drrlhf.trl import head

    calls = []
    real = head.linear_token_logprobs

    def watched(hidden, *rest, **options):
        calls.append(hidden.requires_grad)
        return real(hidden, *rest, **options)

    monkeypatch.setattr(head, "linear_token_logprobs", watched)
    options = {"ambiguity": "tv:0.3", "beta": 0.1, "share_prompts": False} | WHOLE
    run(head="drrlhf", num_iterations=2, **options)
    assert calls == [False, False, True]  # the policy that sampled, the reference, the policy
    calls.clear()
    run(head="trl", **options)
    assert not calls


def test_what_is_logged(run):
    data = tiny_pairs(8, group=[0, 1] * 4)
    (log,) = run(ambiguity="group:2,step_size=0.5", data=data, **WHOLE)["logs"]
    assert log["robust/reward"] == pytest.approx(log["reward"], rel=1e-6)
    assert log["robust/worst_case_reward"] < log["robust/reward"]
    assert log["group/0/weight"] + log["group/1/weight"] == pytest.approx(1)
    assert log["group/0/state"] + log["group/1/state"] == pytest.approx(1)
    worse = min((0, 1), key=lambda g: log[f"group/{g}/reward"])
    assert log[f"group/{worse}/weight"] > 0.5
    assert log["robust/overflowed"] == 0


def test_plain_training_logs_groups_and_stays_trls(run):
    data = tiny_pairs(8, group=[0, 1] * 4)
    found = run(data=data, head="trl", share_prompts=False, **WHOLE)
    (log,) = found["logs"]
    assert log["group/0/reward"] + log["group/1/reward"] == pytest.approx(2 * log["reward"])
    assert not any(name.startswith("robust/") or name.endswith("/weight") for name in log)
    assert torch.equal(found["parameters"], run("trl", data=data, **WHOLE)["parameters"])


def test_nominal_weights_mask_prompts(run):
    data = tiny_pairs(4, weight=[1.0, 1.0, 0.0, 1.0])
    options = {"data": data, "shuffle_dataset": False, "loss_type": "grpo", **WHOLE}
    found = run(**options)
    (log,) = found["logs"]
    assert log["robust/kept"] == 1 and log["robust/max_weight"] == pytest.approx(1)
    # The three others, alone in the batch.
    rest = {"data": data.select([0, 1, 3]).remove_columns("weight"), "shuffle_dataset": False}
    expected = run("trl", loss_type="grpo", **rest, per_device_train_batch_size=6)
    assert_same_steps(found, expected)


def test_a_column_of_weights_is_named(model, tmp_path, caplog):
    """A script of TRL's may have one for its reward functions."""
    steps.trainer("grpo", model, str(tmp_path))
    assert not [r for r in caplog.records if r.name.startswith("drrlhf")]
    steps.trainer("grpo", model, str(tmp_path), data=tiny_pairs(8, weight=[1.0] * 8))
    (said,) = (r for r in caplog.records if r.name.startswith("drrlhf"))
    assert "'weight' is used as the nominal weight of every prompt" in said.getMessage()


def test_probabilities_of_labels_are_no_business_of_prompts(model, tmp_path):
    """Pairs lend their prompts with whatever columns they have."""
    data = tiny_pairs(8, p_chosen=[0.5, None] * 4)
    own = {"data": data, "trainer_eval_dataset": data.remove_columns(["chosen", "rejected"])}
    trainer = steps.trainer("grpo", model, str(tmp_path), **own)
    assert "p_chosen" in trainer.train_dataset.column_names


def test_prompts_that_cannot_be_scored_are_masked(run):
    def reward(prompts, **_):
        return [None if len(p) % 3 == 0 else r for p, r in zip(prompts, steps.by_place(prompts))]

    found = run(ambiguity="tv:0.3", trainer_reward_funcs=reward, **WHOLE)
    assert all(torch.isfinite(g).all() for g in found["gradients"])
    assert math.isfinite(found["logs"][0]["robust/worst_case_reward"])


def test_evaluation_sees_the_whole_set(model, tmp_path):
    data = tiny_pairs(8, group=[0, 1] * 4).remove_columns(["chosen", "rejected"])
    trainer = steps.trainer(
        "grpo",
        model,
        str(tmp_path),
        data=data,
        ambiguity="group:2,step_size=0.5",
        trainer_eval_dataset=data,
        per_device_eval_batch_size=4,
    )
    before = trainer.group_state.weights.clone()
    trainer.evaluate()
    (log,) = (entry for entry in trainer.state.log_history if "eval_loss" in entry)
    values = torch.tensor(steps.by_place([p for p in data["prompt"] for _ in range(2)]))
    values = values.view(-1, 2).mean(1).double()
    expected = dr.robust_risk(
        -values, dr.Group(2, 0.5), groups=torch.tensor([0, 1] * 4), update=False
    ).value
    assert log["eval_robust/worst_case_reward"] == pytest.approx(-expected.item(), rel=1e-6)
    assert log["eval_group/0/reward"] == pytest.approx(values[::2].mean().item(), rel=1e-6)
    assert torch.equal(trainer.group_state.weights, before)


# ------------------------------------------------------------------------------------- pass rates


def test_pass_rates_count_and_group():
    rates = PassRates()
    a, b, c = (identity(text) for text in "abc")
    assert rates.groups(torch.tensor([a, b]), 4).tolist() == [0, 0]
    rates.record(torch.tensor([a, a, b]), torch.tensor([1, 0, 1]), torch.tensor([1, 1, 1]))
    rates.record(torch.tensor([b]), torch.tensor([1]), torch.tensor([1]))
    assert rates.rates(torch.tensor([a, b, c]))[:2].tolist() == [0.5, 1.0]
    assert rates.groups(torch.tensor([a, b, c]), 4).tolist() == [2, 3, 0]
    again = PassRates()
    again.load_state_dict(rates.state_dict())
    assert torch.equal(again.counts, rates.counts) and torch.equal(again.known, rates.known)


def test_groups_by_running_pass_rate(run, tmp_path):
    options = {"ambiguity": "group:3,step_size=0.5", "group_by": "pass_rate", "pass_threshold": 1.5}
    found = run(max_steps=4, save_strategy="steps", save_steps=4, pairs=4, **options, **WHOLE)
    first, *_, last = found["logs"]
    assert "group/1/reward" not in first  # nothing is known at first: all are in group 0
    assert sum(f"group/{g}/reward" in last for g in range(3)) >= 2
    kept = load_file(tmp_path / "out" / "checkpoint-4" / "drrlhf_state.safetensors")
    assert len(kept["pass_rates.known"]) == 4 and kept["pass_rates.counts"][:, 1].sum() == 32


def test_resuming_gives_the_same_numbers(run, tmp_path):
    options = {
        "ambiguity": "group:3,step_size=0.5",
        "group_by": "pass_rate",
        "pass_threshold": 1.5,
        "pairs": 4,
        **WHOLE,
    }
    whole = run(max_steps=4, save_strategy="steps", save_steps=2, **options)
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    resumed = run(max_steps=4, resume_from_checkpoint=checkpoint, **options)
    torch.testing.assert_close(resumed["parameters"], whole["parameters"], rtol=0, atol=1e-6)
    assert robust(resumed["logs"][-1]) == pytest.approx(robust(whole["logs"][-1]))
    others = {
        "saved with reward_ambiguity='mean', resumed with 'min'": {"reward_ambiguity": "min"},
        "saved with group_by='pass_rate 1.5', .* 'pass_rate 0.5'": {"pass_threshold": 0.5},
    }
    for words, other in others.items():
        with pytest.raises(ValueError, match=words):
            run(max_steps=4, resume_from_checkpoint=checkpoint, **options | other)


# ----------------------------------------------------------------------------------- what is wrong

WRONG = {
    "beyond": (
        {"ambiguity": "tv:0.1", "beta": 0.1, "loss_type": "sapo"},
        "loss_type='sapo' with beta",
    ),
    "no column": ({"ambiguity": "group:2"}, "train_dataset has no column 'group'"),
    "no groups": ({"group_by": "pass_rate"}, "group_by='pass_rate' groups prompts for a Group set"),
    "name": ({"group_by": "passrate"}, "did you mean 'pass_rate'"),
    "set": ({"ambiguity": "tv:2"}, "radius"),
    "rewards": ({"reward_ambiguity": "chi2:1"}, "reward_ambiguity: expected 'min'"),
    "best reward": ({"reward_ambiguity": "max"}, "reward_ambiguity: expected 'min'"),
    "no such": ({"reward_ambiguity": "minn"}, "reward_ambiguity: unknown ambiguity 'minn'"),
    "uwo": ({"reward_ambiguity": "uwo:-1"}, "reward_ambiguity: expected uwo:c"),
    "a penalty": (
        {"reward_ambiguity": "min", "reward_weights": [-1.0]},
        "reward_weights: expected finite numbers >= 0 with reward_ambiguity='min'.*negate",
    ),
}


@pytest.mark.parametrize("options, words", WRONG.values(), ids=WRONG)
def test_wrong_options_are_named(run, options, words):
    with pytest.raises(ValueError, match=words):
        run(**options)


def test_pass_rates_need_prompts_that_tell_them_apart(model, tmp_path):
    config = steps.trainer(
        "grpo", model, str(tmp_path), ambiguity="group:2", group_by="pass_rate"
    ).args
    with pytest.raises(ValueError, match="group_by='pass_rate' with environment_factory"):
        steps.KINDS["grpo"][0](
            model, steps.by_place, config, train_dataset=tiny_pairs(8), environment_factory=object
        )


def test_negative_weights_are_trls_alone_and_found_before_anything_is_generated(model, tmp_path):
    config = steps.trainer("grpo", model, str(tmp_path), reward_weights=[-1.0]).args
    config.reward_ambiguity = "uwo:0.5"  # after the config was made
    with pytest.raises(ValueError, match=r"reward_weights: expected.*'uwo:0.5'"):
        steps.KINDS["grpo"][0](model, steps.by_place, config, train_dataset=tiny_pairs(8))


def test_an_infinite_reward_is_named_and_nothing_is_updated(model, tmp_path):
    def reward(prompts, **_):
        return [1.0] * (len(prompts) - 1) + [math.inf]

    trainer = steps.trainer(
        "grpo",
        model,
        str(tmp_path),
        ambiguity="group:2",
        trainer_reward_funcs=reward,
        data=tiny_pairs(8, group=[0, 1] * 4),
    )
    before = trainer.group_state.weights.clone()
    with pytest.raises(ValueError, match=r"rewards: expected finite numbers, got {'reward': inf}"):
        trainer.train()
    assert torch.equal(trainer.group_state.weights, before)


# ------------------------------------------------------------------- the worst of several rewards


def length(completion_ids, **_):
    return [len(ids) / 4 + ids[0] / 90 for ids in completion_ids]


def first(completion_ids, **_):
    return [None if not ids or ids[0] % 3 == 0 else float(ids[0] % 7) for ids in completion_ids]


SEVERAL = {"trainer_reward_funcs": [length, first], "reward_weights": [2.0, 0.5], "max_steps": 2}


@pytest.mark.parametrize(
    ("text", "combined"),
    [
        ("min", lambda r, w: 2.5 * min(r)),
        ("uwo:0.5", lambda r, w: uncertain(r, w)),
        ("kl:temperature=2", lambda r, w: softened(r, w)),
    ],
)
@pytest.mark.parametrize("ambiguity", ["erm", "tv:0.3"])
def test_the_worst_of_several_rewards(run, text, combined, ambiguity):
    """As one function that gives the worst case by hand; one of the two may not score, and the
    other has its weight."""

    def by_hand(completion_ids, **_):
        found = []
        for a, b in zip(length(completion_ids), first(completion_ids), strict=True):
            r, w = ([a], [2.0]) if b is None else ([a, b], [2.0, 0.5])
            found.append(combined(r, w))
        return found

    ours = run(reward_ambiguity=text, ambiguity=ambiguity, **SEVERAL)
    one = run(trainer_reward_funcs=by_hand, ambiguity=ambiguity, max_steps=2)
    assert_same_steps(ours, one)
    for mine, log in zip(ours["logs"], one["logs"]):
        assert mine.get("reward") == pytest.approx(log.get("reward"), rel=1e-5)
    plain = run(ambiguity=ambiguity, **SEVERAL)
    assert any(not torch.equal(a, b) for a, b in zip(ours["gradients"], plain["gradients"]))


def uncertain(r, w):
    total, mean = sum(w), sum(x * y for x, y in zip(r, w)) / sum(w)
    return 2.5 * (mean - 0.5 * sum(y * (x - mean) ** 2 for x, y in zip(r, w)) / total)


def softened(r, w):
    return -5.0 * math.log(sum(y * math.exp(-x / 2) for x, y in zip(r, w)) / sum(w))


def test_the_mean_of_several_rewards_is_trls(run):
    options = SEVERAL | {"head": "trl", "share_prompts": False}
    ours = run(reward_ambiguity="mean", **options)
    del options["head"], options["share_prompts"]
    assert torch.equal(ours["parameters"], run("trl", **options)["parameters"])


@pytest.mark.parametrize("way", ["sum_then_normalize", "normalize_then_sum"])
def test_one_function_has_no_worst(run, way):
    """Of one reward every set leaves its weighted value, whichever way TRL normalises."""
    options = {"multi_objective_aggregation": way, "max_steps": 2, "reward_weights": [3.0]}
    plain, worst = (run(reward_ambiguity=text, **options) for text in ("mean", "tv:0.5"))
    assert_same_steps(worst, plain)
