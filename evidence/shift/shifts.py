"""The scenarios of PROTOCOL.md: what is trained on, what is tested, and the pairs of both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from drrlhf.demo.sentiment import DOMAINS, Pair, Text, make_pairs

RARE_SHARE = 0.05
NEXT = dict(zip(("movie", "tweets", "amazon", "nyt"), ("tweets", "amazon", "nyt", "movie")))


@dataclass(frozen=True)
class Kind:
    """How pairs are made: rated ``gap`` to ``below`` apart, labels of single votes if ``noisy``."""

    gap: float = 1.0
    below: float = math.inf
    noisy: bool = False


CLEAN, WIDE, CLOSE = Kind(), Kind(gap=2.0), Kind(gap=0.5, below=1.0)
ALL_GAPS, VOTES = Kind(gap=0.25), Kind(gap=0.25, noisy=True)


class Test(NamedTuple):
    """Pairs of one domain to test on; ``like_training`` ones are in-domain."""

    domain: str
    kind: Kind
    like_training: bool

    @property
    def name(self) -> str:
        return f"{self.domain}/{'in' if self.like_training else 'out'}"


@dataclass(frozen=True)
class Scenario:
    """One shift. ``train`` maps domains to their share of the training pairs, of kind ``kind``."""

    name: str
    family: str
    train: Mapping[str, float]
    kind: Kind
    tests: tuple[Test, ...]


def _mixed(name: str, kind: Kind, shifted: Kind) -> Scenario:
    """All domains in equal parts, tested on pairs of the same kind and of another."""
    tests = [Test(domain, kind, True) for domain in DOMAINS]
    tests += [Test(domain, shifted, False) for domain in DOMAINS]
    return Scenario(name, name, dict.fromkeys(DOMAINS, 1 / len(DOMAINS)), kind, tuple(tests))


def _unseen(held_out: str) -> Scenario:
    seen = [domain for domain in DOMAINS if domain != held_out]
    tests = tuple(Test(domain, CLEAN, domain != held_out) for domain in DOMAINS)
    share = dict.fromkeys(seen, 1 / len(seen))
    return Scenario(f"unseen-{held_out}", "unseen", share, CLEAN, tests)


def _far(main: str, rare: str) -> Scenario:
    """Tested on the main domain, the rare one, and those never trained on."""
    tests = [Test(domain, CLEAN, domain == main) for domain in DOMAINS]
    share = {main: 1 - RARE_SHARE, rare: RARE_SHARE}
    return Scenario("dpo-far", "dpo-far", share, CLEAN, tuple(tests))


def _rare(main: str, rare: str) -> Scenario:
    share = {main: 1 - RARE_SHARE, rare: RARE_SHARE}
    tests = (Test(main, CLEAN, True), Test(rare, CLEAN, False))
    return Scenario(f"rare-{main}-{rare}", "rare", share, CLEAN, tests)


SCENARIOS: Sequence[Scenario] = (
    *(_unseen(domain) for domain in DOMAINS),
    *(_rare(main, rare) for main, rare in NEXT.items()),
    _mixed("votes", VOTES, CLEAN),
    _mixed("clean", ALL_GAPS, CLEAN),
    _mixed("wide", WIDE, CLOSE),
    _mixed("close", CLOSE, WIDE),
)
DPO_SCENARIOS: Sequence[Scenario] = (
    _far("movie", "tweets"),
    _mixed("dpo-votes", VOTES, CLEAN),
)


@dataclass(frozen=True)
class Sizes:
    """Pairs: to train on in all, to validate and to test on in each domain."""

    train: int = 4000
    val: int = 1000
    test: int = 2000


class Drawn(NamedTuple):
    """Pairs as rows of a table of embeddings: (n, 2) chosen and rejected, and P(chosen) (n,)."""

    rows: Tensor
    human: Tensor


class Drawing(NamedTuple):
    """All pairs of one scenario and seed; ``groups`` (n,) are the domains of the training pairs."""

    train: Drawn
    groups: Tensor
    val: Mapping[str, Drawn]
    test: Mapping[str, Drawn]


Splits = Mapping[str, Mapping[str, Sequence[Text]]]


def draw(
    scenario: Scenario, splits: Splits, rows: Mapping[str, int], seed: int, sizes: Sizes
) -> Drawing:
    """The pairs of a scenario; ``rows`` gives each text's place in the table of embeddings."""

    def drawn(split: str, domain: str, n: int, kind: Kind) -> Drawn:
        pairs: list[Pair] = make_pairs(
            splits[split][domain], n, seed=seed, gap=kind.gap, below=kind.below, noisy=kind.noisy
        )
        return Drawn(
            torch.tensor([[rows[pair.chosen], rows[pair.rejected]] for pair in pairs]),
            torch.tensor([pair.human for pair in pairs]),
        )

    numbers = {domain: round(share * sizes.train) for domain, share in scenario.train.items()}
    train = [drawn("train", domain, n, scenario.kind) for domain, n in numbers.items()]
    return Drawing(
        Drawn(torch.cat([one.rows for one in train]), torch.cat([one.human for one in train])),
        torch.arange(len(numbers)).repeat_interleave(torch.tensor(list(numbers.values()))),
        {domain: drawn("val", domain, sizes.val, scenario.kind) for domain in scenario.train},
        {one.name: drawn("test", one.domain, sizes.test, one.kind) for one in scenario.tests},
    )
