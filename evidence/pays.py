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
from evidence.tables import difference, kept
from evidence.views import summary as views

EXAMPLES = ("tv", "kl", "chi2", "cvar")
KNOWN_GROUPS = ("balanced", "group")


def table() -> str:
    """Markdown. Rows: what is chosen, or known. Cells: what it bought, and where that is told."""
    _, records, dpo, _ = page.load(page.HERE / "results")
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
        (
            "an adversary over the form of a pair (`views`)",
            _of_views(kept("views/results/reward.jsonl")),
            "[views](evidence/views/README.md)",
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
    gained = ", ".join(text for _, text in sorted(gains, reverse=True)) or "no accuracy"
    if not losses:
        return gained
    return f"{gained}; sure losses: {len(losses)}, the largest {-min(losses)[0]:.1f} points"


def _of_labels(records: Sequence[Mapping[str, Any]]) -> str:
    """Of a reward model: soft labels over plain ones, and over the majority of as many votes; only
    what is sure."""
    parts = []
    for base, what in (("plain", "one vote"), ("majority", "the majority of as many votes")):
        cells = {}
        for measure in ("accuracy", "brier"):
            found = labels.values(records, REWARD, measure)
            cells[measure] = difference(found, base, labels.AGAINST[base])["soft"]
        sure = {
            measure: cell.split("**")[1] for measure, cell in cells.items() if cell.startswith("**")
        }
        named = [
            text.format(sure[measure])
            for measure, text in (("accuracy", "{} points"), ("brier", "Brier {}"))
            if measure in sure
        ]
        parts.append(f"{', '.join(named) or 'nothing'} over {what}")
    return "; ".join(parts)


def _of_models(records: Sequence[Mapping[str, Any]]) -> str:
    """The mean of all and their worst case, over single models and over one that has seen the
    labels of all; gold scores, and what is lost from the best n. What is sure."""
    names = {"mean": "their mean", "min": "their worst case"}
    _, curves = best_of.curves(records, "real")
    parts = []
    for base, what in ((best_of.SINGLE, "each"), (best_of.POOLED, "one with the labels of all")):
        told = []
        for measure, called in zip(best_of.MEASURES, ("gold score", "fall"), strict=True):
            cells = difference(best_of.measured(curves, measure), base, best_of.COMBINED)
            sure = [
                f"{names[how]} {cells[how].split('**')[1]}"
                for how in names
                if cells[how].startswith("**")
            ]
            told += [f"{called}: {', '.join(sure)}"] if sure else []
        parts.append(f"over {what}: {', '.join(told) or 'nothing sure'}")
    return "; ".join(parts)


def _of_views(records: Sequence[Mapping[str, Any]]) -> str:
    """Of a reward model: pairs that stay right under every change that was not trained on, in the
    domains that were; what is sure."""
    seeds = views.complete(records)
    if len(seeds) < views.SEEDS:
        return f"being measured ({len(seeds)} of {views.SEEDS} seeds)"
    found = views.values(seeds, "seen", "right")
    against = views.compared_with(found)
    parts = []
    for base, what in (("plain", "no views"), ("augment-long", "augmentation at equal compute")):
        cell = difference(found, base, against[base])["worst"]
        told = f"{cell.split('**')[1]} points" if cell.startswith("**") else "nothing sure"
        parts.append(f"{told} over {what}")
    return f"pairs right in every form: {', '.join(parts)}"
