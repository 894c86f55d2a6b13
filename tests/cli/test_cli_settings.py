"""The one list of the options of ``drrlhf train``: who takes them, and where they go."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import typer

from drrlhf import trl
from drrlhf.cli import app, rundir
from drrlhf.cli.settings import (
    DEFAULT_AMBIGUITY,
    FREE_ON_RESUME,
    KINDS,
    LEARNING_RATES,
    CommandLine,
    Settings,
    options_of,
)

CONFIGS = {"reward": trl.RewardConfig, "dpo": trl.DPOConfig, "grpo": trl.GRPOConfig}
OF_ALL = {
    "data",
    "model",
    "eval_data",
    "split",
    "eval_split",
    "ambiguity",
    "epochs",
    "max_steps",
    "batch_size",
    "gradient_accumulation",
    "robust_scope",
    "learning_rate",
    "share_prompts",
    "seed",
    "lora",
    "lora_r",
    "dtype",
    "output_dir",
    "save_steps",
    "logging_steps",
}
VIEWS = {"views", "views_per_pair", "views_scored", "views_scored_from", "view_ambiguity"}
OF_ONE = {
    "reward": VIEWS
    | {
        "padding_free",
        "label_ambiguity",
        "max_length",
        "center_rewards_coefficient",
        "batch_sum_coefficient",
        "view_consistency_coefficient",
    },
    "dpo": VIEWS
    | {
        "padding_free",
        "label_ambiguity",
        "max_length",
        "beta",
        "loss_type",
        "label_smoothing",
        "precompute_ref",
    },
    "grpo": {
        "reward",
        "beta",
        "loss_type",
        "importance_level",
        "clip_low",
        "clip_high",
        "num_generations",
        "max_completion_length",
        "temperature",
        "group_by",
        "pass_threshold",
    },
}
BESIDE = {"reward": {"seeds", "quick"}, "dpo": set(), "grpo": {"seeds"}}
# What run.py and build.py make something of, in place of handing it on.
WORKED_OUT = {
    "data",
    "model",
    "reward",
    "eval_data",
    "split",
    "eval_split",
    "lora",
    "lora_r",
    "dtype",
}
THEIRS = {
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "gradient_accumulation": "gradient_accumulation_steps",
    "importance_level": "importance_sampling_level",
    "clip_low": "epsilon",
    "clip_high": "epsilon_high",
    "precompute_ref": "precompute_ref_log_probs",
}


def defaults(kind: str) -> dict:
    command = typer.main.get_command(app).commands["train"].commands[kind]
    return {one.name: one.default for one in command.params if one.name != "help"}


def told_to_trainer(kind: str) -> set[str]:
    return (OF_ALL | OF_ONE[kind]) - WORKED_OUT


@pytest.mark.parametrize("kind", KINDS)
def test_a_command_takes_what_is_said_to_be_of_its_kind(kind):
    beside = {"resume", "overwrite", "demo", *BESIDE[kind]}
    assert defaults(kind).keys() == OF_ALL | OF_ONE[kind] | beside


def test_what_is_different_for_a_kind():
    found = {kind: defaults(kind) for kind in KINDS}
    assert (found["dpo"]["beta"], found["grpo"]["beta"]) == (0.1, 0.0)
    assert (found["dpo"]["loss_type"], found["grpo"]["loss_type"]) == ("sigmoid", "dapo")
    assert (found["reward"]["seeds"], found["grpo"]["seeds"]) == (5, 3)


def test_a_record_has_every_setting_and_nothing_beside():
    recorded = {"kind"} | OF_ALL.union(*OF_ONE.values())
    assert {field.name for field in dataclasses.fields(Settings)} == recorded
    assert options_of(CommandLine).keys() - recorded == {
        "resume",
        "overwrite",
        "demo",
        "seeds",
        "quick",
    }
    free = {
        "output_dir",
        "data",
        "split",
        "model",
        "eval_data",
        "eval_split",
        "save_steps",
        "share_prompts",  # rounding alone
        "logging_steps",
    }
    assert free == FREE_ON_RESUME


@pytest.mark.parametrize("kind", KINDS)
def test_every_option_reaches_the_trainer_or_is_worked_out(kind, tmp_path):
    given = {name: value for name, value in defaults(kind).items() if name not in BESIDE[kind]}
    given |= {
        "kind": kind,
        "data": "d",
        "model": "m",
        "ambiguity": "erm",
        "lora": False,
        "lora_r": 16,
        "dtype": "fp32",
        "learning_rate": 3e-5,
        "output_dir": str(tmp_path),
        "epochs": 2.5,
        "max_steps": 7,
    }
    if kind == "grpo":
        given |= {"clip_low": 0.1, "clip_high": 0.3}
    else:
        given["views"] = "typos"
    settings = Settings.of(given)
    for name in set().union(*OF_ONE.values()) - OF_ONE[kind]:
        assert getattr(settings, name) is None
    told = settings.arguments()
    names = {THEIRS.get(name, name): name for name in told_to_trainer(kind)}
    assert told.keys() == names.keys()
    config = CONFIGS[kind](**told, use_cpu=True, bf16=False, report_to="none")
    for theirs, name in names.items():
        found = getattr(config, theirs)
        assert (found[0] if isinstance(found, list) else found) == given[name], name


def test_defaults_that_are_not_those_of_python_are_told(tmp_path):
    """In docs/steps.md, all of them and no other. What is 0, empty or None is not asked for."""
    found = set()
    for kind, make in CONFIGS.items():
        config = make(str(tmp_path), use_cpu=True, report_to="none")
        names = told_to_trainer(kind) - {"output_dir"}  # which must be given
        python = {name: getattr(config, THEIRS.get(name, name)) for name in names}
        python["dtype"] = "bf16" if config.bf16 else "fp32"
        if kind == "dpo":
            (python["loss_type"],) = config.loss_type
        if kind == "grpo":
            python["clip_high"] = config.epsilon_high or config.epsilon  # as TRL takes it
        shell = defaults(kind) | {"ambiguity": DEFAULT_AMBIGUITY, "dtype": "fp32"}
        shell["learning_rate"] = LEARNING_RATES[kind, False]
        found |= {n for n in python if (python[n] or None) != (shell[n] or None)}
    text = (Path(__file__).parents[2] / "docs/steps.md").read_text()
    (told,) = re.findall(r"^- Defaults are (.*?)^- ", text, re.M | re.S)
    named = {name.replace("-", "_") for name in re.findall(r"`--([\w-]+)`", told)}
    assert named == {*found, "help"}


def test_a_setting_that_all_kinds_have_must_be_given():
    with pytest.raises(TypeError, match="learning_rate"):
        Settings.of(dict.fromkeys(OF_ALL - {"learning_rate"}) | {"kind": "dpo"})


def test_a_resumed_run_may_not_change_a_number(tmp_path):
    given = defaults("dpo") | {"kind": "dpo"}
    data = {"sha256": "s", "group_names": None}

    def record(**more):
        settings = dataclasses.asdict(Settings.of(given | more))
        return {"settings": settings, "data": data, "model_fingerprint": "f"}

    rundir.check_same_run(record(), record(save_steps=3, output_dir="elsewhere"))
    with pytest.raises(ValueError, match=r"beta was 0\.1, now 0\.2; seed was 42, now 1\."):
        rundir.check_same_run(record(), record(beta=0.2, seed=1))
