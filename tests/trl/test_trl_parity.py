"""With ambiguity="erm" our trainers are TRL's: losses, gradients, trained weights and metrics."""

from __future__ import annotations

import pytest

pytest.importorskip("trl")

from trl_fixtures import (  # isort: skip  (first: it settles the environment)
    quiet,
    tiny_encoder_dir,
    tiny_llama_dir,
    tiny_mixtral_dir,
    tiny_pairs,
    tiny_reward_dir,
    tiny_tokenizer,
)

import torch
import trl
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from test_trl_head import ExactHead, relative_error
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer import utils

import drrlhf.trl as ours

LORA = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
LIBRARIES = (trl, ours)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return str(tiny_llama_dir(tmp_path_factory.mktemp("llama")))


def train(library, method, model, tmp_path, data=None, peft_config=None, **options):
    """One short run; what differs between the two libraries is the import."""
    config = getattr(library, f"{method}Config")
    trainer = getattr(library, f"{method}Trainer")(
        model=model,
        args=config(str(tmp_path / library.__name__), **quiet(**options)),
        train_dataset=data or tiny_pairs(32),
        eval_dataset=tiny_pairs(6, seed=1),
        processing_class=AutoTokenizer.from_pretrained(model) if isinstance(model, str) else None,
        peft_config=peft_config,
    )
    trainer.train()
    return trainer


def logged_losses(trainer):
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def assert_same_run(found, expected):
    """Losses to float32 rounding; every other number of the log, key for key; the weights."""
    torch.testing.assert_close(logged_losses(found), logged_losses(expected), rtol=2e-6, atol=0)
    for mine, theirs in zip(found.state.log_history, expected.state.log_history, strict=True):
        assert mine.keys() == theirs.keys()
        for key in theirs:
            if not key.endswith(("_runtime", "_per_second")):
                assert mine[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-5), key
    # as a whole: Adam makes a full step of a gradient that is 0 up to rounding
    mine, theirs = (
        torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
        for trainer in (found, expected)
    )
    assert (mine - theirs).norm() <= 1e-5 * theirs.norm()


# ------------------------------------------------------------------------------------ DPO runs


# Precomputed log-probs are those of full and of adapted models alike.
@pytest.mark.parametrize(
    ("lora", "precompute"),
    [
        (False, False),
        (True, False),
        (True, True),
        pytest.param(False, True, marks=pytest.mark.thorough),
    ],
    ids=["full-reference", "lora-reference", "lora-precomputed", "full-precomputed"],
)
def test_twenty_steps_of_dpo(llama, tmp_path, lora, precompute):
    options = {
        "max_steps": 20,
        "optim": "sgd",  # AdamW turns a gradient's last digit into a full step of a parameter
        "learning_rate": 1.0 if lora else 0.1,
        "precompute_ref_log_probs": precompute,
        "gradient_checkpointing": lora != precompute,  # on in one run of each kind
        "eval_strategy": "steps",
        "eval_steps": 10,
        "peft_config": LORA if lora else None,
    }
    expected = train(trl, "DPO", llama, tmp_path, **options)
    # A precomputed reference was not computed in this row: equal margins are equal to rounding.
    own = {"share_prompts": False} if precompute else {}
    found = train(ours, "DPO", llama, tmp_path, ambiguity="erm", head="trl", **own, **options)
    losses = logged_losses(expected)
    assert len(losses) == 20 and losses.min() < 0.9 * losses.max()  # it did train
    assert_same_run(found, expected)


def test_dropout_draws_the_same_numbers(tmp_path):
    model = str(tiny_llama_dir(tmp_path, attention_dropout=0.2))
    options = {"max_steps": 4, "disable_dropout": False, "peft_config": LORA}
    expected = train(trl, "DPO", model, tmp_path, **options)
    found = train(ours, "DPO", model, tmp_path, share_prompts=False, **options)
    assert logged_losses(expected).std() > 1e-3  # LoRA starts at log 2 without dropout
    assert_same_run(found, expected)


def test_accumulation_a_last_short_batch_and_bfloat16(llama, tmp_path):
    options = {"num_train_epochs": 2, "gradient_accumulation_steps": 2, "learning_rate": 2e-3}
    options["bf16"] = True
    data = tiny_pairs(11)
    expected = train(trl, "DPO", llama, tmp_path, data, **options)
    same = {"head": "trl", "share_prompts": False}
    found = train(ours, "DPO", llama, tmp_path, data, **same, **options)
    assert_same_run(found, expected)
    # TRL's head rounds the logits to bfloat16 and ours does not: equal to that rounding alone
    found = train(ours, "DPO", llama, tmp_path, data, **options)
    losses = logged_losses(found)
    torch.testing.assert_close(losses, logged_losses(expected), rtol=2**-7, atol=0)


