"""Which sequences lie where in a row of tokens, and who may look at whom.

A padded batch gives a model every sequence in a row of its own. Here all of them lie in one row
without padding, and sequences that begin alike may share what they have in common: a prompt stands
there once, and behind it the rest of each sequence, blind to the others. A causal model whose
attention and positions follow the layout computes for every token what it computes for it alone:
a token sees the tokens before it in its own sequence, at the positions that they have there.

What sequences have in common is read off the tokens, so that preference pairs, several pairs of
one prompt, groups of completions and changed forms of an answer are one case; and where tokens
merge at the seam of prompt and answer, only what is really equal is shared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Block(NamedTuple):
    """Tokens ``start`` to ``stop`` of the row, which belong to the same sequences. They see
    themselves, causally, and the beginning that their sequences have in common with others, which
    lies in at most two pieces: all tokens ``before`` to ``before_stop``, and behind these all
    tokens ``then`` to ``then_stop``.
    """

    start: int
    stop: int
    before: int = 0
    before_stop: int = 0
    then: int = 0
    then_stop: int = 0

    def seen(self) -> list[tuple[int, int]]:
        """From where to where it sees, in order, itself last; pieces that adjoin are one."""
        pieces: list[tuple[int, int]] = []
        for start, stop in (self[2:4], self[4:6], self[:2]):
            if start < stop and pieces and pieces[-1][1] == start:
                pieces[-1] = pieces[-1][0], stop
            elif start < stop:
                pieces.append((start, stop))
        return pieces

    @property
    def beginning(self) -> int:
        """How many tokens it sees besides itself."""
        return self.before_stop - self.before + self.then_stop - self.then


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
    pieces = [tensor[:, :, start:stop] for start, stop in block.seen()]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


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
    row = _Row(attention_mask)
    for i in range(len(input_ids)):
        row.add(i, [])
    return row.layout()


def shared(input_ids: Tensor, attention_mask: Tensor) -> Layout:
    """As `packed`, with common beginnings once: a prompt of several answers, and what answers have
    in common behind it.

    Sequences come in their order, and each takes its beginning from where one before it lies, of
    those the one that spares it the most tokens.
    """
    sequences = _sequences(input_ids, attention_mask)
    row = _Row(attention_mask)
    for family, common in _families(sequences):
        paths: dict[int, list[tuple[int, int]]] = {}  # where sequences of the family lie
        for i in sorted(family):
            known: list[tuple[int, int]] = []
            place, least = family.index(i), _least(len(sequences[i]))
            for step in (-1, 1):  # what it has in common with others only falls away from it
                shared_by, other = len(sequences[i]), place
                while 0 <= other + step < len(family):
                    shared_by = min(shared_by, common[max(other, other + step)])
                    if shared_by <= _size(known):
                        break
                    other += step
                    found = _beginning(paths.get(family[other], []), shared_by, least)
                    known = max(known, found, key=_size)
            paths[i] = row.add(i, known)
    return row.layout()


def _families(sequences: Sequence[np.ndarray]) -> Iterator[tuple[list[int], list[int]]]:
    """Sequences that begin alike, in lexicographic order, where they are neighbours; and how many
    tokens each has in common with the one before it. Families come as their first sequences do."""
    order = sorted(range(len(sequences)), key=lambda i: _in_order(sequences[i]))
    families: list[tuple[list[int], list[int]]] = []
    for k, i in enumerate(order):
        common = _common(sequences[order[k - 1]], sequences[i]) if k else 0
        if common < _least(len(sequences[i])):
            families.append(([], []))
        families[-1][0].append(i)
        families[-1][1].append(common)
    yield from sorted(families, key=lambda family: min(family[0]))


def _size(pieces: Sequence[tuple[int, int]]) -> int:
    return sum(stop - start for start, stop in pieces)


def _least(length: int) -> int:
    """How many tokens of a sequence are worth a piece of their own: one call of attention more."""
    return max(1, length // 16)


def _beginning(path: Sequence[tuple[int, int]], common: int, least: int) -> list[tuple[int, int]]:
    """The first ``common`` tokens of a path, in at most two pieces, none too short."""
    pieces: list[tuple[int, int]] = []
    for start, stop in path[:2]:
        taken = min(stop - start, common)
        if taken < least:
            break
        pieces.append((start, start + taken))
        common -= taken
    return pieces


class _Row:
    """A row that grows by sequences of a mask (n, L)."""

    def __init__(self, attention_mask: Tensor) -> None:
        self._given = attention_mask
        self._mask = attention_mask.cpu().bool().numpy()
        self._places = np.full(self._mask.shape, -1)
        self._tokens: list[np.ndarray] = []
        self._positions: list[np.ndarray] = []
        self._blocks: list[Block] = []
        self._end = 0

    def add(self, i: int, beginning: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Put in sequence i, whose beginning lies in these pieces, and say where it lies now."""
        columns = self._mask[i].nonzero()[0]
        known = np.concatenate([np.arange(*piece) for piece in beginning] or [np.arange(0)])
        self._places[i, columns[: len(known)]] = known
        own = columns[len(known) :]
        if not len(own):
            return list(beginning)
        start, self._end = self._end, self._end + len(own)
        self._places[i, own] = np.arange(start, self._end)
        self._tokens.append(i * self._mask.shape[1] + own)
        self._positions.append(np.arange(len(known), len(columns)))
        self._blocks.append(Block(start, self._end, *(x for piece in beginning for x in piece)))
        return Block.seen(self._blocks[-1])

    @torch.inference_mode(False)  # a layout may be asked for again where gradients are wanted
    def layout(self) -> Layout:
        return Layout(
            self._on_device(self._tokens),
            self._on_device(self._positions),
            torch.from_numpy(self._places).to(self._given.device),
            tuple(self._blocks),
            int(self._mask.sum()),
        )

    def _on_device(self, parts: Sequence[np.ndarray]) -> Tensor:
        whole = np.concatenate(parts) if parts else np.zeros(0, np.int64)
        return torch.from_numpy(whole).to(self._given.device)


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
