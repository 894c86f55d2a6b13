"""Which sequences lie where in a row of tokens, and who may look at whom.

A padded batch gives a model every sequence in a row of its own. Here all of them lie in one row
without padding, and sequences that begin alike may share what they have in common: a prompt stands
there once, and behind it the rest of each sequence, blind to the others. A causal model whose
attention and positions follow the layout computes for every token what it computes for it alone:
a token sees the tokens before it in its own sequence, at the positions that they have there.

Whose prompts are equal is read off the tokens, so that preference pairs, several pairs of one
prompt and groups of completions are one case; and where tokens merge at the seam of prompt and
answer, only what is really equal is shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Block(NamedTuple):
    """Tokens ``start`` to ``stop`` of the row, which belong to the same sequences. They see
    themselves, causally, and all tokens ``before`` to ``before_stop``: the prefix that is theirs.
    """

    start: int
    stop: int
    before: int
    before_stop: int


@dataclass(frozen=True)
class Layout:
    """n sequences of N tokens in all, which came padded as (n, L), in a row of T <= N tokens.

    ``tokens`` (T,) is where in the flattened (n, L) each token of the row comes from;
    ``positions`` (T,) its place in its sequence, from 0; ``places`` (n, L) where in the row the
    token of a sequence lies, -1 for padding; ``blocks`` who may look at whom.
    """

    tokens: Tensor
    positions: Tensor
    places: Tensor
    blocks: tuple[Block, ...]
    total: int  # N

    @property
    def saved(self) -> float:
        """The share of the sequences' tokens that the row does without, 1 - T / N."""
        return 1 - len(self.tokens) / max(self.total, 1)


def seen_by(tensor: Tensor, block: Block) -> Tensor:
    """What a block sees of the keys or values of a row (a, b, T, width), in order."""
    own = tensor[:, :, block.start : block.stop]
    if block.before == block.before_stop:
        return own
    if block.before_stop == block.start:  # right before it
        return tensor[:, :, block.before : block.stop]
    return torch.cat([tensor[:, :, block.before : block.before_stop], own], dim=2)


def causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor | None:
    """Which keys (queries, keys) each query sees, of queries that are the last of the keys: those
    up to its own, of them the last ``window``; None is all. Without a mask (None) where kernels
    know it by themselves: as many queries as keys, and no window that matters."""
    if queries == keys and (window is None or keys <= window):
        return None
    ones = torch.ones(queries, keys, dtype=torch.bool, device=device)
    seen = ones.tril(keys - queries)
    return seen if window is None else seen & ~ones.tril(keys - queries - window)


def packed(input_ids: Tensor, attention_mask: Tensor) -> Layout:
    """One sequence after the other; the ids and the mask are (n, L), padded anywhere."""
    return _laid_out([[i] for i in range(len(input_ids))], attention_mask, None)


def shared(input_ids: Tensor, attention_mask: Tensor) -> Layout:
    """As `packed`, with common beginnings once, so that the row is as short as it can be where
    every sequence shares at most one beginning."""
    sequences = _sequences(input_ids, attention_mask)
    order = sorted(range(len(sequences)), key=lambda i: _in_order(sequences[i]))
    common = [_common(sequences[a], sequences[b]) for a, b in pairwise(order)]
    groups, prefixes = [], []
    for start, stop in _cuts(common):
        groups.append(sorted(order[start:stop]))
        prefixes.append(min(common[start : stop - 1], default=0))
    by_first = sorted(range(len(groups)), key=lambda g: groups[g][0])
    return _laid_out([groups[g] for g in by_first], attention_mask, [prefixes[g] for g in by_first])


def _cuts(common: Sequence[int]) -> list[tuple[int, int]]:
    """How to cut sequences in lexicographic order into groups [start, stop), each of which has its
    common beginning once: the cut that saves the most tokens.

    ``common`` are the tokens that neighbours have in common. A group of k saves (k - 1) times what
    all of them have in common; in lexicographic order no better groups exist than runs.
    """
    n = len(common) + 1
    saved, first = [0] * (n + 1), [0] * (n + 1)  # of the first j sequences; where the last begins
    for stop in range(1, n + 1):
        saved[stop], first[stop] = saved[stop - 1], stop - 1
        all_have = common[stop - 2] if stop > 1 else 0
        for start in range(stop - 2, -1, -1):
            all_have = min(all_have, common[start])
            if not all_have:
                break
            found = saved[start] + (stop - start - 1) * all_have
            if found > saved[stop]:
                saved[stop], first[stop] = found, start
    cuts = []
    stop = n
    while stop:
        cuts.append((first[stop], stop))
        stop = first[stop]
    return cuts[::-1]


def _laid_out(
    groups: Sequence[Sequence[int]], attention_mask: Tensor, prefixes: Sequence[int] | None
) -> Layout:
    mask = attention_mask.cpu().bool().numpy()
    length = mask.shape[1]
    places = np.full(mask.shape, -1)
    tokens: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    blocks: list[Block] = []
    end = 0

    def put(where: np.ndarray, position: int, before: int, before_stop: int) -> None:
        nonlocal end
        if len(where):
            tokens.append(where)
            positions.append(np.arange(position, position + len(where)))
            blocks.append(Block(end, end + len(where), before, before_stop))
            end += len(where)

    for group, prefix in zip(groups, prefixes or [0] * len(groups), strict=True):
        start = end
        for number, i in enumerate(group):
            columns = mask[i].nonzero()[0]
            if not number:
                put(i * length + columns[:prefix], 0, start, start)
            places[i, columns[:prefix]] = np.arange(start, start + prefix)
            places[i, columns[prefix:]] = np.arange(end, end + len(columns) - prefix)
            put(i * length + columns[prefix:], prefix, start, start + prefix)

    def on_device(parts: Sequence[np.ndarray]) -> Tensor:
        whole = np.concatenate(parts) if parts else np.zeros(0, np.int64)
        return torch.from_numpy(whole).to(attention_mask.device)

    return Layout(
        on_device(tokens),
        on_device(positions),
        torch.from_numpy(places).to(attention_mask.device),
        tuple(blocks),
        int(mask.sum()),
    )


def _sequences(input_ids: Tensor, attention_mask: Tensor) -> list[np.ndarray]:
    ids, mask = input_ids.cpu().numpy(), attention_mask.cpu().bool().numpy()
    return [row[kept] for row, kept in zip(ids, mask, strict=True)]


def _in_order(sequence: np.ndarray) -> bytes:
    """Bytes that compare as the sequences of ids do, and as fast."""
    return sequence.astype(">u4").tobytes()


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens two sequences have in common at their beginning."""
    length = min(len(one), len(other))
    differ = one[:length] != other[:length]
    return int(differ.argmax()) if differ.any() else length
