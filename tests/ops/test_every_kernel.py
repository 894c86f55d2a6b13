"""Every CUDA kernel once, on few and ragged sizes, beside plain PyTorch; for compute-sanitizer.

A tool of compute-sanitizer takes seconds to start and slows a kernel down a hundredfold, so these
are all that run under it (`-m sanitized`, see `make test-gpu`). They are tests like others besides.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from three_ways import BACKENDS, INTERPRETED, tensors_in, thorough_interpreted

import drrlhf as dr
from drrlhf import backends, ops

# Triton's are those of the tables (test_backends_equal_reference).
pytestmark = [pytest.mark.sanitized, *thorough_interpreted]
SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
OUTPUTS = ("entropy", "logsumexp", "mean_logit", "is_top1", "log_sum_sq_probs")
# Pairs: a grid searches, and its last block has little to do. Interpreted every sequence is a
# program; there `test_many_pairs` has fewer and a lower bound.
MANY = 16405 if not INTERPRETED else 37


@pytest.fixture(params=BACKENDS)
def backend(request):
    with backends.use(request.param):
        yield request.param


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


def tokens(n, vocabulary):
    labels = torch.randint(vocabulary, (n,))
    labels[1::4] = -100
    return labels


def logits(vocabulary, dtype=torch.bfloat16, softcap=None):
    """Rows that begin anywhere within 16 bytes, of two loads a thread and a few entries more."""
    x, labels = normal(5, vocabulary + 3, dtype=dtype), tokens(5, vocabulary)
    upstream = normal(5)

    def run(x):
        found = dr.token_logprobs(
            x[:, 1 : vocabulary + 1], labels, softcap=softcap, outputs=OUTPUTS, temperature=0.7
        )
        return found, found.logps @ upstream + found.entropy.sum()

    return run, [x]


def logps_alone(vocabulary):
    x, labels, upstream = normal(5, vocabulary), tokens(5, vocabulary), normal(5)

    def run(x):
        found = dr.token_logprobs(x, labels)
        return found, found @ upstream

    return run, [x]


def head(budget, outputs=(), dtype=torch.bfloat16, n=19, width=24, vocabulary=1021):
    hidden, weight = normal(n, width, dtype=dtype), normal(vocabulary, width, dtype=dtype) / 5
    bias, labels, upstream = normal(vocabulary, dtype=dtype), tokens(n, vocabulary), normal(n)
    upstream[2::5] = 0

    def run(hidden, weight, bias):
        found = dr.linear_token_logprobs(
            hidden, weight, labels, bias=bias, memory_budget=budget, outputs=outputs
        )
        value = found.logps @ upstream + found.entropy.sum() if outputs else found @ upstream
        return found, value

    return run, [hidden, weight, bias]


def frozen_head():
    run, (hidden, weight, bias) = head(1 << 30)
    return (lambda x: run(x, weight, bias)), [hidden]


def risk(n, ambiguity):
    nominal, groups = torch.rand(n), torch.arange(n) % 3
    nominal[1::3] = 0

    def run(losses):
        found = dr.robust_risk(losses, ambiguity, nominal=nominal, groups=groups)
        return found, found.value

    return run, [normal(n)]


def sequences(mean):
    cu, labels, upstream = torch.tensor([0, 3, 3, 70, 301]), tokens(301, 9), normal(4)
    reduction = "mean" if mean else "sum"

    def run(logps):
        found = dr.sequence_logprobs(logps, labels, cu_seqlens=cu, reduction=reduction)
        return found, found @ upstream

    return run, [normal(301)]


def sequences_of_pairs():
    labels, refs = tokens(6 * 37, 11).view(6, 37), normal(6)

    def run(hidden, weight):
        found = dr.linear_preference_loss(hidden, weight, labels, refs, ambiguity="tv:0.2")
        return found, found.loss

    return run, [normal(6, 37, 8), normal(11, 8)]


def many_pairs():
    labels, refs, options = torch.ones(2 * MANY, 1).long(), normal(2 * MANY), (-100, 0.1, 0.0)
    encoded = dr.parse_ambiguity("tv:0.2").encode()

    def run(logps):
        found = ops.sequence_preference_loss(
            logps, labels, None, refs, None, None, None, *options, *encoded
        )
        return found, found.value

    return run, [normal(2 * MANY, 1)]


# Kernels of csrc/cuda, and what launches them.
CASES = {
    "token_logprobs_kernel, token_logprobs_backward_kernel": lambda: logits(8197),
    "the same in float32, capped": lambda: logits(1023, torch.float32, 5.0),
    "the same without extras": lambda: logps_alone(4099),
    "softmax_chunk_kernel": lambda: head(1 << 30),
    "chunk_gradient_kernel": lambda: head(0, OUTPUTS),
    "scale_rows_kernel": frozen_head,
    "robust_risk_kernel": lambda: risk(37, "cvar:0.3,temperature=0.4"),
    "robust_risk_kernel by a grid": lambda: risk(MANY, "kl:0.1"),
    "robust_risk_kernel of groups": lambda: risk(37, "group:3"),
    "sequence_logprobs_kernel, sequence_logprobs_backward_kernel": lambda: sequences(True),
    "sequence_preference_loss_kernel": sequences_of_pairs,
    "sequence_preference_loss_kernel, solve_pairs_kernel": many_pairs,
}


def answers(run, inputs):
    leaves = [x.clone().requires_grad_() for x in inputs]
    found, value = run(*leaves)
    value.backward()
    return [x.detach() for x in tensors_in(found)] + [x.grad for x in leaves]


@pytest.mark.parametrize("name", CASES)
def test_every_kernel(backend, name):
    torch.manual_seed(0)
    run, inputs = CASES[name]()
    found = answers(run, inputs)
    with backends.use("reference"):
        expected = answers(run, inputs)
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        rough = a.dtype == torch.bfloat16
        torch.testing.assert_close(
            a, b, rtol=2e-2 if rough else 1e-3, atol=1e-2 if rough else 1e-4, equal_nan=True
        )


def test_every_kernel_has_a_case():
    texts = [path.read_text() for path in SOURCES.glob("*.cu")]
    there = {
        name
        for text in texts
        for name in re.findall(r"__global__\s+void\s+(?:__\w+\([^)]*\)\s+)?(\w+)\(", text)
    }
    named = {name for case in CASES for name in re.findall(r"\w+_kernel", case)}
    assert there == named and len(there) >= 10
    one_block = re.search(r"kOneBlockPairs = (\d+)", (SOURCES / "kernels.h").read_text())
    assert one_block and (int(one_block[1]) < MANY or INTERPRETED)
