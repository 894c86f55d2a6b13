"""Preference pairs from human sentiment ratings, in four domains.

The ratings are Hutto and Gilbert's (ICWSM 2014): 23,703 texts (tweets, sentences of movie reviews,
of product reviews, of newspaper editorials), each rated from -4 to +4 by 15 to 99 people. **The
preference is derived**: people rated single texts, and the prompt ("Write a positive ...") is ours;
of two texts of one domain, the one that people rated higher is the preferred answer. Whoever shows
a figure made from these pairs should say so (`DERIVED` is the sentence).

What is set aside: texts said before (same words, whatever the case, in any domain), and tweets
whose single votes do not give the published mean. In those, some 200, the votes belong to an
emphatic rewording ("YAY!!!") of the text that is listed.

Texts are split by document (an amazon or nyt id is ``document_sentence``; a tweet or a movie
snippet is a document of its own), so no document has texts in two splits.
"""

from __future__ import annotations

import json
import math
import random
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from statistics import fmean

from drrlhf.demo.material import DOMAIN_FILES, fetch

DOMAINS = tuple(DOMAIN_FILES)
# Of the demonstrations: trained on, a little of it and none of it.
MAIN, RARE, UNSEEN = "movie", "tweets", ("amazon", "nyt")
TESTED = (MAIN, RARE, *UNSEEN)
RARE_SHARE = 0.05
SPLITS = {"train": 0.6, "val": 0.15, "test": 0.25}
PROMPTS = {
    "tweets": "Write a positive tweet.",
    "movie": "Write a positive sentence for a movie review.",
    "amazon": "Write a positive sentence for a product review.",
    "nyt": "Write a positive sentence for a newspaper editorial.",
}
DERIVED = (
    "Preference derived from human sentiment ratings of single texts (Hutto & Gilbert 2014); "
    "the prompts are ours."
)


@dataclass(frozen=True)
class Text:
    """One rated text. ``votes`` are single people's ratings, ``rating`` is their mean."""

    domain: str
    document: str
    text: str
    rating: float
    votes: tuple[int, ...]


@dataclass(frozen=True)
class Pair:
    """Two texts of one domain, ``chosen`` the preferred one.

    ``human`` is P(chosen preferred): of a random vote for each text, the chance that the chosen
    one's is higher, ties counted half.
    """

    prompt: str
    chosen: str
    rejected: str
    domain: str
    human: float


def load_texts(folder: Path) -> list[Text]:
    """The texts of all domains in ``folder``, as `material.fetch("sentiment")` gives it."""
    seen: set[str] = set()
    texts = []
    for domain, stem in DOMAIN_FILES.items():
        votes = {
            key: json.loads(listed)
            for key, _, _, listed in _records(folder / f"{stem}_anonDataRatings.txt")
        }
        for key, mean, text in _records(folder / f"{stem}_GroundTruth.txt"):
            text = " ".join(text.split())
            said_before = text.casefold() in seen
            if said_before or not text or abs(fmean(votes[key]) - float(mean)) > 0.01:
                continue
            seen.add(text.casefold())
            document = key.split("_")[0]
            texts.append(Text(domain, document, text, float(mean), tuple(votes[key])))
    return texts


def _records(path: Path) -> Iterable[list[str]]:
    lines = path.read_text(encoding="utf-8-sig").replace("\r", "").split("\n")
    return (line.split("\t") for line in lines if line.strip())


def split_texts(texts: Iterable[Text], seed: int = 0) -> dict[str, dict[str, list[Text]]]:
    """``{split: {domain: texts}}`` with the documents of each domain dealt out by `SPLITS`."""
    of_document: dict[str, dict[str, list[Text]]] = {domain: {} for domain in DOMAINS}
    for text in texts:
        of_document[text.domain].setdefault(text.document, []).append(text)
    result: dict[str, dict[str, list[Text]]] = {split: {} for split in SPLITS}
    for domain, documents in of_document.items():
        order = sorted(documents)
        random.Random(f"{seed}/{domain}").shuffle(order)
        edges = [round(edge * len(order)) for edge in accumulate(SPLITS.values())]
        for split, start, stop in zip(SPLITS, [0, *edges], edges, strict=False):
            result[split][domain] = [text for key in order[start:stop] for text in documents[key]]
    return result


def mixture_sizes(n: int) -> dict[str, int]:
    """How many of n come from each domain that is trained on; at least one from the rare one."""
    rare = max(1, round(RARE_SHARE * n))
    return {MAIN: n - rare, RARE: rare}


