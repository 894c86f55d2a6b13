"""Optimizer steps of tiny trainers and what they did: used in this process and by launchers."""

from __future__ import annotations

import sys
from typing import Any

from trl_fixtures import quiet, tiny_pairs, tiny_tokenizer  # isort: skip (settles the environment)

import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from drrlhf.trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer


class Gradients(TrainerCallback):
    """Keeps the gradient that each optimizer step is about to take."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        found = [p.grad for p in model.parameters() if p.requires_grad]
        self.steps.append(torch.cat([g.flatten() for g in found if g is not None]).clone())


def away(path: str) -> Any:
    """The model at ``path``, moved away from it, so that policy and reference differ."""
    model = AutoModelForCausalLM.from_pretrained(path)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.03 * torch.randn_like(parameter)
    return model


def trainer(
    method: str, model: str, folder: str, data: Any = None, pairs: int = 8, **options: Any
) -> Any:
    """A trainer of one of our two kinds; options beginning with trainer_ go to the trainer."""
    kind, config = {"dpo": (DPOTrainer, DPOConfig), "reward": (RewardTrainer, RewardConfig)}[method]
    own = {k.removeprefix("trainer_"): v for k, v in options.items() if k.startswith("trainer_")}
    rest = {k: v for k, v in options.items() if not k.startswith("trainer_")}
    # sgd: the second step then differs as little as the gradient of the first one did
    arguments = quiet(max_grad_norm=0.0, max_steps=1, optim="sgd") | rest
    if method == "dpo" and "ref_model" not in own and "peft_config" not in own:
        own["ref_model"] = AutoModelForCausalLM.from_pretrained(model)
    return kind(
        model=away(model) if method == "dpo" else model,
        args=config(folder, **arguments),
        train_dataset=tiny_pairs(pairs) if data is None else data,
        processing_class=tiny_tokenizer(),
        callbacks=[Gradients()],
        **own,
    )


def run(method: str, model: str, folder: str, **options: Any) -> dict[str, Any]:
    """Train, and give gradients by step, logs, losses and the final parameters."""
    made = trainer(method, model, folder, **options)
    resume = options.get("resume_from_checkpoint")
    made.train(resume_from_checkpoint=resume)
    (gradients,) = (c for c in made.callback_handler.callbacks if isinstance(c, Gradients))
    logs = [entry for entry in made.state.log_history if "loss" in entry]
    return {
        "gradients": gradients.steps,
        "logs": logs,
        "parameters": torch.cat([p.detach().flatten() for p in made.model.parameters()]),
    }


if __name__ == "__main__":  # torchrun steps.py OUT ARGUMENTS, also accelerate launch
    out, arguments = sys.argv[1:]
    torch.set_num_threads(1)
    keywords = torch.load(arguments, weights_only=False)
    found = run(**keywords)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    torch.save(found, f"{out}.{rank}")
    if torch.distributed.is_initialized():  # gloo aborts where a peer leaves before it is done
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
