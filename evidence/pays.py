"""What pays: one row for each thing that training or picking may use, from the kept results.

``python -m tools.generated --write`` puts the table into README.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from drrlhf.bench.table import markdown
from evidence.best_of import summary as best_of
from evidence.labels import summary as labels
from evidence.labels.run import REWARD
from evidence.shift import findings, page
from evidence.shift.findings import DPO_FAMILIES, FAMILIES, SURE
from evidence.tables import difference, kept, sure
from evidence.views import summary as views

EXAMPLES = ("tv", "kl", "chi2", "cvar")
KNOWN_GROUPS = ("balanced", "group")
NOTHING = "no significant difference"


def table() -> str:
    """Markdown. Rows: what is chosen, or known. Cells: what it bought, and where that is told."""
    _, records, dpo, _ = page.load(page.HERE / "results")
    viewed = kept("views/results/reward.jsonl")
    rows = [
        (
            "an adversary over examples (`tv`, `kl`, `chi2`, `cvar`), in reward models",
            _over_shifts(records, FAMILIES, EXAMPLES),
            "[shifts](docs/sets.md)",
        ),
        (
            "groups that are known (`group`, or equal weights)",
            _over_shifts(records, FAMILIES, KNOWN_GROUPS),
            "[shifts](docs/sets.md)",
        ),
        (
            "an adversary over examples, in DPO",
            _over_shifts(dpo, DPO_FAMILIES, EXAMPLES),
            "[shifts](docs/sets.md)",
        ),
        (
            "the share of three votes as `label_probs`, in reward models",
            _of_labels(kept("labels/results/labels.jsonl")),
            "[labels](evidence/labels/README.md)",
        ),
        (
            "eight reward models in place of one, in best of 256",
            _of_models(kept("best_of/results/best_of.jsonl")),
            "[best of n](evidence/best_of/README.md)",
        ),
        *(
            (what, _of_views(of, method), "[views](evidence/views/README.md)")
            for of, method, what in (
                (viewed, "worst", "an adversary over the form of a pair (`views`), reward models"),
                (viewed, "worst-wide", "the same with 16 kinds of views in place of 5"),
                (viewed, "worst-group", "the same with 5, under a set over known groups"),
                (kept("views/results/dpo.jsonl"), "worst", "the same with 5, in DPO"),
            )
        ),
    ]
    return markdown(("what is used", "what it bought, ten paired seeds", "more"), rows)


def _over_shifts(
    records: Sequence[Mapping[str, Any]], families: Sequence[str], methods: Sequence[str]
) -> str:
    """The sure gains of accuracy by shift, in points, and how many losses there are."""
    gains: list[tuple[float, str]] = []
    losses: list[tuple[float, str]] = []
    for family in families:
        found = findings.findings(findings.table(records, family, "out"))
        for name, one in found.items():
            if name not in methods or one.p >= SURE:
                continue
            into = gains if one.difference > 0 else losses
            into.append(
                (100 * one.difference, f"`{name}` {100 * one.difference:+.1f} on `{family}`")
            )
    gained = ", ".join(text for _, text in sorted(gains, reverse=True)) or "no gain"
    if not losses:
        return gained
    return f"{gained}; significant losses: {len(losses)}, the largest {-min(losses)[0]:.1f} points"


def _of_labels(records: Sequence[Mapping[str, Any]]) -> str:
    """Of a reward model: soft labels over plain ones, and over the majority of as many votes; only
    what is sure."""
    parts = []
    for base, what in (("plain", "one vote"), ("majority", "the majority of as many votes")):
        cells = {}
        for measure in ("accuracy", "brier"):
            found = labels.values(records, REWARD, measure)
            cells[measure] = difference(found, base, labels.AGAINST[base])["soft"]
        known = sure(cells)
        named = [
            text.format(known[measure])
            for measure, text in (("accuracy", "{} points"), ("brier", "Brier {}"))
            if measure in known
        ]
        parts.append(f"{', '.join(named) or NOTHING} over {what}")
    return "; ".join(parts)


def _of_models(records: Sequence[Mapping[str, Any]]) -> str:
    """The mean of all and their worst case, over single models and over one that has seen the
    labels of all; gold scores, and what is lost from the best n. What is sure."""
    names = {"mean": "their mean", "min": "their worst case"}
    _, curves = best_of.curves(records, "real")
    parts = []
    for base, what in (
        (best_of.SINGLE, "one of them"),
        (best_of.POOLED, "one model with the labels of all"),
    ):
        told = []
        for measure, called in zip(best_of.MEASURES, ("gold score", "fall"), strict=True):
            known = sure(difference(best_of.measured(curves, measure), base, best_of.COMBINED))
            named = [f"{known[how]} by {words}" for how, words in names.items() if how in known]
            told += [f"{called} {', '.join(named)}"] if named else []
        parts.append(f"over {what}: {', '.join(told) or NOTHING}")
    return "; ".join(parts)


def _of_views(records: Sequence[Mapping[str, Any]], method: str) -> str:
    """Of a model trained on the worst view: pairs that stay right under every change that was not
    trained on, and pairs as they are, by how often it has seen their domain. What is sure, over
    what the method is compared with."""
    seeds = views.complete(records)
    if len(seeds) < views.SEEDS:
        return f"being measured ({len(seeds)} of {views.SEEDS} seeds)"
    against = views.compared_with(seeds[0])
    bases = (("plain", "no views"), ("augment-long", "augmentation at equal compute"))
    measures = (("right", "pairs right in every form"), ("clean", "as they are"))
    parts = []
    for base, what in bases:
        if method not in against[base]:
            continue
        told = []
        for measure, called in measures:
            cells = {}
            for group in views.DOMAINS:
                found = views.values(seeds, group, measure)
                cells[group] = difference(found, base, against[base])[method]
            named = [f"{mean} ({group})" for group, mean in sure(cells).items()]
            told += [f"{called} {', '.join(named)}"] if named else []
        parts.append(f"over {what}: {', '.join(told) or NOTHING}")
    return "; ".join(parts)
