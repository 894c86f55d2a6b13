"""One optimizer step of the trainers themselves, data loader and optimizer left out: accumulated,
in one forward, and with or without padding.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import drrlhf as dr
from drrlhf import backends
from drrlhf.bench import dpo_step, heads, peers
from drrlhf.bench.gate import Gate
from drrlhf.bench.preference import BETA
from drrlhf.bench.registry import OURS, SUITES, Case, Contest, Work

# batches, pairs in each, tokens of each sequence
ACCUMULATED = {"cpu": (8, 4, 128), "gpu": (8, 8, 512), "quick": (2, 2, 12)}
WHOLE = {"cpu": (1, 8, 128), "gpu": (1, 16, 512), "quick": (1, 4, 12)}
LENGTHS = {"cpu": (1, 8, 512), "gpu": (1, 32, 2048), "quick": (1, 4, 12)}
SHORTEST = 32  # of the lengths, which are spread evenly up to the longest
CHECKED = (2, 2, 32)  # the step that the gate runs, in float64 too
SPREAD = 0.1  # of the adapters: losses then differ by more than bfloat16 rounds
SETS = ("erm", "tv:0.1", "cvar:0.3")
SET_CONTENDERS: dict[str, dict[str, Any]] = {
    f"{OURS} ({text})": {"ambiguity": text} for text in SETS
}
PADDED, PACKED = f"{OURS} (padded)", f"{OURS} (packed)"
LAYOUTS: dict[str, dict[str, Any]] = {
    PADDED: {"padding_free": False},
    PACKED: {"padding_free": True},
}


def cases(suite: str) -> Iterator[Case]:
    """The reference's pass is part of every step, as TRL has it by default."""
    for metric, shapes, contenders in (
        ("step in accumulated batches", ACCUMULATED, SET_CONTENDERS),
        ("step in one forward", WHOLE, SET_CONTENDERS),
        ("step of mixed lengths", LENGTHS, LAYOUTS),
    ):
        batches, pairs, length = shape = shapes[suite]
        mixed = shapes is LENGTHS
        spread = _spread(pairs, length) if mixed else [length] * (2 * pairs)
        yield Case(
            op="trainer_step",
            metric=metric,
            dtype="bfloat16",
            shape=shape,
            head="frozen",
            memory=True,
            kernels=dpo_step.KERNELS,
            tokens=batches * sum(spread),
            build=lambda s=shape, c=contenders, m=mixed: _contest(suite, s, c, m),  # type: ignore[misc]
        )