@pytest.mark.parametrize("kind", ["trained-adapter", "prompt-tuning"])
def test_other_adapters(llama, tmp_path, kind):
    def model():
        torch.manual_seed(1)
        base = AutoModelForCausalLM.from_pretrained(llama)
        if kind == "prompt-tuning":
            return get_peft_model(
                base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
            )
        adapted = get_peft_model(base, LORA)  # its "ref" copy is the reference, not the base
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        return adapted

    options = {"max_steps": 3, "use_weighting": kind == "prompt-tuning"}
    runs = [train(library, "DPO", model(), tmp_path, **options) for library in LIBRARIES]
    assert_same_run(*reversed(runs))


# ------------------------------------------------------------------- DPO losses and gradients


class Pair:
    """TRL's trainer and ours around the same policy, away from its reference, and one batch."""

    def __init__(self, path, tmp_path, head="auto", **options):
        policy = AutoModelForCausalLM.from_pretrained(path)
        with torch.no_grad():
            for parameter in policy.parameters():
                torch.manual_seed(parameter.numel())
                parameter += 0.02 * torch.randn_like(parameter)
        policy.save_pretrained(tmp_path / "policy")
        self.trainers = []
        for library in LIBRARIES:
            own = {"head": head} if library is ours else {}
            self.trainers.append(
                library.DPOTrainer(
                    model=AutoModelForCausalLM.from_pretrained(tmp_path / "policy"),
                    ref_model=AutoModelForCausalLM.from_pretrained(path),
                    args=library.DPOConfig(str(tmp_path / "out"), **quiet(**own, **options)),
                    train_dataset=tiny_pairs(5),
                    processing_class=tiny_tokenizer(),
                )
            )
        self.batch = next(iter(self.trainers[0].get_train_dataloader()))

    def compute(self, trainer, loss_type, loss_weights=None, **settings):
        """The loss and the gradient of every parameter, flat."""
        names = [loss_type] if isinstance(loss_type, str) else loss_type
        trainer.loss_types, trainer.loss_weights = names, loss_weights or [1.0] * len(names)
        defaults = {
            "label_smoothing": 0.0,
            "f_divergence_type": "reverse_kl",
            "f_alpha_divergence_coef": 0.5,
            "ld_alpha": None,
            "beta": 0.1,
        }
        for name, value in (defaults | settings).items():
            assert hasattr(trainer, name)
            setattr(trainer, name, value)
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, dict(self.batch))
        loss.backward()
        return loss.detach(), torch.cat([p.grad.flatten() for p in trainer.model.parameters()])

    def assert_equal(self, loss_type, **settings):
        (value, gradient), (our_value, our_gradient) = (
            self.compute(trainer, loss_type, **settings) for trainer in self.trainers
        )
        assert gradient.abs().max() > 0
        torch.testing.assert_close(our_value, value, rtol=2e-6, atol=1e-7)
        scale = gradient.abs().max().item()
        torch.testing.assert_close(our_gradient, gradient, rtol=0, atol=5e-6 * scale)
        keys = [set(trainer._metrics["train"]) for trainer in self.trainers]
        assert keys[0] == keys[1]

    def assert_no_worse(self, monkeypatch, loss_type, **settings):
        """Each with a head of its own: by a float64 one, ours is as near as TRL's."""
        theirs, mine = (self.compute(trainer, loss_type, **settings) for trainer in self.trainers)
        with monkeypatch.context() as patch:
            patch.setattr(utils, "_ChunkedLogProbFunction", ExactHead)
            exact = self.compute(self.trainers[0], loss_type, **settings)
        torch.testing.assert_close(mine[0], exact[0], rtol=2e-6, atol=1e-7)
        assert relative_error(mine[1], exact[1]) <= 2 * relative_error(theirs[1], exact[1])


@pytest.fixture(scope="module")
def pair(llama, tmp_path_factory):
    """With TRL's head in both: some losses multiply the rounding of a log-prob."""
    return Pair(llama, tmp_path_factory.mktemp("pair"), head="trl")


@pytest.fixture(scope="module")
def pair_with_our_head(llama, tmp_path_factory):
    return Pair(llama, tmp_path_factory.mktemp("pair"))


SMOOTHING = {"exo_pair": 1e-3, "robust": 0.1, "aot": 0.1, "aot_unpaired": 0.1}
DIFFERENCES = ["sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"]
OTHERS = ["nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down"]
OUTSIDE = ["aot", "aot_unpaired", "sft"]


@pytest.mark.parametrize("loss_type", DIFFERENCES + OTHERS + OUTSIDE)
def test_loss_types(pair, pair_with_our_head, loss_type, monkeypatch):
    settings = {"label_smoothing": SMOOTHING.get(loss_type, 0.0)}
    pair.assert_equal(loss_type, **settings)
    pair_with_our_head.assert_no_worse(monkeypatch, loss_type, **settings)