def make_pairs(
    texts: Sequence[Text],
    n: int,
    *,
    seed: int,
    gap: float = 1.0,
    below: float = math.inf,
    noisy: bool = False,
) -> list[Pair]:
    """``n`` different pairs of one domain's texts, an even sample of all rated ``gap`` or more, but
    less than ``below``, apart.

    The text with the higher mean rating is chosen. With ``noisy=True`` the label is that of one
    person a side instead: one vote is drawn for each text, anew while they tie, and the higher vote
    wins. Equal arguments give equal pairs. Raises `ValueError` when there are fewer than ``n``
    pairs.
    """
    if below <= gap:
        raise ValueError(f"below must be more than gap={gap:g}; got {below:g}")
    ranked = sorted(texts, key=lambda text: (text.rating, text.text))
    ratings = [text.rating for text in ranked]
    # The partners of text i are ranked[first[i]:stop[i]]; so all pairs have a number, and a sample
    # of numbers is an even sample of pairs.
    first = [bisect_left(ratings, rating + gap - 1e-9) for rating in ratings]
    stop = [bisect_left(ratings, rating + below - 1e-9) for rating in ratings]
    last = list(accumulate(high - low for low, high in zip(first, stop)))
    total = last[-1] if last else 0
    if n > total:
        raise ValueError(f"n must be at most {total}, the pairs {gap:g} apart there are; got {n}")
    rng = random.Random(seed)
    pairs = []
    for number in rng.sample(range(total), n):
        low = bisect_left(last, number + 1)
        high = stop[low] - (last[low] - number)
        pairs.append(_pair(ranked[high], ranked[low], rng if noisy else None))
    return pairs


def _pair(high: Text, low: Text, rng: random.Random | None) -> Pair:
    better, worse = vote_chances(high, low)
    human = better + (1 - better - worse) / 2
    if rng is not None and rng.random() * (better + worse) >= better:
        high, low, human = low, high, 1 - human
    return Pair(PROMPTS[high.domain], high.text, low.text, high.domain, human)


def vote_chances(a: Text, b: Text) -> tuple[float, float]:
    """The chances that a random vote for ``a`` is above, and below, a random vote for ``b``."""
    votes, n = sorted(b.votes), len(a.votes) * len(b.votes)
    above = sum(bisect_left(votes, vote) for vote in a.votes)
    below = sum(len(votes) - bisect_left(votes, vote + 1) for vote in a.votes)
    return above / n, below / n


@cache
def _fetched(folder: Path, seed: int) -> dict[str, dict[str, list[Text]]]:
    return split_texts(load_texts(folder), seed)


def load_split(split: str, domain: str) -> list[Text]:
    """The fetched texts of one split of a domain; the split of the documents is always the same."""
    return _fetched(fetch("sentiment"), 0)[split][domain]


def load_pairs(
    split: str,
    domains: Sequence[str] = DOMAINS,
    n: int = 1000,
    seed: int = 0,
    *,
    noisy: bool = False,
) -> list[Pair]:
    """``n`` pairs in all, dealt evenly over ``domains``, of one split of the fetched texts.

    The split of the documents is one and the same for every ``seed``; the pairs depend on it.
    """
    for value, known, name in [
        (split, SPLITS, "split"),
        *((d, DOMAINS, "domain") for d in domains),
    ]:
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")
    texts = _fetched(fetch("sentiment"), 0)[split]
    shares = [n // len(domains) + (i < n % len(domains)) for i in range(len(domains))]
    return [
        pair
        for domain, share in zip(domains, shares, strict=True)
        for pair in make_pairs(texts[domain], share, seed=seed, noisy=noisy)
    ]


def preference_rows(
    split: str, domains: Sequence[str] = DOMAINS, n: int = 1000, seed: int = 0
) -> list[dict[str, str | int]]:
    """`load_pairs` as rows in TRL's format, shuffled: prompt, chosen, rejected, domain, group.

    ``group`` is the domain's index in ``domains``. The completions start with a space, as text that
    follows a prompt does.
    """
    pairs = load_pairs(split, domains, n, seed)
    random.Random(seed).shuffle(pairs)
    return [
        {
            "prompt": pair.prompt,
            "chosen": f" {pair.chosen}",
            "rejected": f" {pair.rejected}",
            "domain": pair.domain,
            "group": list(domains).index(pair.domain),
        }
        for pair in pairs
    ]