def _spread(pairs: int, longest: int) -> list[int]:
    """Lengths of 2n sequences, evenly from SHORTEST to the longest; each side gets its share."""
    shortest = min(SHORTEST, longest // 2)
    steps = 2 * pairs - 1
    lengths = [shortest + (longest - shortest) * i // steps for i in range(2 * pairs)]
    return lengths[0::2] + lengths[1::2]


def _contest(
    suite: str, shape: tuple[int, int, int], contenders: Mapping[str, dict[str, Any]], mixed: bool
) -> Contest:
    device = SUITES[suite]
    base = dpo_step.policy_model(suite, device)
    vocabulary = base.config.vocab_size
    step, checked = (
        _batches(vocabulary, cut, m, device) for cut, m in ((shape, mixed), (CHECKED, False))
    )

    def work(name: str) -> Callable[[], Work]:
        def make() -> Work:
            trainer = _trainer(name, copy.deepcopy(base), contenders.get(name, {}), device)

            def run() -> None:
                _step(trainer, step)

            def before() -> None:
                trainer.model.zero_grad(set_to_none=True)

            def outputs() -> Mapping[str, Tensor]:
                before()
                _step(trainer, checked)
                return _gradient(trainer.model)

            return Work(run, before, outputs)

        return make

    def gate(ambiguity: str) -> Gate:
        return Gate(
            lambda: _plain(_adapted(copy.deepcopy(base)).double(), checked, ambiguity),
            lambda: _plain(_adapted(copy.deepcopy(base)), checked, ambiguity),
        )

    # In one forward the question is what a set, or padding, costs us: TRL would cost minutes.
    names = [*contenders] if shape[0] == 1 else [*contenders, heads.TRL]
    gates = {text: gate(text) for text in SETS}
    return Contest(
        {name: work(name) for name in names},
        ours=tuple(contenders),
        baseline=(next(iter(contenders)),),
        gates={name: gates[contenders.get(name, {}).get("ambiguity", "erm")] for name in names},
    )


def _adapted(base: Any) -> Any:
    model = peers.load("peft", "peft").get_peft_model(base, dpo_step.lora()).train()
    _perturb(model)
    return model


def _perturb(model: Any) -> None:
    """Adapters that are the same in every copy of the model, and no longer change nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(SPREAD * noise)


def _batches(
    vocabulary: int, shape: tuple[int, int, int], mixed: bool, device: str
) -> list[dict[str, Tensor]]:
    """Batches as TRL's collator makes them; a quarter of each sequence is its prompt."""
    count, pairs, length = shape
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor(_spread(pairs, length) if mixed else [length] * (2 * pairs))
    place = torch.arange(length)
    made = []
    for _ in range(count):
        ids = torch.randint(3, vocabulary, (2 * pairs, length), generator=generator)
        attention = (place < lengths[:, None]).long()
        completion = attention * (place >= (lengths // 4)[:, None])
        batch = {
            "input_ids": ids * attention, "attention_mask": attention, "completion_mask": completion
        }  # fmt: skip
        made.append({name: tensor.to(device) for name, tensor in batch.items()})
    return made


def _trainer(name: str, model: Any, options: Mapping[str, Any], device: str) -> Any:
    """The trainer, ready for its first step; its dataset only satisfies the constructor."""
    trl = peers.load("trl", "trl")
    datasets = peers.load("datasets", "datasets")
    tokenizers = peers.load("tokenizers", "tokenizers")
    transformers = peers.load("transformers", "transformers")
    from drrlhf import trl as ours

    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2}, unk_token="<pad>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    datasets.disable_progress_bars()
    data = datasets.Dataset.from_dict({"prompt": ["a"], "chosen": [" a"], "rejected": [" a"]})
    config, kind = (
        (trl.DPOConfig, trl.DPOTrainer) if name == heads.TRL else (ours.DPOConfig, ours.DPOTrainer)
    )
    arguments = config(
        tempfile.mkdtemp(prefix="drrlhf-bench-"),
        use_cpu=device == "cpu",
        bf16=True,
        beta=BETA,
        report_to="none",
        disable_tqdm=True,
        gradient_checkpointing=False,
        **options,
    )
    trainer = kind(
        model=model,
        args=arguments,
        train_dataset=data,
        processing_class=transformers.PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"
        ),
        peft_config=dpo_step.lora(),
    )
    _perturb(trainer.model)
    trainer.optimizer = None
    return trainer


def _step(trainer: Any, batches: list[dict[str, Tensor]]) -> None:
    """What the training loop does between two optimizer steps."""
    state = trainer.accelerator.gradient_state
    fetched, items = trainer.get_batch_samples(iter(batches), len(batches), trainer.args.device)
    trainer.current_gradient_accumulation_steps = len(fetched)
    for i, batch in enumerate(fetched):
        state._set_sync_gradients(i == len(fetched) - 1)
        trainer.training_step(trainer.model, batch, items)


def _plain(
    model: Any, batches: list[dict[str, Tensor]], ambiguity: str
) -> dict[str, Tensor]:  # fmt: skip
    """The adapters' gradient of the one big batch, from full logits in plain PyTorch."""
    sides = {
        name: torch.cat([part for side in (0, 1) for part in _halves(batches, name, side)])
        for name in batches[0]
    }

    def logps() -> Tensor:
        inputs = {name: sides[name] for name in ("input_ids", "attention_mask")}
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        tokens = logits.log_softmax(-1).gather(-1, sides["input_ids"][:, 1:, None]).squeeze(-1)
        return (tokens * sides["completion_mask"][:, 1:]).sum(1)

    with torch.no_grad(), model.disable_adapter():
        reference = logps()
    chosen, rejected = (logps() - reference).chunk(2)
    zeros = torch.zeros_like(chosen)
    with backends.use("reference"):
        dr.preference_loss(
            chosen, rejected, zeros, zeros, beta=BETA, ambiguity=ambiguity
        ).loss.backward()
    return _gradient(model)


def _halves(batches: list[dict[str, Tensor]], name: str, side: int) -> list[Tensor]:
    return [batch[name].chunk(2)[side] for batch in batches]


def _gradient(model: Any) -> dict[str, Tensor]:
    found = [p.grad.flatten().double() for p in model.parameters() if p.grad is not None]
    return {"adapters' gradient": torch.cat(found)}
