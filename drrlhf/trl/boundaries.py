"""Where the answers of a row begin, so that its forms combine as TRL would cut each two of them.

The last token of a prompt may merge with the first one of an answer. TRL's DPO then lets both
answers of the row begin before it: at the first token in which the prompt differs from it and
either of them. A combination of two forms that lay in different rows begins where a row of these
two would, so that a form may be needed with several beginnings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import NamedTuple

from drrlhf.transformations import SIDES

Ids = Mapping[str, Sequence[int]]  # a row's columns of token ids
PROMPT_IDS = "prompt_ids"


class Cut(NamedTuple):
    """A row of those given, by ``number``, with answers that begin at another token, or the same;
    which of the two are needed so; and where each would begin for itself."""

    number: int
    ids: dict[str, list[int]]
    needed: tuple[bool, bool]
    alone: tuple[int, int]


def begins(ids: Ids) -> int:
    """Where the answers of a row begin; 0 where they are read whole."""
    return len(ids.get(PROMPT_IDS, ()))


def cuts(rows: Sequence[Ids]) -> Iterator[Cut]:
    """Rows of one prompt, each as often as its answers begin differently beside those of others.

    The prompt is known as far as the row goes that has most of it.
    """
    prompt = max((row[PROMPT_IDS] for row in rows), key=len)
    whole = [[[*row[PROMPT_IDS], *row[f"{side}_ids"]] for side in SIDES] for row in rows]
    alone = [
        (_in_common(prompt, chosen), _in_common(prompt, rejected)) for chosen, rejected in whole
    ]
    sides = list(zip(*alone, strict=True))
    for number, (texts, own) in enumerate(zip(whole, alone, strict=True)):
        needed = [
            {min(mine, one) for one in others}
            for mine, others in zip(own, reversed(sides), strict=True)
        ]
        for at in sorted(set.union(*needed)):
            ids = {PROMPT_IDS: list(prompt[:at])}
            ids |= {f"{side}_ids": text[at:] for side, text in zip(SIDES, texts, strict=True)}
            yield Cut(number, ids, (at in needed[0], at in needed[1]), own)


def _in_common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two sequences begin with."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
