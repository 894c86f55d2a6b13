"""Labels, groups, prompt ids and boundaries of every integer dtype are the numbers that they hold.

A narrow tensor that is compared with a number turns the number into its own dtype: 256 is 0 in
uint8, and -100 is 156.
"""

from __future__ import annotations

import pytest
import torch
from three_ways import BACKENDS

import drrlhf as dr
from drrlhf import backends

pytestmark = pytest.mark.usual

UNSIGNED = [torch.uint8, torch.uint16, torch.uint32]
SIGNED = [torch.int8, torch.int16, torch.int32]
IGNORED = -100
# A dtype, a vocabulary that it cannot count to, and labels that it can hold.
LABELS = [(dtype, torch.iinfo(dtype).max + 1) for dtype in (torch.uint8, torch.int8)] + [
    (torch.uint16, 50257),
    (torch.int16, 50257),
    (torch.uint32, 50257),
    (torch.int32, 50257),
]


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    with backends.use(request.param):
        yield request.param


def labels_of(dtype, vocabulary):
    """The least and the largest; 156, which is -100 in uint8; an ignored one if there can be."""
    limits = torch.iinfo(dtype)
    numbers = [0, 7, min(vocabulary - 1, limits.max), min(156, limits.max)]
    numbers += [IGNORED] * (limits.min < 0)
    return torch.tensor(numbers, dtype=torch.long)


def plain(logits, labels):
    rows = torch.arange(len(labels))
    found = torch.log_softmax(logits.double(), -1)[rows, labels.clamp(min=0)]
    return torch.where(labels == IGNORED, 0, found).float()


@pytest.mark.parametrize("dtype, vocabulary", LABELS)
def test_labels(dtype, vocabulary):
    labels = labels_of(dtype, vocabulary)
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(len(labels), 3, generator=g)
    weight = torch.randn(vocabulary, 3, generator=g)
    logits = hidden @ weight.T
    expected = plain(logits, labels)
    narrow = labels.to(dtype)
    torch.testing.assert_close(dr.token_logprobs(logits, narrow), expected)
    torch.testing.assert_close(dr.linear_token_logprobs(hidden, weight, narrow), expected)
    # The upstream gradient of an ignored one goes nowhere.
    leaf = logits.clone().requires_grad_()
    dr.token_logprobs(leaf, narrow).sum().backward()
    rows = torch.softmax(logits, -1).neg()
    rows[torch.arange(len(labels)), labels.clamp(min=0)] += 1
    torch.testing.assert_close(leaf.grad, rows * (labels != IGNORED).unsqueeze(1))


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge"])
@pytest.mark.parametrize("dtype, vocabulary", LABELS[:2])
def test_labels_of_pairs(dtype, vocabulary, loss_type):
    """In one op, and composed."""
    g = torch.Generator().manual_seed(0)
    labels = torch.stack([labels_of(dtype, vocabulary), labels_of(dtype, vocabulary).flip(0)])
    hidden = torch.randn(*labels.shape, 3, generator=g)
    weight = torch.randn(vocabulary, 3, generator=g)
    logits = hidden @ weight.T
    sums = torch.stack([plain(*row).sum() for row in zip(logits, labels)])
    margin = sums[0] - sums[1]
    expected = (
        -torch.nn.functional.logsigmoid(margin)
        if loss_type == "sigmoid"
        else torch.relu(1 - margin)
    )
    found = dr.linear_preference_loss(
        hidden, weight, labels.to(dtype), torch.zeros(2), beta=1.0, loss_type=loss_type
    )
    torch.testing.assert_close(found.loss, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [*UNSIGNED, *SIGNED])
def test_labels_of_sequences(dtype):
    labels = labels_of(dtype, 1 << 20)
    counted = labels != IGNORED
    logps = torch.arange(1.0, len(labels) + 1).neg()
    expected = (logps * counted).sum().reshape(1)
    row, narrow = logps.unsqueeze(0).requires_grad_(), labels.to(dtype)
    found = dr.sequence_logprobs(row, narrow.unsqueeze(0))
    torch.testing.assert_close(found, expected)
    found.backward()
    torch.testing.assert_close(row.grad, counted.float().unsqueeze(0))
    mean = dr.sequence_logprobs(row, narrow.unsqueeze(0), reduction="mean")
    torch.testing.assert_close(mean, expected / counted.sum())


@pytest.mark.parametrize("dtype, groups", [(torch.uint8, 256), (torch.int8, 200)])
def test_groups(dtype, groups):
    ids = torch.tensor([0, 100, 127, 100])
    losses = torch.tensor([1.0, 2.0, 4.0, 6.0])
    ambiguity = dr.Group(groups, step_size=0.0)  # the groups that are there weigh alike
    risk = dr.robust_risk(losses, ambiguity, groups=ids.to(dtype))
    torch.testing.assert_close(risk.weights, torch.tensor([1 / 3, 1 / 6, 1 / 3, 1 / 6]))


@pytest.mark.parametrize("dtype", [*UNSIGNED, *SIGNED])
@pytest.mark.parametrize("told", [True, False])
def test_prompts(backend, dtype, told):
    if "policy_loss" not in backends.SERVED[backend]:
        pytest.skip(f"{backend} leaves policy_loss to others")
    prompts = 128
    logps = -torch.ones(prompts, 2)
    advantages, rewards = torch.arange(128.0), torch.arange(128.0)
    ids = torch.arange(prompts).to(dtype)
    options = {"num_prompts": prompts} if told else {}
    # Each ratio is 1: the mean over prompts of -A.
    out = dr.policy_loss(logps, None, advantages, rewards, ids, loss_type="grpo", **options)
    assert out.loss.item() == pytest.approx(-63.5) and out.losses.tolist() == (-rewards).tolist()


@pytest.mark.parametrize("dtype", [*UNSIGNED, *SIGNED])
def test_boundaries(dtype):
    logps, labels = torch.ones(100), torch.zeros(100, dtype=torch.long)
    found = dr.sequence_logprobs(logps, labels, cu_seqlens=torch.tensor([0, 3, 100]).to(dtype))
    assert found.tolist() == [3.0, 97.0]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_boundaries_that_end_a_turn_before_the_tokens(dtype):
    """300 is 44 in eight bits."""
    logps, labels = torch.ones(300), torch.zeros(300, dtype=torch.long)
    with pytest.raises(ValueError, match="cu_seqlens: expected boundaries from 0 to 300"):
        dr.sequence_logprobs(logps, labels, cu_seqlens=torch.tensor([0, 44], dtype=dtype))


def test_one_graph_without_breaks():
    labels = labels_of(torch.uint8, 256)
    logits = torch.randn(len(labels), 256, generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(dr.token_logprobs, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits, labels.to(torch.uint8)), plain(logits, labels))


def test_what_is_no_integer_is_refused():
    with pytest.raises(ValueError, match=r"labels: expected an integer dtype, got torch.float32"):
        dr.sequence_logprobs(torch.ones(1, 2), torch.ones(1, 2))
