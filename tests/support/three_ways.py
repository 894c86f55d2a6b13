"""Token log-probs as one would write them in PyTorch, and the tolerance that goes with them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from drrlhf import backends

# TRITON_INTERPRET=1 gives a process of the tests to the interpreted kernels.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# DRRLHF_EMULATED=FILE.so gives it to the CUDA kernels, which tests/emulated built for the host.
EMULATED = bool(os.environ.get("DRRLHF_EMULATED"))
BUILT = ["reference", "cpp"] if backends.build_info()["built"] else ["reference"]
ON_GPU = os.environ.get("DRRLHF_TEST_DEVICE", "cpu") == "cuda"
DEVICE = "cuda" if ON_GPU else "cpu"
if INTERPRETED:
    BACKENDS = ["triton"]
elif EMULATED:
    BACKENDS = ["cuda"]
elif ON_GPU:
    BACKENDS = [os.environ["DRRLHF_TEST_BACKEND"]]  # one a process, as in the other modes
else:
    BACKENDS = BUILT
# Backends that do not look at values before they launch: what is wrong with one gives NaN.
ASYNCHRONOUS = ("triton", "cuda")
# Slow ways to run a kernel: the tests take fewer and smaller problems.
SLOW = INTERPRETED or EMULATED
# DRRLHF_ALL=1: every case in whatever mode (tests/conftest.py).
ALL = os.environ.get("DRRLHF_ALL", "0") != "0"
OUTPUTS = ("entropy", "logsumexp", "mean_logit", "is_top1", "log_sum_sq_probs")
# Ways for a matrix to lie in memory.
LAYOUTS = {
    "transposed": lambda x: x.T.contiguous().T,
    "every other column": lambda x: torch.stack([x, -x], -1)[..., 0],
    "one element into its storage": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(
        x.shape
    ),
    "one row for all": lambda x: x[:1].expand(x.shape),
    "part of wider rows": lambda x: torch.cat([x, -x], -1)[:, : x.shape[1]],
}

# For what other tests of the interpreted kernels prove as well, where a program takes milliseconds.
thorough_interpreted = [pytest.mark.thorough] if INTERPRETED else []


def in_turn(many: list[Any], few: list[Any]) -> list[Any]:
    """The product of two parameters; each of many with one of few, in turn, and with the rest of
    them where the run is a thorough one (tests/conftest.py)."""
    return [
        pytest.param(x, y, marks=() if k % len(few) == i else pytest.mark.thorough)
        for k, x in enumerate(many)
        for i, y in enumerate(few)
    ]


def transformed(logits, temperature=1.0, softcap=None):
    z = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return z if temperature == 1.0 else z / temperature


def plain(logits, labels, ignore_index=-100, **options):
    counted = labels != ignore_index
    index = torch.where(counted, labels, 0).long().unsqueeze(-1)
    logp = transformed(logits, **options).log_softmax(-1).gather(-1, index).squeeze(-1)
    return torch.where(counted, logp, 0)


def plain_outputs(logits, labels, ignore_index=-100, **options):
    z = transformed(logits, **options)
    logp = z.log_softmax(-1)
    found = {
        "entropy": -torch.where(logp > -torch.inf, logp.exp() * logp, 0).sum(-1),
        "logsumexp": z.logsumexp(-1),
        "mean_logit": z.mean(-1),
        "is_top1": z.argmax(-1) == labels,
        "log_sum_sq_probs": (2 * logp).logsumexp(-1),
    }
    return {
        k: torch.where(labels != ignore_index, x, torch.zeros_like(x)) for k, x in found.items()
    }


def plain_logits(hidden, weight, bias=None, logit_scale=1.0):
    logits = hidden @ weight.T
    logits = logits if bias is None else logits + bias
    return logits if logit_scale == 1.0 else logits * logit_scale


def rounding(truth, dtype):
    """Half the distance from each number to its neighbours of `dtype`."""
    bits = torch.finfo(dtype)
    _, exponent = torch.frexp(truth)
    return torch.ldexp(torch.full_like(truth, bits.eps / 4), exponent).clamp(
        min=bits.tiny * bits.eps
    )


def assert_no_worse(ours, theirs, truth, what=""):
    """The error of `ours` against float64 is at most twice that of `theirs`, plain PyTorch of the
    same dtype, by root mean square, and four times by the worst element.

    Where plain PyTorch is exact by luck, as for a probability of 1, it counts as rounded to
    nearest. Lists are pooled: a ratio of few numbers says more about luck than about code.
    """
    ours, theirs, truth = (x if isinstance(x, list) else [x] for x in (ours, theirs, truth))
    least = [rounding(t.detach(), o.dtype) for o, t in zip(ours, truth)]
    ours, theirs, truth, least = (
        torch.cat([x.detach().double().reshape(-1) for x in xs])
        for xs in (ours, theirs, truth, least)
    )
    assert ours.shape == theirs.shape == truth.shape
    if not ours.numel():
        return
    error, allowed = (ours - truth).abs(), (theirs - truth).abs()
    rms = lambda x: x.square().mean().sqrt().item()  # noqa: E731
    for name, factor, a, b in (
        ("RMS", 2, rms(error), max(rms(allowed), rms(least) / 3**0.5)),
        ("worst", 4, error.max().item(), max(allowed.max().item(), least.max().item())),
    ):
        assert a <= factor * b, (
            f"{what}: {name} error {a:.3g}, plain PyTorch's {b:.3g}, ratio {a / b:.2f}, at most "
            f"{factor} allowed"
        )


def tensors_in(found: Any) -> list[torch.Tensor]:
    """The tensors of a result: a tensor, a tuple, or parts of one that are None."""
    if isinstance(found, torch.Tensor):
        return [found]
    return [] if found is None else [x for part in found for x in tensors_in(part)]


def assert_refused(call: Callable[[], Any], message: str, backend: str) -> None:
    """`call` raises ValueError with `message`. Where values are not read before they are used, on a
    GPU and in kernels, the answer to a wrong one has NaN in it instead, or nothing at all, and the
    device goes on working."""
    if not ON_GPU and backend not in ASYNCHRONOUS:
        with pytest.raises(ValueError, match=message):
            call()
        return
    try:
        found = tensors_in(call())
    except ValueError as error:
        assert re.search(message, str(error)), error
    else:
        assert any(x.isnan().any() for x in found) or not any(x.numel() for x in found), found
    assert torch.ones(3).sum() == 3


def assert_differentiable_once(value, *inputs):
    """The gradient of `value` () may be asked for with its graph; its own derivative, by an input
    or by what `value` is multiplied with, is an error and not a silent 0."""
    factor = torch.tensor(1.5, dtype=value.dtype, requires_grad=True)
    gradients = torch.autograd.grad(value * factor, inputs, create_graph=True)
    plain = torch.autograd.grad(value, inputs, retain_graph=True)
    for gradient, once in zip(gradients, plain):
        torch.testing.assert_close(gradient, once * 1.5)
        for again in (*inputs, factor):
            with pytest.raises(RuntimeError, match="no double backward"):
                torch.autograd.grad(gradient.sum(), again, retain_graph=True)


def allocated(call: Callable[[], Any]) -> int:
    """Bytes that a call allocates in all."""
    kind = torch.profiler.ProfilerActivity
    activities = [kind.CPU, kind.CUDA] if ON_GPU else [kind.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as found:
        call()
    which = "self_device_memory_usage" if ON_GPU else "self_cpu_memory_usage"
    return sum(max(0, getattr(event, which)) for event in found.events())