@pytest.mark.parametrize("loss_type", DIFFERENCES)
@pytest.mark.parametrize(
    ("f_divergence", "alpha"),
    [
        ("forward_kl", 0.5),
        ("js_divergence", 0.5),
        ("alpha_divergence", 0.5),
        ("alpha_divergence", 1.0),
        ("alpha_divergence", 1.5),
    ],
)
def test_f_divergences(pair, loss_type, f_divergence, alpha):
    pair.assert_equal(
        loss_type,
        label_smoothing=SMOOTHING.get(loss_type, 0.0),
        f_divergence_type=f_divergence,
        f_alpha_divergence_coef=alpha,
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {"loss_type": ["ipo", "aot"], "loss_weights": [0.5, 2.0]},
        {"loss_type": ["hinge", "hinge"], "loss_weights": [0.5, 2.0]},
        {"loss_type": "sigmoid", "loss_weights": [2.5]},
        {"loss_type": "sigmoid", "ld_alpha": 0.4},
        {"loss_type": "ipo", "ld_alpha": 0.0},
        {"loss_type": "sigmoid", "beta": 3.0},
    ],
    ids=["mpo", "with-aot", "twice", "scaled", "ld-dpo", "ld-dpo-0", "beta"],
)
def test_combinations(pair, settings):
    pair.assert_equal(**settings)


def test_wpo_weighting(llama, tmp_path):
    weighted = Pair(llama, tmp_path, use_weighting=True)
    weighted.assert_equal("sigmoid")
    weighted.assert_equal(["ipo", "nca_pair"], loss_weights=[0.3, 0.7])  # hinge fails in TRL


def test_mixture_of_experts(tmp_path):
    experts = Pair(str(tiny_mixtral_dir(tmp_path)), tmp_path)
    assert experts.trainers[1].aux_loss_enabled
    experts.assert_equal("sigmoid")
    experts.assert_equal(["sigmoid", "sft"])


def test_label_smoothing_of_sigmoid_is_cdpo(pair):
    """TRL ignores it, so its plain and its rDPO losses give the expected number instead."""
    eps = 0.1
    plain, _ = pair.compute(pair.trainers[0], "sigmoid")
    rdpo, _ = pair.compute(pair.trainers[0], "robust", label_smoothing=eps)
    flipped = ((1 - eps) * plain - (1 - 2 * eps) * rdpo) / eps
    found, _ = pair.compute(pair.trainers[1], "sigmoid", label_smoothing=eps)
    torch.testing.assert_close(found, (1 - eps) * plain + eps * flipped, rtol=1e-5, atol=0)
    assert found > plain + 1e-3


def test_logits_asked_for_do_not_replace_the_loss(pair):
    for trainer in pair.trainers:
        pair.compute(trainer, "sigmoid")
    with pytest.warns(FutureWarning, match="return_outputs"):
        results = [
            trainer.compute_loss(trainer.model, dict(pair.batch), return_outputs=True)
            for trainer in pair.trainers
        ]
    (theirs, outputs), (mine, our_outputs) = results
    torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=0)
    torch.testing.assert_close(our_outputs.logits, outputs.logits)


# --------------------------------------------------------------------------------------- reward


@pytest.mark.parametrize("noise", [{"disable_dropout": False}, {"neftune_noise_alpha": 50.0}])
def test_reward_models_draw_for_the_batch_as_it_is(tmp_path, noise):
    model = str(tiny_encoder_dir(tmp_path))
    options = {"max_steps": 3, "optim": "sgd", "per_device_train_batch_size": 8, **noise}
    expected = train(trl, "Reward", model, tmp_path, **options)
    found = train(ours, "Reward", model, tmp_path, **options)
    assert_same_run(found, expected)


@pytest.mark.pairwise
@pytest.mark.parametrize("center", [None, 0.05], ids=["plain", "centered"])
@pytest.mark.parametrize("margin", [False, True], ids=["no-margin", "margin"])
@pytest.mark.parametrize("make", [tiny_reward_dir, tiny_encoder_dir], ids=["llama", "encoder"])
def test_reward_runs(tmp_path, make, margin, center):
    columns = {"margin": torch.linspace(-1, 2, 32).tolist()} if margin else {}
    data, model = tiny_pairs(32, **columns), str(make(tmp_path))
    options = {
        "max_steps": 10,
        # A shift of all rewards has gradient 0 up to rounding, which Adam blows up to full steps
        "optim": "sgd",
        "learning_rate": 0.1,
        "center_rewards_coefficient": center,
        "gradient_checkpointing": margin,
        "eval_strategy": "steps",
        "eval_steps": 5,
    }
    expected = train(trl, "Reward", model, tmp_path, data, **options)
    found = train(ours, "Reward", model, tmp_path, data, ambiguity="erm", **options)
    assert logged_losses(expected).std() > 1e-3
    assert_same_run(found, expected)
