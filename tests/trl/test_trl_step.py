"""The step's batch is the adversary's, however it is cut: into microbatches, onto ranks."""

from __future__ import annotations

import contextlib
import gc

import pytest

pytest.importorskip("trl")

from trl_fixtures import tiny_pairs, tiny_tokenizer  # isort: skip

import steps
import torch
from peft import LoraConfig
from three_ways import in_turn
from transformers import AutoModelForSequenceClassification

from drrlhf.trl import rows

SETS = ["tv:0.2", "cvar:0.3", "kl:0.3", "chi2:0.5", "cvar:0.4,trim=0.1", "group:3,step_size=0.5"]
WHOLE = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
PARTS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}


@pytest.fixture
def run(models, tmp_path):
    def run(method="dpo", model=None, **options):
        return steps.run(method, models[model or method], str(tmp_path / "out"), **options)

    return run


def assert_same_step(found, expected, step=0):
    """Gradient, loss and every metric of the worst case: equal to float32 rounding."""
    ours, whole = (run["gradients"][step] for run in (found, expected))
    scale = whole.abs().max().item()
    assert scale > 1e-3
    torch.testing.assert_close(ours, whole, rtol=0, atol=2e-6 * max(scale, 1.0))
    ours, whole = (run["logs"][step] for run in (found, expected))
    for name, number in whole.items():
        if name in ("loss", "grad_norm") or name.startswith(("robust/", "group/")):
            assert ours[name] == pytest.approx(number, rel=2e-5, abs=1e-6), name


