"""Optimizer steps of tiny trainers and what they did: used in this process and by launchers."""

from __future__ import annotations

import sys
from typing import Any

from trl_fixtures import quiet, tiny_pairs, tiny_tokenizer  # isort: skip (settles the environment)

import torch
import trl
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, TrainerCallback

from drrlhf.trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
)


def whole(tensors: list[torch.Tensor]) -> torch.Tensor:
    """A copy of all the numbers (N,) of tensors, which may be spread over the ranks."""
    full = (t.full_tensor() if isinstance(t, DTensor) else t for t in tensors)
    return torch.cat([tensor.detach().flatten() for tensor in full])


class Gradients(TrainerCallback):
    """Keeps the gradient that each optimizer step is about to take."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        found = [p.grad for p in model.parameters() if p.requires_grad]
        self.steps.append(whole([g for g in found if g is not None]))


def away(path: str) -> Any:
    """The model at ``path``, moved away from it, so that policy and reference differ."""
    model = AutoModelForCausalLM.from_pretrained(path)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.03 * torch.randn_like(parameter)
    return model


COMPLETIONS = 2  # of each prompt


def by_place(prompts: list[str], **_: Any) -> list[float]:
    """A reward that differs between the completions of a prompt even where these are equal."""
    texts = [sum(map(ord, prompt)) for prompt in prompts]
    return [t % 7 / 3 + (i % COMPLETIONS) * (1 + t % 3) for i, t in enumerate(texts)]


def written(prompt_ids: list[list[int]], *_: Any) -> tuple[list[list[int]], None]:
    """Completions that depend on the prompt and the place alone, however a batch is cut."""
    found = []
    for i, ids in enumerate(prompt_ids):
        draw = torch.Generator().manual_seed(sum(ids) * COMPLETIONS + i % COMPLETIONS)
        length = int(torch.randint(1, 6, (1,), generator=draw))
        found.append([*torch.randint(6, 180, (length,), generator=draw).tolist(), 1])
    return found, None


KINDS = {
    "dpo": (DPOTrainer, DPOConfig),
    "reward": (RewardTrainer, RewardConfig),
    "grpo": (GRPOTrainer, GRPOConfig),
    "trl": (trl.GRPOTrainer, trl.GRPOConfig),
}


def trainer(
    method: str, model: str, folder: str, data: Any = None, pairs: int = 8, **options: Any
) -> Any:
    """A trainer of one of our kinds, or TRL's GRPO; options beginning with trainer_ go to it."""
    kind, config = KINDS[method]
    own = {k.removeprefix("trainer_"): v for k, v in options.items() if k.startswith("trainer_")}
    rest = {k: v for k, v in options.items() if not k.startswith("trainer_")}
    # sgd: the second step then differs as little as the gradient of the first one did
    arguments = quiet(max_grad_norm=0.0, max_steps=1, optim="sgd") | rest
    if method == "dpo" and "ref_model" not in own and "peft_config" not in own:
        own["ref_model"] = AutoModelForCausalLM.from_pretrained(model)
    if kind in (GRPOTrainer, trl.GRPOTrainer):
        own.setdefault("reward_funcs", by_place)
        arguments = {"num_generations": COMPLETIONS, "max_completion_length": 8} | arguments
        data = tiny_pairs(pairs) if data is None else data
        data = data.remove_columns([c for c in ("chosen", "rejected") if c in data.column_names])
    made = kind(
        model=away(model) if method == "dpo" else model,
        args=config(folder, **arguments),
        train_dataset=tiny_pairs(pairs) if data is None else data,
        callbacks=[Gradients(), *own.pop("callbacks", [])],
        **{"processing_class": tiny_tokenizer()} | own,
    )
    if kind in (GRPOTrainer, trl.GRPOTrainer):
        made._generate_single_turn = written
    return made


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
        "parameters": whole(list(made.model.parameters())),
    }


def outcome(**keywords: Any) -> dict[str, Any] | str:
    """What `run` gives, or the text of its refusal."""
    try:
        return run(**keywords)
    except ValueError as error:
        return str(error)


if __name__ == "__main__":  # torchrun steps.py OUT ARGUMENTS, also accelerate launch
    out, arguments = sys.argv[1:]
    torch.set_num_threads(1)
    keywords = torch.load(arguments, weights_only=False)
    several = keywords.get("runs")
    found = [outcome(**each) for each in several] if several else run(**keywords)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    torch.save(found, f"{out}.{rank}")
    if torch.distributed.is_initialized():  # gloo aborts where a peer leaves before it is done
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
