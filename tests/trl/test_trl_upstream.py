"""What the bodies of TRL and transformers read, on which our trainers rest without asking there.

An upstream release that reads something else passes `drrlhf.trl.seam` and may leave our loss, our
head or our checkpoints unused without a word. So the versions that pyproject.toml admits are those
that these tests have run with: a wider bound begins here.
"""

from __future__ import annotations

import inspect
import re
import warnings
from pathlib import Path
from types import CodeType, SimpleNamespace

import pytest
import trl
from packaging.specifiers import SpecifierSet
from trl.trainer import utils

from drrlhf.trl import seam

DPO = "trl.trainer.dpo_trainer:DPOTrainer"
REWARD = "trl.trainer.reward_trainer:RewardTrainer"
GRPO = "trl.trainer.grpo_trainer:GRPOTrainer"
TRAINER = "transformers.trainer:Trainer"
# Names that a function or a function in it must read.
READS: dict[tuple[str, str], set[str]] = {
    (DPO, "_compute_loss"): {
        "_metrics",
        "beta",
        "f_divergence_type",
        "ld_alpha",
        "log_probs",
        "log_sum_sq_probs",
        "loss_types",
        "loss_weights",
        "precompute_ref_logps",
        "use_weighting",
    },
    (DPO, "compute_ref_log_probs"): {"ld_alpha", "log_probs", "ref_model"},
    (REWARD, "compute_loss"): {"_metrics", "center_rewards_coefficient", "logits"},
    (GRPO, "_compute_loss"): {
        "_get_per_token_logps_and_entropies",
        "_metrics",
        "beta",
        "current_gradient_accumulation_steps",
        "max_completion_length",
        "steps_per_generation",
    },
    (GRPO, "_get_per_token_logps_and_entropies"): {"entropy", "log_probs"},
    (GRPO, "_generate_and_score_completions"): {
        "_calculate_rewards",
        "num_generations_eval",
        "reward_weights",
    },
    (GRPO, "_prepare_inputs"): {"_buffered_inputs", "_generate_and_score_completions", "_step"},
    (GRPO, "_get_train_sampler"): {"RepeatSampler"},
    ("trl.trainer.utils:RepeatSampler", "__init__"): {"generator", "num_samples"},
    (GRPO, "training_step"): {"_step"},
    (DPO, "_set_signature_columns_if_needed"): {"_signature_columns"},
    (REWARD, "_set_signature_columns_if_needed"): {"_signature_columns"},
    (GRPO, "_set_signature_columns_if_needed"): {"_signature_columns"},
    (TRAINER, "training_step"): {"backward", "compute_loss", "current_gradient_accumulation_steps"},
    (TRAINER, "_run_epoch"): {
        "_set_sync_gradients",
        "get_batch_samples",
        "no_sync",
        "training_step",
    },
    (TRAINER, "_save_checkpoint"): {
        "_get_output_dir",
        "_push_from_checkpoint",
        "best_model_checkpoint",
        "rotate_checkpoints",
        "save_to_json",
    },
    ("trl.trainer.utils", "add_fused_lm_head"): {
        "_ChunkedLogProbFunction",
        "_use_triton",
        "apply",
        "maybe_gather_lm_head_ctx",
    },
    ("trl.kernels.chunked_logprob:ChunkedLogProbFunction", "forward"): {
        "float32",
        "mark_non_differentiable",
    },
}


def names_read(code: CodeType) -> set[str]:
    """The globals and attributes that a function reads, with those of the functions inside it."""
    inner = (part for part in code.co_consts if isinstance(part, CodeType))
    return set(code.co_names).union(*map(names_read, inner))


def unread(owner: str, function: str) -> set[str]:
    """Of the names that upstream's function must read, those that it does not."""
    found = getattr(seam._find(trl.__version__, owner), function)
    return READS[owner, function] - names_read(inspect.unwrap(found).__code__)


@pytest.mark.parametrize(("owner", "function"), READS)
def test_what_we_set_is_read(owner, function):
    assert unread(owner, function) == set()


def test_they_are_seams_that_are_looked_for_at_run_time():
    assert READS.keys() <= {one[:2] for one in (*seam._METHODS, *seam._FUNCTIONS)}


def test_a_rename_is_caught_here_and_is_no_error_for_users(monkeypatch):
    """An innocent one changes nothing for them; what it means is for whoever raises the bound."""

    def _compute_loss(self, model, inputs, return_outputs):
        return [self.loss_kinds, self.beta]

    monkeypatch.setattr(trl.DPOTrainer, "_compute_loss", _compute_loss)
    place = (DPO, "_compute_loss")
    assert unread(*place) == READS[place] - {"beta"}
    seam.check()


def test_a_head_that_is_looked_up_elsewhere_is_caught(monkeypatch):
    """A fused forward that calls its head otherwise would ignore ours without a word."""

    def add_fused_lm_head(model, temperature, cast_lm_head_to_fp32, outputs):
        def forward():
            return utils._use_triton, utils.maybe_gather_lm_head_ctx, model.apply

        return forward

    monkeypatch.setattr(utils, "add_fused_lm_head", add_fused_lm_head)
    assert unread("trl.trainer.utils", "add_fused_lm_head") == {"_ChunkedLogProbFunction"}
    seam.check_head()


def test_an_attribute_that_is_gone_is_named_when_it_is_set():
    target = SimpleNamespace(loss_types=["sigmoid"])
    with seam.overridden(target, loss_types=["ipo"]):
        assert target.loss_types == ["ipo"]
    message = rf"trl {trl.__version__}: SimpleNamespace no longer has 'loss_kinds'.*pip install"
    with (
        pytest.raises(seam.SeamMovedError, match=message),
        seam.overridden(target, loss_types=["ipo"], loss_kinds=[]),
    ):
        raise AssertionError
    assert vars(target) == {"loss_types": ["sigmoid"]}


def test_the_versions_that_are_asked_for_are_those_tested(monkeypatch):
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert re.findall(r'"trl([><=][^"]*)"', project) == [seam.TESTED]
    assert SpecifierSet(seam.TESTED).contains(trl.__version__)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seam.check()
    monkeypatch.setattr(trl, "__version__", "1.17.0")
    with pytest.warns(UserWarning, match=r"tested with trl>=1\.16,<1\.17, found trl 1\.17\.0"):
        seam.check()