def columns(n, **more):
    return {"group": [0, 1, 2, 1] * (n // 4), **more}


@pytest.mark.parametrize("ambiguity, method", in_turn(SETS, ["dpo", "reward"]))
def test_accumulated_equals_one_big_batch(run, method, ambiguity):
    options = {"data": tiny_pairs(16, **columns(16)), "ambiguity": ambiguity, "max_steps": 2}
    found = run(method, **PARTS, **options)
    whole = run(method, **WHOLE, **options)
    for step in range(2):
        assert_same_step(found, whole, step)
    small = run(method, **PARTS, **options, robust_scope="microbatch")["gradients"][0]
    assert (small - found["gradients"][0]).abs().max() > 1e-3  # the objective that it replaces


@pytest.mark.parametrize(
    "options",
    [
        {"trainer_peft_config": "lora"},
        {"trainer_peft_config": "lora", "precompute_ref_log_probs": True},
        {"gradient_checkpointing": True},
        {"loss_type": ["sigmoid", "hinge"], "loss_weights": [0.5, 2.0]},
        {"use_weighting": True},
        {"ld_alpha": 0.5},
        {"loss_type": "ipo", "label_smoothing": 0.0},
        {"head": "trl"},
        {"robust_scope": "step", "trainer_weights": True},
        {"bf16": True},
        {"dataloader_drop_last": True, "pairs": 9},
    ],
    ids=lambda options: ",".join(options),
)
def test_accumulated_equals_one_big_batch_with(run, options):
    options = {"ambiguity": "cvar:0.4"} | options
    if options.pop("trainer_weights", None):
        options["data"] = tiny_pairs(8, weight=[1.0, 2.0, 0.0, 0.5] * 2)
    if options.get("trainer_peft_config"):
        options["trainer_peft_config"] = LoraConfig(
            r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
        )
    found, whole = (run(**options, **cut) for cut in (PARTS, WHOLE))
    if options.get("bf16"):  # other shapes, other roundings: of the size of autocast's own
        a, b = found["gradients"][0], whole["gradients"][0]
        assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.999
    else:
        assert_same_step(found, whole)


@pytest.mark.parametrize("ambiguity", ["erm", "cvar:0.25"])
@pytest.mark.parametrize("cut", [WHOLE, PARTS], ids=["whole", "parts"])
def test_the_sum_of_a_batch_is_pulled_to_zero_outside_the_set(run, models, ambiguity, cut):
    """c times the square of the sum of a batch's rewards, as plain transformers gives them."""
    data, place, c = tiny_pairs(8), models["reward"], 0.01
    options = {"data": data, "ambiguity": ambiguity, **cut}
    options["train_sampling_strategy"] = "sequential"
    plain = run("reward", **options)
    with_sum = run("reward", batch_sum_coefficient=c, **options)
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(place), tiny_tokenizer()
    texts = [row["prompt"] + row[side] for row in data for side in ("chosen", "rejected")]
    rewards = torch.cat(
        [model(**tokenizer(f"{text} <eos>", return_tensors="pt")).logits[0] for text in texts]
    )
    batches = rewards.view(cut["gradient_accumulation_steps"], -1)
    penalty = c * batches.sum(1).square().mean()
    expected = torch.autograd.grad(penalty, [p for p in model.parameters() if p.requires_grad])
    expected = torch.cat([gradient.flatten() for gradient in expected])
    found = with_sum["gradients"][0] - plain["gradients"][0]
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert with_sum["logs"][0]["loss"] == pytest.approx(
        plain["logs"][0]["loss"] + penalty.item(), rel=1e-4
    )
    with pytest.raises(ValueError, match="batch_sum_coefficient: expected a finite number >= 0"):
        run("reward", batch_sum_coefficient=-1.0, **options)


def test_what_lies_outside_the_set_is_trained_on_every_pair(run):
    """sft is a mean over a microbatch's tokens: compared with the sum of two separate runs."""
    both = run(ambiguity="cvar:0.25", loss_type=["sigmoid", "sft"], **PARTS)
    pairs = run(ambiguity="cvar:0.25", **PARTS)
    sft = run(loss_type="sft", **PARTS)
    torch.testing.assert_close(
        both["gradients"][0], pairs["gradients"][0] + sft["gradients"][0], rtol=1e-4, atol=1e-5
    )
    assert both["logs"][0]["loss"] == pytest.approx(
        pairs["logs"][0]["loss"] + sft["logs"][0]["loss"], rel=1e-5
    )


def test_nominal_weights_alone_are_those_of_the_step(run):
    data = tiny_pairs(8, weight=[1.0, 5.0, 0.0, 0.5, 2.0, 2.0, 0.1, 1.0])
    assert_same_step(run(data=data, **PARTS), run(data=data, **WHOLE))


@pytest.mark.parametrize("ambiguity, method", in_turn(["erm", "kl:0.3"], ["dpo", "reward"]))
def test_only_ratios_of_weights_matter(run, method, ambiguity):
    """Also of weights that no float32 holds."""
    ratios = [1.0, 5.0, 0.0, 0.5, 2.0, 2.0, 0.1, 1.0]
    found, wanted = (
        run(method, ambiguity=ambiguity, data=tiny_pairs(8, weight=[size * w for w in ratios]))
        for size in (1e-300, 1.0)
    )
    assert_same_step(found, wanted)


def test_plain_training_is_left_alone(run, models, tmp_path):
    trainer = steps.trainer("dpo", models["dpo"], str(tmp_path), **PARTS)
    trainer._whole_step = None  # would fail if it were called
    trainer.train()


# ------------------------------------------------------------------------------ the second pass


def spied(trainer):
    """(training, random state at the start, pairs, losses) of every pass over a microbatch."""
    seen, original = [], trainer._pair_risk

    def spy(terms, recorder, inputs, *columns):
        before = len(trainer._pass.seen)
        value = original(terms, recorder, inputs, *columns)
        losses = trainer._pass.seen[before].losses
        seen.append((trainer._pass.weights is not None, rows.count(inputs), losses, inputs))
        return value

    trainer._pair_risk = spy
    trainer.train()
    return seen


def test_only_pairs_with_weight_are_trained_on_and_packed_together(models, tmp_path):
    trainer = steps.trainer("dpo", models["dpo"], str(tmp_path), ambiguity="cvar:0.375", **PARTS)
    seen = spied(trainer)
    assert [second for second, *_ in seen] == [False] * 4 + [True] * 2
    assert [n for _, n, *_ in seen] == [2, 2, 2, 2, 1, 2]  # 3 of 8 kept
    losses = torch.cat([losses for second, _, losses, _ in seen if not second])
    kept = torch.cat([losses for second, _, losses, _ in seen if second])
    expected = losses.topk(3).values
    torch.testing.assert_close(kept.sort(descending=True).values, expected, rtol=1e-5, atol=0)
    for _, _, _, inputs in seen[4:]:
        assert inputs["attention_mask"][:, -1].any()  # no column of padding alone


def test_the_second_pass_pads_as_the_first(models, tmp_path):
    """To widths for which a compiled model and tensor cores are made."""
    options = {"ambiguity": "cvar:0.25", "pad_to_multiple_of": 16, "share_prompts": False}
    trainer = steps.trainer("dpo", models["dpo"], str(tmp_path), max_steps=1, **PARTS, **options)
    widths = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, given: widths.append((torch.is_grad_enabled(), given["input_ids"])),
        with_kwargs=True,
    )
    trainer.train()
    learned = [ids.shape[1] for learning, ids in widths if learning]
    assert learned and all(width % 16 == 0 for width in learned)


def test_the_last_word_on_random_numbers(models, tmp_path):
    """With dropout the second pass draws what the first drew, and the generator goes on from there
    as if there had been one pass."""
    options = {"ambiguity": "cvar:0.3", "disable_dropout": False, **PARTS}
    trainer = steps.trainer("dpo", models["dropout"], str(tmp_path), **options)
    seen = spied(trainer)
    first = [losses for second, _, losses, _ in seen if not second]
    again = [losses for second, _, losses, _ in seen if second]
    assert 1 <= len(again) <= len(first) == 4
    for losses in again:
        assert any(torch.equal(losses, f) for f in first)  # bit for bit
    after = torch.get_rng_state()
    plain = steps.trainer("dpo", models["dropout"], str(tmp_path), **options | {"ambiguity": "erm"})
    plain.train()
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("each", [False, True])
def test_gradients_are_shared_as_often_as_accelerate_is_told(models, tmp_path, monkeypatch, each):
    told = {"gradient_accumulation_kwargs": {"sync_each_batch": each}}
    options = {"ambiguity": "kl:0.3", "accelerator_config": told, **PARTS}
    trainer = steps.trainer("reward", models["reward"], str(tmp_path), **options)
    real, waits = trainer._second_pass, []

    def second_pass(*args):
        def no_sync(model):
            waits.append(model)
            return contextlib.nullcontext()

        with monkeypatch.context() as patch:
            patch.setattr(trainer.accelerator, "no_sync", no_sync)
            real(*args)

    trainer._second_pass = second_pass
    trainer.train()
    assert len(waits) == (0 if each else 3)  # of four batches


def test_dropout_of_the_second_pass_is_that_of_the_gradient(models, tmp_path):
    """cvar:1 is plain training: with the same draws the same gradient, in two passes or one."""
    options = {"disable_dropout": False, **PARTS}
    two = steps.run("dpo", models["dropout"], str(tmp_path), ambiguity="cvar:1", **options)
    one = steps.run("dpo", models["dropout"], str(tmp_path), ambiguity="erm", **options)
    torch.testing.assert_close(two["gradients"], one["gradients"], rtol=1e-5, atol=1e-6)
    assert two["logs"][0]["loss"] == pytest.approx(one["logs"][0]["loss"], rel=1e-6)


def held_bytes():
    """Bytes of every tensor that Python can reach; the traces of compiled graphs hold none."""
    gc.collect()
    tensors = (o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter))
    found = (t.untyped_storage() for t in tensors if not torch._is_functional_tensor(t))
    return sum({storage._cdata: storage.nbytes() for storage in found}.values())


