"""From settings and data to a trainer with our callbacks."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from drrlhf import models
from drrlhf.cli import reward_function, rundir
from drrlhf.cli.settings import Settings

KEPT_CHECKPOINTS = 2  # so that a broken newest one leaves one to go back to


def build(settings: Settings, data: Any, eval_data: Any, console: Console) -> Any:
    """The trainer and our callbacks on it; loads the model and tokenizes the data."""
    from transformers import AutoTokenizer, PrinterCallback

    from drrlhf import trl
    from drrlhf.callbacks import InterruptCallback, MetricsCallback, ProgressCallback

    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    of_pairs = settings.kind != "grpo"
    sets = [part.dataset if part else None for part in (data, eval_data)]
    arguments = _arguments(settings, eval_data is not None)
    if of_pairs:
        sets = [one and _tokenized(one, tokenizer, settings) for one in sets]
        arguments["max_length"] = _fitting_length(settings, tokenizer, console)
    make: Any
    config: Any
    if settings.kind == "reward":
        arguments["center_rewards_coefficient"] = settings.center_rewards_coefficient or None
        make, config = trl.RewardTrainer, trl.RewardConfig(**arguments)
    elif settings.kind == "dpo":
        arguments["loss_type"] = [settings.loss_type]
        make, config = trl.DPOTrainer, trl.DPOConfig(**arguments)
    else:
        config = trl.GRPOConfig(**arguments)
        make = partial(trl.GRPOTrainer, reward_funcs=reward_function.load(settings.reward or ""))
    callbacks = (
        MetricsCallback(Path(settings.output_dir) / rundir.METRICS_FILE),
        InterruptCallback(),
        ProgressCallback(console),
    )
    model, adapters = _start(settings)
    trainer = make(
        model=model,
        # MetricsCallback comes last: it must see that a checkpoint was asked for, whoever asked.
        callbacks=list(callbacks[::-1]),
        peft_config=adapters,
        args=config,
        processing_class=tokenizer,
        train_dataset=sets[0],
        eval_dataset=sets[1],
    )
    trainer.remove_callback(PrinterCallback)
    for what, part, kept in (
        ("", data, trainer.train_dataset),
        ("held-out ", eval_data, trainer.eval_dataset),
    ):
        if of_pairs and part is not None:
            _tell_left_out(what, part, kept, config.max_length, console)
    return trainer, callbacks


def _tokenized(dataset: Any, tokenizer: Any, settings: Settings) -> Any:
    """`dataset` as it is, or tokenized here when TRL could not: encoders end texts their own way.

    TRL appends the end-of-sequence token to every text, and most encoders have none.
    """
    from drrlhf import reward_inputs

    if tokenizer.eos_token is not None:
        return dataset
    if settings.kind == "dpo":
        raise ValueError(
            f"--model {settings.model}: its tokenizer has no eos_token to end a completion with"
        )
    if not isinstance(dataset[0]["chosen"], str):
        raise ValueError(
            f"--model {settings.model}: its tokenizer has no eos_token, so it reads plain text "
            "only, and the data is conversational"
        )
    return dataset.map(partial(reward_inputs.pair_ids, tokenizer), desc="Tokenizing")


def _arguments(settings: Settings, evaluate: bool) -> dict[str, Any]:
    """What the configuration takes from `settings`, and what all of them are given beside that."""
    import torch

    accelerated = torch.cuda.is_available()
    return settings.arguments() | {
        "per_device_eval_batch_size": settings.batch_size,
        "bf16": settings.dtype == "bf16",
        "use_cpu": not accelerated,
        "gradient_checkpointing": accelerated,  # buys memory with time: no bargain on a CPU
        "save_total_limit": KEPT_CHECKPOINTS,
        "logging_nan_inf_filter": False,  # a loss that is NaN must show
        "eval_strategy": "steps" if evaluate else "no",
        "eval_steps": settings.save_steps,
        "report_to": "none",
        "disable_tqdm": True,
    }


def _fitting_length(settings: Settings, tokenizer: Any, console: Console) -> int:
    """--max-length, or what the model has positions for when that is less."""
    from transformers import AutoConfig

    assert settings.max_length is not None
    config = AutoConfig.from_pretrained(models.base_of(settings.model)).get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or settings.max_length
    limit = min(positions, tokenizer.model_max_length)
    if limit < settings.max_length:
        console.print(f"--max-length is {limit} here: the model reads no more.")
    return min(limit, settings.max_length)


def _start(settings: Settings) -> tuple[Any, Any]:
    """What to begin with: a model or where it lies, and the settings of new adapters, if any."""
    if models.adapters_of(settings.model) is not None:
        import torch
        from transformers import set_seed

        set_seed(settings.seed)  # a policy's adapters get a new head for rewards
        kind = models.REWARD if settings.kind == "reward" else models.POLICY
        return models.load(settings.model, kind, torch.float32, trainable=True), None
    directory = Path(settings.model)
    # In full: adapters name the model under them, and are read from other directories.
    model = str(directory.resolve()) if directory.is_dir() else settings.model
    if not settings.lora:
        return model, None
    from peft import LoraConfig

    return model, LoraConfig(
        r=settings.lora_r,
        lora_alpha=2 * settings.lora_r,
        target_modules="all-linear",
        task_type="SEQ_CLS" if settings.kind == "reward" else "CAUSAL_LM",
    )


def _tell_left_out(what: str, data: Any, kept: Any, max_length: int, console: Console) -> None:
    """What --max-length has left of a data set, and of its groups."""
    rows, left = len(data.dataset), len(kept)
    if left < rows:
        console.print(
            f"{rows - left} of {rows} {what}pairs left out: longer than --max-length "
            f"{max_length} tokens."
        )
    if "group" not in data.dataset.column_names:
        return
    names = data.group_names
    for group in sorted(set(data.dataset.unique("group")) - set(kept.unique("group"))):
        console.print(
            f"Group {names[group] if names else group} has no {what}pair left: all of its are "
            f"longer than --max-length {max_length} tokens.",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )
