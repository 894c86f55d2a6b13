"""One optimizer step of the trainers themselves, data loader and optimizer left out: accumulated,
in one forward, and with or without padding; with adapters, and on a GPU of the whole model too.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

import drrlhf as dr
from drrlhf import backends
from drrlhf.bench import dpo_step, heads, peers
from drrlhf.bench.gate import Gate
from drrlhf.bench.preference import BETA
from drrlhf.bench.registry import OURS, SUITES, Case, Contest, Unavailable, Work

# batches, pairs in each, tokens of each sequence
ACCUMULATED = {"cpu": (8, 4, 128), "gpu": (8, 8, 512), "quick": (2, 2, 12)}
WHOLE = {"cpu": (1, 8, 128), "gpu": (1, 16, 512), "quick": (1, 4, 12)}
LENGTHS = {"cpu": (1, 8, 512), "gpu": (1, 32, 2048), "quick": (1, 4, 12)}
SHORTEST = 32  # of the lengths, which are spread evenly up to the longest
CHECKED = (2, 2, 32)  # the step that the gate runs, in float64 too
SPREAD = 0.1  # of what is moved off the start: losses then differ by more than bfloat16 rounds
TRL_LIGER = f"{heads.TRL} with liger"
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
    steps = (
        ("step in accumulated batches", ACCUMULATED, SET_CONTENDERS),
        ("step in one forward", WHOLE, SET_CONTENDERS),
        ("step of mixed lengths", LENGTHS, LAYOUTS),
    )
    trained = (True,) if suite == "cpu" else (True, False)
    for adapters, (metric, shapes, contenders) in product(trained, steps):
        batches, pairs, length = shape = shapes[suite]
        mixed = shapes is LENGTHS
        spread = _spread(pairs, length) if mixed else [length] * (2 * pairs)
        yield Case(
            op="trainer_step",
            metric=metric if adapters else f"full {metric}",
            dtype="bfloat16",
            shape=shape,
            head="frozen" if adapters else "trained",
            memory=True,
            kernels=dpo_step.KERNELS,
            tokens=batches * sum(spread),
            build=partial(_contest, suite, shape, contenders, mixed, adapters),
        )


def _spread(pairs: int, longest: int) -> list[int]:
    """Lengths of 2n sequences, evenly from SHORTEST to the longest; each side gets its share."""
    shortest = min(SHORTEST, longest // 2)
    steps = 2 * pairs - 1
    lengths = [shortest + (longest - shortest) * i // steps for i in range(2 * pairs)]
    return lengths[0::2] + lengths[1::2]


def _contest(
    suite: str, shape: tuple[int, int, int], contenders: Mapping[str, dict[str, Any]], mixed: bool,
    adapters: bool,
) -> Contest:  # fmt: skip
    device = SUITES[suite]
    base = dpo_step.policy_model(suite, device)
    vocabulary = base.config.vocab_size
    step, checked = (
        _batches(vocabulary, cut, m, device) for cut, m in ((shape, mixed), (CHECKED, False))
    )

    def work(name: str) -> Callable[[], Work]:
        def make() -> Work:
            if name == TRL_LIGER and device == "cpu":
                raise Unavailable("its kernels are a GPU's")
            trainer = _trainer(name, base, contenders.get(name, {}), device, adapters)

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
        def plain(dtype: torch.dtype) -> dict[str, Tensor]:
            start = copy.deepcopy(base).to(dtype)
            policy = _moved(copy.deepcopy(base), adapters).to(dtype)
            return _plain(policy, start, checked, ambiguity)

        return Gate(lambda: plain(torch.float64), lambda: plain(torch.bfloat16))

    # In one forward the question is what a set, or padding, costs us: TRL would cost minutes on a
    # CPU.
    names = [*contenders] if shape[0] == 1 and suite == "cpu" else [*contenders, heads.TRL]
    names += [TRL_LIGER] * (suite == "gpu")
    gates = {text: gate(text) for text in SETS}
    return Contest(
        {name: work(name) for name in names},
        ours=tuple(contenders),
        baseline=(next(iter(contenders)),),
        gates={name: gates[contenders.get(name, {}).get("ambiguity", "erm")] for name in names},
    )


def _moved(base: Any, adapters: bool) -> Any:
    """The policy, off its start: the same in every copy."""
    if adapters:
        base = peers.load("peft", "peft").get_peft_model(base, dpo_step.lora())
    _move(base, adapters)
    return base.train()


def _move(model: Any, adapters: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in _watched(model, adapters):
            noise = SPREAD * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise if adapters else 1 + noise)


def _watched(model: Any, adapters: bool) -> list[Any]:
    """What is moved off the start, and whose gradient is checked: the adapters, or the weights of
    the norms, through which everything goes."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return trained if adapters else [parameter for parameter in trained if parameter.ndim == 1]


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


def _trainer(name: str, base: Any, options: Mapping[str, Any], device: str, adapters: bool) -> Any:
    """The trainer, ready for its first step; its dataset only satisfies the constructor."""
    model = copy.deepcopy(base)
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
        (ours.DPOConfig, ours.DPOTrainer)
        if name.startswith(OURS)
        else (trl.DPOConfig, trl.DPOTrainer)
    )
    if name == TRL_LIGER:  # what its configuration does when training starts
        liger = peers.load("liger_kernel.transformers", "liger-kernel")
        liger._apply_liger_kernel_to_instance(
            model=model, cross_entropy=False, fused_linear_cross_entropy=False
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
        ref_model=None if adapters else copy.deepcopy(base),
        args=arguments,
        train_dataset=data,
        processing_class=transformers.PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"
        ),
        peft_config=dpo_step.lora() if adapters else None,
    )
    _move(trainer.model, adapters)
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
    policy: Any, start: Any, batches: list[dict[str, Tensor]], ambiguity: str
) -> dict[str, Tensor]:  # fmt: skip
    """The watched gradient of the one big batch, from full logits in plain PyTorch."""
    sides = {
        name: torch.cat([part for side in (0, 1) for part in _halves(batches, name, side)])
        for name in batches[0]
    }

    def logps(model: Any) -> Tensor:
        inputs = {name: sides[name] for name in ("input_ids", "attention_mask")}
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        tokens = logits.log_softmax(-1).gather(-1, sides["input_ids"][:, 1:, None]).squeeze(-1)
        return (tokens * sides["completion_mask"][:, 1:]).sum(1)

    with torch.no_grad():
        reference = logps(start)
    chosen, rejected = (logps(policy) - reference).chunk(2)
    zeros = torch.zeros_like(chosen)
    with backends.use("reference"):
        dr.preference_loss(
            chosen, rejected, zeros, zeros, beta=BETA, ambiguity=ambiguity
        ).loss.backward()
    return _gradient(policy)


def _halves(batches: list[dict[str, Tensor]], name: str, side: int) -> list[Tensor]:
    return [batch[name].chunk(2)[side] for batch in batches]


def _gradient(model: Any) -> dict[str, Tensor]:
    adapters = hasattr(model, "peft_config")
    found = [p.grad.flatten().double() for p in _watched(model, adapters) if p.grad is not None]
    return {"adapters' gradient" if adapters else "norms' gradient": torch.cat(found)}
