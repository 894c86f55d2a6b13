"""One optimizer step of the trainers themselves, data loader and optimizer left out: accumulated,
in one forward, and with or without padding; with adapters, and on a GPU of the whole model too.

What is checked is the gradient of a short step against float64, beside plain PyTorch in bfloat16,
whose own relative error must be a small one (`dpo_step.STANDARD`), or the check says nothing. That
depends on where the step starts. A policy at its reference has equal margins, whose gradient is
rounding. Adapters moved by N(0, 0.1²) multiply what a layer of a random model says by four: sixteen
such layers are chaotic, and the gradient in bfloat16 is off by 0.2 at width 256, by 0.7 at 1024 (on
a CPU) and by more than 1 at 2048 (on an H100). Moved by 0.02 it is off by 0.02 (see `SPREAD`); the
weights of the norms, near 1, may be moved by 0.1. And which pair is the worst must not be decided
by rounding: the pairs of the checked step are those of many whose margins are furthest apart.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from drrlhf.bench import dpo_step, heads, peers
from drrlhf.bench.gate import Gate
from drrlhf.bench.linear_preference_loss import BETA, robust_dpo_loss
from drrlhf.bench.registry import OURS, SUITES, Case, Contest, Unavailable, Work, variant

# batches, pairs in each, tokens of each sequence
ACCUMULATED = {"cpu": (8, 4, 128), "gpu": (8, 8, 512), "quick": (2, 2, 12)}
WHOLE = {"cpu": (1, 8, 128), "gpu": (1, 16, 512), "quick": (1, 4, 12)}
LENGTHS = {"cpu": (1, 8, 512), "gpu": (1, 32, 2048), "quick": (1, 4, 12)}
# pairs, tokens of the prompt that both answers have, tokens of each answer
PROMPTS = {
    "cpu": ((8, 384, 64), (8, 256, 128), (8, 128, 128), (8, 64, 256)),
    "gpu": ((16, 1536, 256),),
    "quick": ((2, 16, 8),),
}
SHORTEST = 32  # of the lengths, which are spread evenly up to the longest
CHECKED = (2, 2, 32)  # the step that the gate runs, in float64 too
CANDIDATES = 16  # pairs that its pairs are chosen from
# Of what is moved off the start, adapters by suite and norms: losses then differ by more than
# bfloat16 rounds, and layers stay layers. The cut model of the CPU suite is trained, not random.
SPREAD = {"cpu": 0.1, "gpu": 0.02, "quick": 0.1}
SPREAD_OF_NORMS = 0.1

TRL_LIGER = f"{heads.TRL} with liger"
LIGER_OPTION = "use_liger_kernel"
SETS = ("erm", "tv:0.1", "cvar:0.3")
Options = dict[str, dict[str, Any]]  # of a trainer, by implementation
SET_IMPLEMENTATIONS: Options = {variant(text): {"ambiguity": text} for text in SETS}
# Ours with Liger's layers, beside TRL's with them.
LIGER_IMPLEMENTATIONS: Options = {
    variant(text, "liger"): {"ambiguity": text, LIGER_OPTION: True} for text in SETS[:2]
}
PADDED, PACKED = variant("padded"), variant("packed")
LAYOUTS: Options = {PADDED: {"padding_free": False}, PACKED: {"padding_free": True}}
APART, SHARED, SHARED_TV = variant("apart"), variant("shared"), variant("shared", "tv:0.1")
# Forms of each answer beside the original: in the worst of them a pair is trained on.
VIEWS = 3
VIEWED, VIEWED_HALF = variant("shared", "views"), variant("shared", "views of half")
_SHARE = {"share_prompts": "auto"}
_VIEW = {**_SHARE, "views": ["typos"], "views_per_pair": VIEWS}
SHARING: Options = {
    APART: {"share_prompts": False},
    SHARED: _SHARE,
    SHARED_TV: {**_SHARE, "ambiguity": "tv:0.1"},
    VIEWED: _VIEW,
    VIEWED_HALF: {**_VIEW, "views_scored": 0.5},
}
SHARING_LIGER: Options = {variant("shared", "liger"): {**_SHARE, LIGER_OPTION: True}}
CHECKPOINTING = "gradient_checkpointing"


def of_prompts(prompt: int, answer: int) -> str:
    """The metric of a step whose pairs have a prompt."""
    return f"step of prompts of {prompt} and answers of {answer}"


def cases(suite: str) -> Iterator[Case]:
    """The reference's pass is part of every step, as TRL has it by default."""
    steps = (
        ("step in accumulated batches", ACCUMULATED, SET_IMPLEMENTATIONS),
        ("step in one forward", WHOLE, SET_IMPLEMENTATIONS),
        ("step of mixed lengths", LENGTHS, LAYOUTS),
    )
    trained = (True,) if suite == "cpu" else (True, False)
    step = partial(Case, "trainer_step", dtype="bfloat16", memory=True, kernels=dpo_step.KERNELS)
    of_adapters = f"adapters N(0, {SPREAD[suite]:g}²)"
    for adapters, (metric, shapes, implementations) in product(trained, steps):
        batches, pairs, length = shape = shapes[suite]
        mixed = shapes is LENGTHS
        spread = _spread(pairs, length) if mixed else [length] * (2 * pairs)
        yield step(
            metric=metric if adapters else f"full {metric}",
            shape=shape,
            head="frozen" if adapters else "trained",
            tokens=batches * sum(spread),
            order=7 if not adapters else 0 if shapes is WHOLE else 6,
            seconds=30.0 if suite == "gpu" else 1.0,
            note=of_adapters if adapters else f"norms 1 + N(0, {SPREAD_OF_NORMS:g}²)",
            build=partial(
                _contest, suite, shape, implementations, mixed, adapters, shapes is WHOLE
            ),
        )
    for pairs, prompt, answer in PROMPTS[suite]:
        shape = 1, pairs, prompt + answer
        yield step(
            metric=of_prompts(prompt, answer),
            shape=shape,
            head="frozen",
            tokens=2 * pairs * (prompt + answer),
            order=0,
            seconds=30.0 if suite == "gpu" else 20.0,
            note=of_adapters,
            build=partial(_contest, suite, shape, SHARING, False, True, False, prompt),
        )