def test_between_the_passes_only_scalars_of_the_pairs_are_held(models, tmp_path):
    options = {"ambiguity": "cvar:0.3", "pairs": 64}
    cut = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 8}
    trainer = steps.trainer("dpo", models["dpo"], str(tmp_path), **options, **cut)
    held, whole, second = {}, trainer._whole_step, trainer._second_pass

    def at(name, function):
        def call(*arguments):
            held[name] = held_bytes()
            return function(*arguments)

        return call

    trainer._whole_step, trainer._second_pass = at("before", whole), at("between", second)
    trainer.train()
    generator = torch.get_rng_state().nbytes
    assert 0 <= held["between"] - held["before"] <= 64 * 8 * 8 + generator


# ------------------------------------------------------------------------------ steps that are odd


def test_a_dataset_smaller_than_the_step(run):
    found = run(ambiguity="cvar:0.4", pairs=5, **PARTS)
    whole = run(ambiguity="cvar:0.4", pairs=5, **WHOLE)
    assert_same_step(found, whole)
    assert found["logs"][0]["robust/kept"] == pytest.approx(2 / 5)


def test_a_last_incomplete_step(run):
    options = {"ambiguity": "tv:0.2", "pairs": 11, "num_train_epochs": 1, "max_steps": -1}
    found, whole = (run(**options, **cut) for cut in (PARTS, WHOLE))
    assert len(found["gradients"]) == len(whole["gradients"]) == 2
    for step in range(2):
        assert_same_step(found, whole, step)


