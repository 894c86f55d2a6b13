"""`policy_loss` beside TRL's own loss on the same log-probs, and with the head in front of both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

import drrlhf as dr
from drrlhf import backends
from drrlhf.bench import heads
from drrlhf.bench.gate import Gate
from drrlhf.bench.heads import TRL, Problem
from drrlhf.bench.registry import OURS, SUITES, Case, Contest, Work, of_leaves, with_gradients
from drrlhf.bench.trl_policy import trl_policy_loss

# Prompts, completions of each, tokens of a completion.
SHAPES = {"cpu": (64, 8, 512), "gpu": (64, 8, 512), "quick": (4, 2, 16)}
# The same, vocabulary, depth.
HEADS = {
    "cpu": (8, 4, 64, 49152, 576),
    "gpu": (16, 8, 128, 151936, 4096),
    "quick": (2, 2, 8, 211, 32),
}
SET = "tv:0.1"
ERM = f"{OURS} (erm)"
WAYS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("dapo", {"loss_type": "dapo"}),
    ("grpo with a reference", {"loss_type": "grpo", "kl_beta": 0.04}),
    ("grpo by sequence", {"loss_type": "grpo", "importance_level": "sequence"}),
)


def cases(suite: str) -> Iterator[Case]:
    """From log-probs to their gradient, in three ways; and from hidden states."""
    for title, options in WAYS:
        yield Case(
            op="policy_loss",
            metric=f"log-probs to gradients, {title}",
            dtype="float32",
            shape=SHAPES[suite],
            unit="us",
            order=3,
            tokens=SHAPES[suite][0] * SHAPES[suite][1] * SHAPES[suite][2],
            build=lambda options=options: _from_logps(suite, options),  # type: ignore[misc]
        )
    yield Case(
        op="policy_loss",
        metric="hidden states to gradients",
        dtype="bfloat16",
        shape=HEADS[suite],
        head="frozen",
        order=3,
        tokens=HEADS[suite][0] * HEADS[suite][1] * HEADS[suite][2],
        kernels=("policy_loss", "linear_token_logprobs"),
        build=lambda: _from_hidden(suite),
    )


def _batch(prompts: int, each: int, length: int, device: str) -> dict[str, Tensor]:
    """Full completions, one policy update away from the policy that sampled them."""
    draw = torch.Generator().manual_seed(0)
    n = prompts * each
    near = [0.1 * torch.randn(n, length, generator=draw) for _ in range(2)]
    logps = -4 * torch.rand(n, length, generator=draw)
    found = {
        "logps": logps,
        "old_logps": logps + near[0],
        "ref_logps": logps + near[1],
        "entropy": 3 * torch.rand(n, length, generator=draw),
        "mask": torch.ones(n, length, dtype=torch.long),
        "advantages": torch.randn(n, generator=draw),
        "rewards": torch.randn(n, generator=draw),
        "prompt_ids": torch.arange(prompts).repeat_interleave(each),
    }
    return {name: tensor.to(device) for name, tensor in found.items()}


def _ours(prompts: int, ambiguity: str, batch: Mapping[str, Tensor], **options: Any) -> Tensor:
    mine: Any = {**batch, **options}
    return dr.policy_loss(**mine, num_prompts=prompts, ambiguity=ambiguity).loss


def _theirs(batch: Mapping[str, Tensor], **options: Any) -> Tensor:
    mine: Any = {k: v for k, v in batch.items() if k not in ("rewards", "prompt_ids")}
    return trl_policy_loss(**mine, **options)[0]


def _from_logps(suite: str, options: Mapping[str, Any]) -> Contest:
    prompts, each, length = SHAPES[suite]
    batch = _batch(prompts, each, length, SUITES[suite])
    if "kl_beta" not in options:
        del batch["ref_logps"]  # which TRL would not look at

    def work(loss: Callable[..., Tensor], mine: Mapping[str, Tensor] = batch) -> Work:
        leaf = mine["logps"].clone().requires_grad_()
        return of_leaves(lambda: loss({**mine, "logps": leaf}, **options), {"d log-probs": leaf})

    def gate(ambiguity: str) -> Gate:
        wide = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}

        @cache
        def truth() -> Mapping[str, Tensor]:
            with backends.use("reference"):
                return work(partial(_ours, prompts, ambiguity), wide).result()

        def plain() -> Mapping[str, Tensor]:
            """TRL's gradient in float32, with an adversary weighed sequence by sequence. TRL has no
            such loss: there the floor is the standard."""
            whole = work(_theirs).result()
            values = wide["rewards"].view(prompts, each).mean(1)
            with backends.use("reference"):
                weights = dr.robust_risk(-values, ambiguity).weights
            factor = (prompts * weights)[batch["prompt_ids"]].float()
            return {
                "loss": truth()["loss"].float(),
                "d log-probs": whole["d log-probs"] * factor[:, None],
            }

        def floors() -> Mapping[str, float]:
            # A sum of numbers of both signs: float32 arithmetic errs by the size of its terms.
            return {
                "loss": torch.finfo(torch.float32).eps * float(batch["advantages"].abs().mean())
            }

        return Gate(truth, plain, floors)

    robust, erm = gate(SET), gate("erm")
    return Contest(
        {
            OURS: lambda: work(partial(_ours, prompts, SET)),
            ERM: lambda: work(partial(_ours, prompts, "erm")),
            TRL: lambda: work(_theirs),
        },
        ours=(OURS, ERM),
        baseline=(TRL,),
        gates={OURS: robust, ERM: erm, TRL: erm},
    )


def _from_hidden(suite: str) -> Contest:
    prompts, each, length, v, d = HEADS[suite]
    n = prompts * each
    problem = Problem(n * length, v, d, torch.bfloat16, SUITES[suite], trained=False)
    batch = _batch(prompts, each, length, SUITES[suite])
    del batch["logps"], batch["old_logps"], batch["ref_logps"], batch["entropy"]

    def work(head: Callable[..., tuple[Tensor, Tensor]], loss: Callable[..., Tensor]) -> Work:
        def of_tokens() -> Tensor:
            logps, entropy = head(problem.hidden, problem.weight, problem.labels)
            tokens = {"logps": logps.view(n, length), "entropy": entropy.detach().view(n, length)}
            return loss({**batch, **tokens, "old_logps": None})

        return with_gradients(of_tokens, problem.clear, problem.gradients)

    def ours() -> Work:
        def head(*given: Tensor) -> Any:
            out = dr.linear_token_logprobs(*given, outputs=("entropy",))
            return out.logps, out.entropy

        return work(head, partial(_ours, prompts, SET, loss_type="dapo"))

    def theirs() -> Work:
        head = heads.trl(("entropy",))
        return work(lambda *given: head(*given)[:2], partial(_theirs, loss_type="dapo"))

    advantages, rewards, ids = (
        batch[name].cpu() for name in ("advantages", "rewards", "prompt_ids")
    )
    with backends.use("reference"):
        tokens = torch.zeros(n, length)
        weights = dr.policy_loss(tokens, None, advantages, rewards, ids, ambiguity=SET).weights
    # With r = 1, d loss / d log-prob = -m q A / tokens, whatever the log-probs are.
    upstream = (
        (-prompts * weights[ids] * advantages / (n * length))
        .repeat_interleave(length)
        .to(problem.device)
    )
    return Contest(
        {OURS: ours, TRL: theirs},
        baseline=(TRL,),
        gates={OURS: problem.gate(upstream, values=False)},
    )