def _spread(pairs: int, longest: int) -> list[int]:
    """Lengths of 2n sequences, evenly from SHORTEST to the longest; each side gets its share."""
    shortest = min(SHORTEST, longest // 2)
    steps = 2 * pairs - 1
    lengths = [shortest + (longest - shortest) * i // steps for i in range(2 * pairs)]
    return lengths[0::2] + lengths[1::2]


def _contest(
    suite: str,
    shape: tuple[int, int, int],
    implementations: Mapping[str, dict[str, Any]],
    mixed: bool,
    adapters: bool,
    whole: bool,
    prompt: int | None = None,
) -> Contest:
    device = SUITES[suite]
    base = dpo_step.policy_model(suite, device)
    vocabulary = base.config.vocab_size
    step = _batches(vocabulary, shape, mixed, device, prompt)
    moved = _moved(copy.deepcopy(base), adapters, SPREAD[suite])
    checked = _apart(base, moved, device, prompt is not None)

    # What a set costs with Liger's layers is asked once, where the whole batch is one forward.
    if suite != "cpu":
        with_liger = SHARING_LIGER if prompt else LIGER_IMPLEMENTATIONS if whole else {}
        implementations = {**implementations, **(with_liger if adapters else {})}
    theirs: Options = {heads.TRL: {}, TRL_LIGER: {LIGER_OPTION: True}}
    # Long prompts on a GPU: without sharing, what the layers keep would not fit into 80 GB.
    common: dict[str, Any] = {CHECKPOINTING: suite == "gpu" and prompt is not None}

    def work(name: str) -> Work:
        options = {**implementations, **theirs}[name] | common
        with_liger = options.get(LIGER_OPTION, False)
        if with_liger and device == "cpu":
            raise Unavailable("Liger's kernels are a GPU's")
        trainer = _trainer(name, base, options, device, adapters, SPREAD[suite])
        layers = Layers(trainer) if with_liger else contextlib.nullcontext()

        mine = step if not options.get("views") else _with_views(step, trainer.args)

        def run() -> None:
            with layers:
                _step(trainer, mine)

        def before() -> None:
            trainer.model.zero_grad(set_to_none=True)

        def outputs() -> Mapping[str, Tensor]:
            before()
            with layers:
                _step(trainer, checked)
            return _gradient(trainer.model)

        return Work(run, before, outputs)

    def gate(ambiguity: str) -> Gate:
        def plain(dtype: torch.dtype) -> dict[str, Tensor]:
            start = copy.deepcopy(base).to(dtype)
            policy = _moved(copy.deepcopy(base), adapters, SPREAD[suite]).to(dtype)
            return _plain(policy, start, checked, ambiguity)

        return Gate(
            lambda: plain(torch.float64), lambda: plain(torch.bfloat16), most=dpo_step.STANDARD
        )

    # In one forward the question is what a set, or padding, costs us: TRL would cost minutes on a
    # CPU.
    ours_alone = shape[0] == 1 and suite == "cpu" and prompt is None
    names = [*implementations] if ours_alone else [*implementations, heads.TRL]
    names += [TRL_LIGER] * (suite != "cpu")
    gates = {text: gate(text) for text in SETS}
    first = next(iter(implementations))
    # Whose time is looked into: where the whole batch is one forward, and with shared prompts.
    profiled = (first, heads.TRL) if whole else ()
    if prompt is not None and suite == "gpu":
        profiled = SHARED, heads.TRL
    return Contest(
        {name: partial(work, name) for name in names},
        ours=tuple(implementations),
        baseline=(first,),
        gates={
            name: gates[implementations.get(name, {}).get("ambiguity", "erm")] for name in names
        },
        profiled=profiled,
    )


class Layers:
    """A trainer's model with Liger's layers, as `train` gives it them; they hold in a ``with``.

    Liger puts some of its layers in the place of the model's as names of the module that defines
    it, which every other model of that kind would use as well: those names are ours again outside.
    """

    def __init__(self, trainer: Any) -> None:
        peers.load("liger_kernel.transformers", "liger-kernel")
        liger = peers.load("transformers.integrations.liger", "transformers")
        model = trainer.accelerator.unwrap_model(trainer.model)
        whole = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._module = importlib.import_module(type(whole).__module__)
        before = dict(vars(self._module))
        liger.apply_liger_kernel(trainer.model, trainer.args.liger_kernel_config)
        after = dict(vars(self._module))
        changed = [name for name, value in after.items() if before.get(name) is not value]
        self._theirs = {name: after[name] for name in changed}
        self._own = {name: before[name] for name in changed}
        self.__exit__()

    def __enter__(self) -> None:
        vars(self._module).update(self._theirs)

    def __exit__(self, *_: object) -> None:
        vars(self._module).update(self._own)


def _moved(base: Any, adapters: bool, spread: float) -> Any:
    """The policy, off its start: the same in every copy."""
    if adapters:
        base = dpo_step.with_adapters(base)
    _move(base, adapters, spread)
    return base.train()


def _move(model: Any, adapters: bool, spread: float) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in _watched(model, adapters):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(spread * noise if adapters else 1 + SPREAD_OF_NORMS * noise)


def _watched(model: Any, adapters: bool) -> list[Any]:
    """What is moved off the start, and whose gradient is checked: the adapters, or the weights of
    the norms, through which everything goes."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return trained if adapters else [parameter for parameter in trained if parameter.ndim == 1]


def _batches(
    vocabulary: int,
    shape: tuple[int, int, int],
    mixed: bool,
    device: str,
    prompt: int | None = None,
) -> list[dict[str, Tensor]]:
    """Batches as TRL's collator makes them. The prompt of a pair is as long as given; else each
    sequence has its own, a quarter of it."""
    count, pairs, length = shape
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor(_spread(pairs, length) if mixed else [length] * (2 * pairs))
    place = torch.arange(length)
    made = []
    for _ in range(count):
        ids = torch.randint(3, vocabulary, (2 * pairs, length), generator=generator)
        attention = (place < lengths[:, None]).long()
        completion = attention * (place >= (lengths // 4)[:, None])
        if prompt is not None:
            ids[pairs:, :prompt] = ids[:pairs, :prompt]
            completion = attention * (place >= prompt)
        batch = {
            "input_ids": ids * attention,
            "attention_mask": attention,
            "completion_mask": completion,
        }
        made.append({name: tensor.to(device) for name, tensor in batch.items()})
    return made


def _with_views(batches: list[dict[str, Tensor]], config: Any) -> list[dict[str, Any]]:
    """Batches with forms of every answer, each other than the original from some place on, as
    `drrlhf.trl.view_texts.ViewCollator` makes them; every second pair has forms to be scored where
    half of them are."""
    from drrlhf.trl.view_texts import CLEAN, place_table

    generator = torch.Generator().manual_seed(2)
    made = []
    for batch in batches:
        n, device = len(batch["input_ids"]) // 2, batch["input_ids"].device
        scored = torch.arange(n) % 2 < 2 * config.views_scored
        forms = torch.where(scored, config.views_per_pair, 1)
        places: list[list[list[int]]] = [[], []]
        rows: list[int] = []
        family = [CLEAN] * (2 * n)
        for i in range(2 * n):
            mine = [] if not scored[i % n] else [i]
            for _ in range(int(forms[i % n])):
                mine.append(2 * n + len(rows))
                rows.append(i)
                family.append(0)
            places[i // n].append(mine)
        inputs = {name: tensor[rows].clone() for name, tensor in batch.items()}
        for ids, own in zip(inputs["input_ids"], inputs["completion_mask"].bool(), strict=True):
            answer = ids[own]
            change = int(torch.randint(len(answer), (1,), generator=generator))
            answer[change:] = answer[change:].flip(0)
            answer[change] = 3 if answer[change] != 3 else 4
            ids[own] = answer
        alike = torch.zeros(len(family), dtype=torch.int64, device=device)
        views = {
            "inputs": inputs,
            "chosen": place_table(places[0]).to(device),
            "rejected": place_table(places[1]).to(device),
            "prompt": alike,
            "begins": alike,  # where they do relative to others of their pair
            "alone": alike,
            "family": torch.tensor(family, device=device),
            "text": torch.arange(len(family), device=device),  # all differ
            "scored": scored.to(device),
            "number": torch.zeros(n, dtype=torch.float64, device=device),
            "drawn": torch.tensor(len(rows), device=device),
            "left": torch.tensor(len(rows), device=device),
        }
        made.append({**batch, "views": views})
    return made


@torch.no_grad()
def _apart(start: Any, policy: Any, device: str, shared: bool) -> list[dict[str, Tensor]]:
    """Batches of the shape CHECKED whose pairs are evenly spread over the margins of many; with a
    prompt that both answers have, or not."""
    count, pairs, length = CHECKED
    prompt = length // 2 if shared else None
    (many,) = _batches(start.config.vocab_size, (1, CANDIDATES, length), False, device, prompt)
    chosen, rejected = (_logps(policy, many) - _logps(start, many)).chunk(2)
    order = (chosen - rejected).argsort()
    places = torch.linspace(0, CANDIDATES - 1, count * pairs, device=device).round().long()
    picked = order[places].view(count, pairs)
    return [
        {name: x[torch.cat([rows, rows + CANDIDATES])] for name, x in many.items()}
        for rows in picked
    ]


def _logps(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Log-probs (2n,) of the completions, from full logits in plain PyTorch."""
    tokens = dpo_step.token_logps(model, batch["input_ids"], batch["attention_mask"])
    return (tokens * batch["completion_mask"][:, 1:]).sum(1)


def _trainer(
    name: str, base: Any, options: Mapping[str, Any], device: str, adapters: bool, spread: float
) -> Any:
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
    folder = tempfile.mkdtemp(prefix="drrlhf-bench-")
    arguments = config(
        folder,
        use_cpu=device == "cpu",
        bf16=True,
        beta=BETA,
        report_to="none",
        disable_tqdm=True,
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
    weakref.finalize(trainer, shutil.rmtree, folder)
    _move(trainer.model, adapters, spread)
    # As `train` does: without it there is no autocast, and adapters multiply in float32.
    if arguments.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable(arguments.gradient_checkpointing_kwargs)
    trainer.model_wrapped = trainer.accelerator.prepare(trainer.model)
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
) -> dict[str, Tensor]:
    """The watched gradient of the one big batch, from full logits in plain PyTorch."""
    sides = {
        name: torch.cat([batch[name].chunk(2)[side] for side in (0, 1) for batch in batches])
        for name in batches[0]
    }
    with torch.no_grad():
        reference = _logps(start, sides)
    robust_dpo_loss(_logps(policy, sides) - reference, ambiguity).backward()
    return _gradient(policy)


def _gradient(model: Any) -> dict[str, Tensor]:
    adapters = hasattr(model, "peft_config")
    found = [p.grad.flatten().double() for p in _watched(model, adapters) if p.grad is not None]
    return {"adapters' gradient" if adapters else "norms' gradient": torch.cat(found)}
