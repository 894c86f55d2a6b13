"""The contract on equal bits: run to run, in any dtype of ids, and whoever else is in the batch."""

from __future__ import annotations

import pytest
import torch
from three_ways import BACKENDS, DEVICE, INTERPRETED, SLOW

import drrlhf as dr
from drrlhf import backends

# Rows of logits that all begin on 16 bytes: where they do not, the order of a sum follows from it.
TOKENS, WIDTH, VOCABULARY, PAIRS = 77, 48, 264 if INTERPRETED else 520, 12


@pytest.fixture(params=BACKENDS)
def backend(request):
    with backends.use(request.param):
        yield request.param


def numbers(*shape, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g).to(dtype)


def labels_of(n, vocabulary, ignored=True):
    labels = torch.arange(n) * 37 % vocabulary
    if ignored:
        labels[::5] = -100
    return labels


def with_gradients(function, *leaves):
    """What the function makes of the leaves, and the gradients of all its differentiable values."""
    leaves = [x.clone().requires_grad_() for x in leaves]
    found = [x for x in function(*leaves) if isinstance(x, torch.Tensor)]
    total = sum((x * numbers(*x.shape, seed=9)).sum() for x in found if x.requires_grad)
    return [x.detach() for x in found], torch.autograd.grad(total, leaves)


OUTPUTS = ("entropy", "mean_logit", "is_top1", "log_sum_sq_probs")


def head(budget, dtype):
    data = numbers(TOKENS, WIDTH, dtype=dtype), numbers(VOCABULARY, WIDTH, seed=1, dtype=dtype)
    labels = labels_of(TOKENS, VOCABULARY)
    return lambda: with_gradients(
        lambda h, w: dr.linear_token_logprobs(h, w, labels, outputs=OUTPUTS, memory_budget=budget),
        *data,
    )


def logits(dtype):
    data, labels = numbers(TOKENS, VOCABULARY, dtype=dtype), labels_of(TOKENS, VOCABULARY)
    return lambda: with_gradients(lambda x: dr.token_logprobs(x, labels, outputs=OUTPUTS), data)


def pairs(text):
    groups = torch.arange(PAIRS) % 3 if text.startswith("group") else None
    four = [10 * numbers(PAIRS, seed=s) for s in range(4)]
    return lambda: with_gradients(
        lambda *x: dr.preference_loss(*x, ambiguity=text, groups=groups), *four
    )


def policy(dtype=torch.int64):
    logps, labels = -numbers(PAIRS, 9).abs(), torch.ones(PAIRS, 9, dtype=torch.int64)
    mask, advantages, rewards = labels.bool(), numbers(PAIRS, seed=2), numbers(PAIRS, seed=3)
    ids = (torch.arange(PAIRS) // 4).to(dtype)
    return lambda: with_gradients(
        lambda x: dr.policy_loss(x, logps, advantages, rewards, ids, mask=mask, ambiguity="tv:0.3"),
        logps + 0.1 * numbers(PAIRS, 9, seed=4),
    )


RUNS = {
    "linear_token_logprobs, slab kept": head(1 << 40, torch.bfloat16),
    "linear_token_logprobs, recomputed": head(0, torch.bfloat16),
    "linear_token_logprobs, float32": head(None, torch.float32),
    "token_logprobs, bfloat16": logits(torch.bfloat16),
    "token_logprobs, float32": logits(torch.float32),
    "sequence_logprobs": lambda: with_gradients(
        lambda x: (dr.sequence_logprobs(x, labels_of(60, 7).view(6, 10)),), numbers(6, 10)
    ),
    "linear_preference_loss": lambda: with_gradients(
        lambda h, w: dr.linear_preference_loss(
            h, w, labels_of(48, 61).view(8, 6), torch.zeros(8), ambiguity="kl:0.1"
        ),
        numbers(8, 6, 16),
        numbers(61, 16, seed=1),
    ),
    "reward_loss": lambda: with_gradients(
        lambda a, b: dr.reward_loss(a, b, ambiguity="cvar:0.3"), numbers(9), numbers(9, seed=1)
    ),
    "policy_loss": policy(),
    **{
        f"preference_loss, {text}": pairs(text)
        for text in ("erm", "tv:0.1", "kl:0.2", "chi2:0.5", "cvar:0.3,trim=0.05", "group:3")
    },
}


@pytest.mark.parametrize("name", RUNS)
def test_equal_bits_from_run_to_run(backend, name):
    if name not in backends.SERVED[backend] and name == "policy_loss":
        pytest.skip(f"{backend} has none")
    first = RUNS[name]()
    for _ in range(1 if SLOW else 2):
        for a, b in zip((*first[0], *first[1]), (*(again := RUNS[name]())[0], *again[1])):
            assert torch.equal(a, b)


def test_equal_bits_in_either_dtype_of_prompt_ids(backend):
    if "policy_loss" not in backends.SERVED[backend]:
        pytest.skip(f"{backend} has none")
    for a, b in zip(*((*found[0], *found[1]) for found in (policy()(), policy(torch.int32)()))):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_logits_does_not_depend_on_the_others(backend, dtype):
    x, labels = numbers(TOKENS, VOCABULARY, dtype=dtype), labels_of(TOKENS, VOCABULARY, False)
    everyone = dr.token_logprobs(x, labels, outputs=OUTPUTS)
    some = torch.tensor([3, 40, 41, 76])
    alone = dr.token_logprobs(x[some], labels[some], outputs=OUTPUTS)
    for a, b in zip(everyone, alone):
        assert a is None or torch.equal(a[some], b)


@pytest.mark.skipif(not (SLOW or DEVICE == "cuda"), reason="of a kernel with tiles of its own")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_of_tritons_head_does_not_depend_on_the_others(dtype):
    """The library's products, which the other backends take, choose their order by their size."""
    if "triton" not in BACKENDS:
        pytest.skip("no Triton here")
    h, w = numbers(TOKENS, WIDTH, dtype=dtype), numbers(VOCABULARY, WIDTH, seed=1, dtype=dtype)
    labels = labels_of(TOKENS, VOCABULARY, False)
    some = torch.tensor([3, 40, 41, 76])
    with backends.use("triton"):
        everyone = dr.linear_token_logprobs(h, w, labels, outputs=OUTPUTS)
        alone = dr.linear_token_logprobs(h[some], w, labels[some], outputs=OUTPUTS)
    for a, b in zip(everyone, alone):
        assert a is None or torch.equal(a[some], b)