def test_completions_that_truncation_emptied_attract_no_weight(models, tmp_path, run):
    """A collator that cuts completions away: such pairs lose their weight, whole batches too."""
    trainer = steps.trainer("dpo", models["dpo"], str(tmp_path), ambiguity="cvar:0.3", **PARTS)
    original, cut = trainer.data_collator, []

    def collate(examples):
        batch = original(examples)
        if len(cut) in (0, 2):
            batch["completion_mask"] = batch["completion_mask"] * 0
        cut.append(len(examples))
        return batch

    trainer.data_collator = collate
    trainer.train()
    (log,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert log["robust/kept"] == pytest.approx(0.5) and log["robust/value"] > 0.1  # 2 of 4
    assert log["robust/max_weight"] == pytest.approx(1 / 0.3)

    cut.clear()
    trainer = steps.trainer("dpo", models["dpo"], str(tmp_path), ambiguity="cvar:0.3", **PARTS)
    original = trainer.data_collator
    trainer.data_collator = lambda e: (
        (b := original(e)) | {"completion_mask": b["completion_mask"] * 0}
    )
    trainer.train()
    (log,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert log["loss"] == 0 and log["grad_norm"] == 0


class Averaging(torch.optim.SGD):
    """As schedule-free optimizers do, it puts other weights into the model to evaluate."""

    training = True

    def train(self):
        self._put(True, 2.0)

    def eval(self):
        self._put(False, 0.5)

    def _put(self, training, factor):
        if training != self.training:
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.mul_(factor)
        self.training = training


def test_the_adversary_sees_the_weights_that_are_trained(models, tmp_path):
    """Also in the step after an evaluation, whose optimizer has put others into the model."""
    found = []
    for cut in (PARTS, WHOLE):
        trainer = steps.trainer(
            "dpo",
            models["dpo"],
            str(tmp_path),
            tiny_pairs(16),
            trainer_eval_dataset=tiny_pairs(4, seed=1),
            ambiguity="cvar:0.3",
            eval_strategy="steps",
            eval_steps=1,
            max_steps=2,
            train_sampling_strategy="sequential",
            **cut,
        )
        trainer.optimizer = Averaging(trainer.model.parameters(), lr=0.01)
        trainer.train()
        (kept,) = (c for c in trainer.callback_handler.callbacks if hasattr(c, "steps"))
        logs = [log for log in trainer.state.log_history if "loss" in log]
        found.append({"gradients": kept.steps, "logs": logs})
    assert_same_step(*found, step=1)
