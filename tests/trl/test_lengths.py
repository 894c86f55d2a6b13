"""Padded batches in two parts of like lengths: the numbers of one batch, and the best cut."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

import torch
from transformers import AutoModelForSequenceClassification
from trl_fixtures import tiny_encoder_dir, tiny_reward_dir

from drrlhf.layouts import lengths


def batch(sizes, left=False, pad=0):
    """Ids (n, L) without padding tokens among them, and their mask."""
    width, draws = max(sizes), torch.Generator().manual_seed(0)
    ids = torch.randint(5, 30, (len(sizes), width), generator=draws)
    place = torch.arange(width)
    mask = (place < torch.tensor(sizes)[:, None]).long()
    if left:
        mask = mask.flip(1)
    return {"input_ids": ids.where(mask == 1, pad), "attention_mask": mask}


class Counting(torch.nn.Module):
    """A model that keeps the shapes that it is called with."""

    def __init__(self, model):
        super().__init__()
        self.model, self.shapes = model, []

    def forward(self, **given):
        self.shapes.append(tuple(given["input_ids"].shape))
        return self.model(**given)


@pytest.fixture(scope="module", params=["encoder", "decoder"])
def model(request, tmp_path_factory):
    make = tiny_encoder_dir if request.param == "encoder" else tiny_reward_dir
    found = AutoModelForSequenceClassification.from_pretrained(make(tmp_path_factory.mktemp("m")))
    return found.eval()


def test_scores_and_gradients_are_those_of_one_batch(model):
    given = batch([3, 12, 4, 2, 11, 3], pad=model.config.pad_token_id)
    counting = Counting(model)
    found = []
    for called in (model, lengths.TwoParts(counting)):
        model.zero_grad()
        logits = called(**given, use_cache=False).logits
        (logits.squeeze(-1) * torch.arange(1.0, 7)).sum().backward()
        every = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append((logits.detach(), torch.cat(every)))
    assert counting.shapes == [(4, 4), (2, 12)]
    (one, one_gradient), (two, two_gradient) = found
    assert one.std() > 1e-3
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(two_gradient, one_gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "given",
    [
        batch([5, 5, 5]),
        batch([7]),
        batch([9, 10, 10]),
        batch([2, 9, 9], left=True),
        batch([2, 9, 9]) | {"pixels": torch.zeros(3, 2)},
    ],
    ids=["equal", "one", "nearly", "left", "unknown"],
)
def test_what_stays_one_batch(given):
    asked = []
    lengths.TwoParts(lambda **given: asked.append(given))(**given)
    assert len(asked) == 1 and asked[0] == given


def test_no_cut_has_fewer_tokens():
    draws = torch.Generator().manual_seed(0)
    cut = 0
    for count in range(1, 12):
        sizes = torch.randint(0, 20, (count,), generator=draws).tolist()
        width = max(*sizes, 1)
        mask = (torch.arange(width) < torch.tensor(sizes)[:, None]).long()
        ranked = sorted(sizes)
        tokens = [i * ranked[i - 1] + (count - i) * ranked[-1] for i in range(1, count)]
        found = lengths.split(mask)
        if found is None:
            assert all(one > 0.9 * count * width for one in tokens)
            continue
        short, long = ([sizes[i] for i in part] for part in found)
        assert sorted([*found[0].tolist(), *found[1].tolist()]) == list(range(count))
        assert len(short) * max(short) + len(long) * max(long) == min(tokens)
        cut += 1
    assert cut > 4
