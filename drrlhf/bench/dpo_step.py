"""One DPO step of a language model with adapters: forward, head, loss, backward."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

import drrlhf as dr
from drrlhf.bench import heads, linear_preference_loss, peers
from drrlhf.bench.gate import Gate
from drrlhf.bench.linear_preference_loss import BETA, ERM, KERNELS, ROBUST
from drrlhf.bench.registry import OURS, SUITES, Case, Contest, Unavailable, Work

SHAPES = {"cpu": (8, 256), "gpu": (16, 1024), "quick": (4, 12)}  # sequences, tokens of each
CHECKED = (4, 64)  # of the same, in float64
LAYERS = 8
STANDARD = 0.05  # the largest relative error of plain bfloat16 that others may be measured by
# Models of random weights, told apart from uniform ones by their spread.
_RANDOM: dict[str, dict[str, Any]] = {
    "quick": {
        "vocab_size": 211,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    },
    "gpu": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
    },
}

Step = Callable[[Any, Tensor, Tensor, Tensor], Tensor]  # model, ids, labels, reference -> loss ()


def cases(suite: str) -> Iterator[Case]:
    """Tokens/s of the policy's step; the reference log-probs are given, as if precomputed."""
    sequences, length = SHAPES[suite]
    yield Case(
        op="dpo_step",
        metric=f"{ROBUST}, forward+backward",
        dtype="bfloat16",
        shape=(sequences, length),
        head="frozen",
        memory=True,
        kernels=KERNELS,
        tokens=sequences * length,
        order=6,
        seconds=20.0 if suite == "gpu" else 1.0,
        build=lambda: _contest(suite, sequences, length),
    )


def _contest(suite: str, sequences: int, length: int) -> Contest:
    device = SUITES[suite]
    model = with_adapters(policy_model(suite, device))
    vocabulary = model.get_base_model().config.vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (sequences, length), generator=generator).to(device)
    # Labels of the next token, aligned with the hidden states; the last one has none.
    labels = torch.cat([ids[:, 1:], ids.new_full((sequences, 1), -100)], 1)
    reference = torch.zeros(sequences, device=device)
    steps: dict[str, Callable[[], Step]] = {
        OURS: lambda: _ours(ROBUST),
        ERM: lambda: _ours("erm"),
        heads.PLAIN: lambda: _plain_step("erm"),
        heads.TRL: _trl,
    }

    def work(step: Step) -> Work:
        def before() -> None:
            model.zero_grad(set_to_none=True)

        def run() -> None:
            step(model, ids, labels, reference).backward()

        # The gate runs a slice: in float64 the whole would take minutes.
        def outputs() -> Mapping[str, Tensor]:
            return _gradients(model, step, *_slice(ids, labels, reference))

        return Work(run, before, outputs)

    def gate(ambiguity: str) -> Gate:
        step, inputs = _plain_step(ambiguity), _slice(ids, labels, reference)
        return Gate(
            lambda: _gradients(copy.deepcopy(model).double(), step, *inputs),
            lambda: _gradients(model, step, *inputs),
            most=STANDARD,
        )

    erm, robust = gate("erm"), gate(ROBUST)
    return Contest(
        {name: partial(lambda make: work(make()), make) for name, make in steps.items()},
        ours=(OURS, ERM),
        baseline=(ERM,),
        gates=dict.fromkeys(steps, erm) | {OURS: robust},
    )


def _slice(ids: Tensor, labels: Tensor, reference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    sequences, length = CHECKED
    ids = ids[:sequences, :length]
    ends = ids.new_full((len(ids), 1), -100)  # the slice's last token predicts none of its own
    return ids, torch.cat([labels[:sequences, : ids.shape[1] - 1], ends], 1), reference[:sequences]


def _gradients(model: Any, step: Step, *inputs: Tensor) -> dict[str, Tensor]:
    """The gradients of all adapters, in one vector."""
    model.zero_grad(set_to_none=True)
    step(model, *inputs).backward()
    found = [p.grad.flatten().double() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return {"adapters' gradient": torch.cat(found)}


def _ours(ambiguity: str) -> Step:
    def step(model: Any, ids: Tensor, labels: Tensor, reference: Tensor) -> Tensor:
        policy = model.get_base_model()
        hidden = policy.model(ids, torch.ones_like(ids), use_cache=False).last_hidden_state
        weight = policy.get_output_embeddings().weight
        return dr.linear_preference_loss(
            hidden, weight, labels, reference, beta=BETA, ambiguity=ambiguity
        ).loss

    return step


def token_logps(model: Any, ids: Tensor, attention: Tensor) -> Tensor:
    """Log-probs (B, L - 1) of all tokens but the first, from full logits in plain PyTorch."""
    logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, :-1]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


def _plain_step(ambiguity: str) -> Step:
    def step(model: Any, ids: Tensor, labels: Tensor, reference: Tensor) -> Tensor:
        logps = token_logps(model, ids, torch.ones_like(ids)).sum(1)
        if ambiguity == "erm":
            return linear_preference_loss.dpo_loss(logps - reference)
        return linear_preference_loss.robust_dpo_loss(logps - reference, ambiguity)

    return step


def _trl() -> Step:
    add_fused_lm_head = peers.load("trl.trainer.utils", "trl").add_fused_lm_head

    def step(model: Any, ids: Tensor, labels: Tensor, reference: Tensor) -> Tensor:
        policy = model.get_base_model()
        if not hasattr(policy, "_bench_fused"):
            add_fused_lm_head(policy)
            policy._bench_fused = True
        mask = torch.ones_like(ids)
        outputs = model(
            input_ids=ids, attention_mask=mask, labels=ids, use_cache=False, fused_lm_head=True
        )
        return linear_preference_loss.dpo_loss(outputs.log_probs.sum(1) - reference)

    return step


def policy_model(suite: str, device: str) -> Any:
    """The policy in bfloat16, without adapters: the cut SmolLM2 on a CPU, a random one of the shape
    of Llama-3.2-1B on a GPU, a tiny random one when quick.

    Raises:
        Unavailable: packages are missing, or the model is neither cached nor to be fetched.
    """
    transformers = peers.load("transformers", "transformers")
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    if suite in _RANDOM:
        with torch.device(device):
            return transformers.LlamaForCausalLM(
                transformers.LlamaConfig(**_RANDOM[suite])
            ).bfloat16()
    from rich.console import Console

    from drrlhf.demo.material import MaterialError

    try:
        from drrlhf.demo.dpo import cut_model

        folder = cut_model(LAYERS, Console(stderr=True))
    except (ImportError, MaterialError) as error:
        raise Unavailable(f"no model: {peers.reason(error)}") from error
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return model.to(device)


def lora() -> Any:
    """Adapters on every linear layer."""
    return peers.load("peft", "peft").LoraConfig(
        r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def with_adapters(model: Any) -> Any:
    return peers.load("peft", "peft").get_peft_model(model, lora()).train()
