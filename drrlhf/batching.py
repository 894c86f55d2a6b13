"""Batches of like length, so that little of them is padding, or of like beginning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def by_length(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Indices by falling length, cut by ``tokens`` with padding, at least one a batch: the slowest
    and largest come first, which is honest about the time and the memory it takes."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        stop = start + max(1, tokens // lengths[order[start]])
        yield order[start:stop]
        start = stop


def by_beginning(sequences: Sequence[Sequence[int]], tokens: int) -> Iterator[list[int]]:
    """Indices in lexicographic order, where sequences that begin alike are neighbours, cut by
    ``tokens`` in all, at least one a batch."""
    batch: list[int] = []
    taken = 0
    for i in sorted(range(len(sequences)), key=lambda i: tuple(sequences[i])):
        if batch and taken + len(sequences[i]) > tokens:
            yield batch
            batch, taken = [], 0
        batch.append(i)
        taken += len(sequences[i])
    if batch:
        yield batch
