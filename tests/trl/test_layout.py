"""Layouts of rows by their definition: what each token sees, and where it comes from."""

from __future__ import annotations

import itertools
import random

import pytest

pytest.importorskip("transformers")

import torch

from drrlhf.layouts import layout
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
        before = set(range(block.before, block.before_stop))
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


def fewest(sequences):
    """Tokens of the shortest row, by trying every way to put the sequences into groups."""

    def common(group):
        columns = zip(*group, strict=False)
        return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))

    def partitions(items):
        if not items:
            yield []
            return
        first, *rest = items
        for some in partitions(rest):
            yield [[first], *some]
            for i, group in enumerate(some):
                yield [*some[:i], [first, *group], *some[i + 1 :]]

    return min(
        sum(map(len, sequences)) - sum((len(g) - 1) * common(g) for g in way)
        for way in partitions(sequences)
    )


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
    assert len(layout.shared(ids, mask).tokens) == fewest(sequences)


def test_a_pair_and_a_group():
    prompt, other = list(range(10, 20)), list(range(40, 44))
    sequences = [[*prompt, 1], [*other, 5, 6], [*prompt, 2, 3], [*other, 7]]
    ids, mask = batch(sequences)
    found = layout.shared(ids, mask)
    assert ids.flatten()[found.tokens].tolist() == [*prompt, 1, 2, 3, *other, 5, 6, 7]
    assert found.positions.tolist() == [*range(11), 10, 11, *range(6), 4]
    assert found.blocks == (
        (0, 10, 0, 0),
        (10, 11, 0, 10),
        (11, 13, 0, 10),
        (13, 17, 13, 13),
        (17, 19, 13, 17),
        (19, 20, 13, 17),
    )
    assert found.saved == pytest.approx(14 / 34)


def test_a_beginning_that_all_have_is_not_bought_with_the_prompts():
    """A system prompt of two tokens before long prompts: each prompt once, not the two tokens."""
    prompts = [[1, 2, *range(10 * k, 10 * k + 9)] for k in (1, 3, 5)]
    sequences = [[*prompt, answer] for prompt in prompts for answer in (7, 8, 9)]
    found = layout.shared(*batch(sequences))
    assert len(found.tokens) == 3 * (11 + 3)


def test_equal_sequences_lie_there_once():
    ids, mask = batch([[5, 6, 7], [5, 6, 7], [5, 6]])
    found = layout.shared(ids, mask)
    hold(found, ids, mask)
    assert ids.flatten()[found.tokens].tolist() in ([5, 6, 7], [5, 6, 7, 7])
