"""Layouts of rows by their definition: what each token sees, and where it comes from."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("transformers")

import torch

from drrlhf.layouts import layout
from drrlhf.layouts.layout import Block
from drrlhf.reward_inputs import padded


def batch(sequences, pad=0, left=False):
    found = padded([torch.tensor(one, dtype=torch.long) for one in sequences], pad, "cpu")
    ids, mask = found["input_ids"], found["attention_mask"]
    if not left:
        return ids, mask
    kept = [row[m.bool()] for row, m in zip(ids, mask, strict=True)]
    ids, mask = torch.full_like(ids, pad), torch.zeros_like(mask)
    for i, one in enumerate(kept):
        if len(one):
            ids[i, -len(one) :], mask[i, -len(one) :] = one, 1
    return ids, mask


def seen(found):
    """Which tokens of the row each token of it sees, from the blocks: sets, by place."""
    by_place = {}
    for block in found.blocks:
        before = {*range(block.before, block.before_stop), *range(block.then, block.then_stop)}
        for place in range(block.start, block.stop):
            by_place[place] = before | set(range(block.start, place + 1))
    return by_place


def hold(found, ids, mask):
    """A layout's definition, sequence by sequence, and nothing in the row that belongs to none."""
    row, sees, used = ids.flatten()[found.tokens], seen(found), set()
    for one, kept, places in zip(ids, mask.bool(), found.places, strict=True):
        assert bool((places[~kept] == -1).all())
        mine = places[kept].tolist()
        assert row[mine].tolist() == one[kept].tolist()
        assert found.positions[mine].tolist() == list(range(len(mine)))
        for i, place in enumerate(mine):
            assert sees[place] == set(mine[: i + 1])
        used |= set(mine)
    assert used == set(range(len(found.tokens))) == set(sees)
    assert found.total == int(mask.sum())


def beginnings(sequences):
    """How many different beginnings sequences have: the tokens of the shortest row there is."""
    return len({tuple(one[: i + 1]) for one in sequences for i in range(len(one))})


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_random_batches(seed, left):
    draw = random.Random(seed)
    sequences = [
        [draw.randrange(1 + seed % 3) for _ in range(draw.randrange(0 if seed % 5 else 1, 9))]
        for _ in range(draw.randrange(1, 7))
    ]
    ids, mask = batch(sequences, left=left)
    for kind in (layout.packed, layout.shared):
        hold(kind(ids, mask), ids, mask)
    assert len(layout.packed(ids, mask).tokens) == sum(map(len, sequences))
    found = layout.shared(ids, mask)
    shortest = beginnings(sequences)
    if all(block.then == block.then_stop for block in found.blocks):  # two pieces were never full
        assert len(found.tokens) == shortest
    assert shortest <= len(found.tokens) <= sum(map(len, sequences))


def test_a_pair_and_a_group():
    prompt, other = list(range(10, 20)), list(range(40, 44))
    sequences = [[*prompt, 1], [*other, 5, 6], [*prompt, 2, 3], [*other, 7]]
    ids, mask = batch(sequences)
    found = layout.shared(ids, mask)
    assert ids.flatten()[found.tokens].tolist() == [*prompt, 1, 2, 3, *other, 5, 6, 7]
    assert found.positions.tolist() == [*range(11), 10, 11, *range(6), 4]
    blocks = Block(0, 11), Block(11, 13, 0, 10), Block(13, 19), Block(19, 20, 13, 17)
    assert found.blocks == blocks
    assert found.saved == pytest.approx(14 / 34)


def test_forms_of_two_answers_share_what_each_begins_with():
    """Prompt, chosen and rejected answer, and of each a longer form and one that changes later."""
    prompt, chosen, rejected = list(range(20)), list(range(30, 40)), list(range(50, 60))
    sequences = [
        [*prompt, *answer]
        for one in (chosen, rejected)
        for answer in (one, [*one, 1, 2], [*one[:6], 7, *one[7:]])
    ]
    ids, mask = batch(sequences)
    found = layout.shared(ids, mask)
    hold(found, ids, mask)
    assert len(found.tokens) == 20 + 2 * (10 + 2 + 4) == beginnings(sequences)
    assert sum(block.then < block.then_stop for block in found.blocks) == 2  # of the second answer


def test_what_is_not_worth_a_piece_is_not_shared():
    """A piece costs a call of attention: of sequences of 48 tokens it has three at least."""
    one = list(range(10, 58))
    two, three = [10, 11, *range(60, 106)], [10, 11, 12, *range(110, 155)]
    assert len(layout.shared(*batch([one, two])).tokens) == 96
    assert len(layout.shared(*batch([one, three])).tokens) == 93
    answers = [one, [*one[:30], *range(200, 218)], [*one[:32], *range(300, 316)]]
    found = layout.shared(*batch(answers))
    assert len(found.tokens) == beginnings(answers)  # it lies where the one before lies
    assert all(len(block.seen()) <= 3 for block in found.blocks)


def test_a_beginning_that_all_have_is_not_bought_with_the_prompts():
    """A system prompt of two tokens before long prompts: each prompt once."""
    prompts = [[1, 2, *range(10 * k, 10 * k + 9)] for k in (1, 3, 5)]
    sequences = [[*prompt, answer] for prompt in prompts for answer in (7, 8, 9)]
    found = layout.shared(*batch(sequences))
    assert len(found.tokens) == 2 + 3 * (9 + 3)


def test_equal_sequences_lie_there_once():
    ids, mask = batch([[5, 6, 7], [5, 6, 7], [5, 6]])
    found = layout.shared(ids, mask)
    hold(found, ids, mask)
    assert ids.flatten()[found.tokens].tolist() in ([5, 6, 7], [5, 6, 7, 7])


@pytest.mark.parametrize("kind", ["packed", "shared"])
def test_a_layout_made_in_inference_mode_serves_gradients(kind):
    """The row of the last batch is kept, and may be asked for again where a model learns."""
    with torch.inference_mode():
        found = getattr(layout, kind)(*batch([[5, 6, 7], [5, 6, 8]]))
    table = torch.ones(9, 2, requires_grad=True)
    for places in (found.tokens, found.positions[None], found.places[:, :-1]):
        torch.nn.functional.embedding(places, table).sum().backward()
