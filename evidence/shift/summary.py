"""The findings that README.md and docs/ of the repository show: tables made from `results/`.

``python -m tools.generated --write`` puts them there. Whatever the tables advise follows from the
findings by a rule: a method is recommended for a shift where it helped there, else plain training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from drrlhf.bench.table import markdown
from evidence.shift import findings as found
from evidence.shift import page, radius
from evidence.shift.dpo import DPO_METHODS
from evidence.shift.findings import BASE, DPO_FAMILIES, FAMILIES, Finding, Record
from evidence.shift.methods import METHODS

SHIFTS = {
    "unseen": "reward model, a domain never trained on",
    "rare": "reward model, a domain that is 5 % of training",
    "votes": "reward model, noisy training labels, tested on clean ones",
    "clean": "reward model, the same pairs with clean labels",
    "wide": "reward model, trained on clear pairs, tested on close ones",
    "close": "reward model, trained on close pairs, tested on clear ones",
    "dpo-far": "DPO, a rare domain and two never trained on",
    "dpo-votes": "DPO, noisy training labels, tested on clean ones",
}
RULES = {"groups": "`--group-by domain`", "bootstrap": "bootstrap of the training pairs"}


def tables(results: Path) -> dict[str, str]:
    """{name of a block: markdown} of everything that `results` says."""
    _, records, dpo, suggestions = page.load(results)
    kinds = ((records, FAMILIES), (dpo, DPO_FAMILIES))
    return {
        "shift": _shifts(kinds),
        "shift_helped": _helped(kinds),
        "shift_hurt": _hurt(kinds),
        "shift_calibration": _calibration(kinds),
        "shift_methods": _methods(),
        "shift_strength": _strength(records),
        "suggest_radius": _coverage(records, suggestions),
    }


Kinds = Sequence[tuple[Sequence[Record], Sequence[str]]]


def _shift(family: str) -> str:
    return f"`{family}`: {SHIFTS[family]}"


def _measured(records: Sequence[Record], family: str, measure: str) -> dict[str, Finding]:
    return found.findings(found.table(records, family, measure))


def _points(one: Finding) -> str:
    return f"{100 * one.difference:+.1f}"


def _named(all_of: Mapping[str, Finding], word: str) -> list[str]:
    """Methods of one word, the largest difference first."""
    names = [name for name, one in all_of.items() if one.word == word]
    return sorted(names, key=lambda name: -abs(all_of[name].difference))


def _list(all_of: Mapping[str, Finding], word: str) -> str:
    return ", ".join(f"`{name}` {_points(all_of[name])}" for name in _named(all_of, word)) or "none"


def _advice(all_of: Mapping[str, Finding]) -> str:
    return " or ".join(f"`{name}`" for name in _named(all_of, "helps")) or "plain training"


def _shifts(kinds: Kinds) -> str:
    """Rows: a shift. Cells: who gained and who lost mean accuracy, and what follows from it."""
    rows = []
    for records, families in kinds:
        for family in families:
            out = _measured(records, family, "out")
            rows.append(
                (_shift(family), _list(out, "helps"), _list(out, "hurts"), _advice(out)),
            )
    return markdown(("shift", "gained accuracy", "lost accuracy", "use"), rows)


def _helped(kinds: Kinds) -> str:
    """Rows: every method that helped. Cells: what it gained, and what it cost elsewhere."""
    rows = []
    for records, families in kinds:
        for family in families:
            all_of = {
                measure: _measured(records, family, measure) for measure in ("out", "worst", "in")
            }
            for name in _named(all_of["out"], "helps"):
                cells = [_interval(one[name]) for one in all_of.values()]
                rows.append((_shift(family), f"`{name}`", *cells))
    return markdown(
        ("shift", "method", "shifted domains", "worst domain", "domains trained on"), rows
    )


def _interval(one: Finding) -> str:
    mark = "**" if one.word != "nothing" else ""
    return f"{mark}{_points(one)}{mark} [{100 * one.low:+.1f}, {100 * one.high:+.1f}]"


def _hurt(kinds: Kinds) -> str:
    """Rows: a method. Cells: the shifts on which it lost accuracy, and the loss."""
    lost: dict[str, list[str]] = {}
    for records, families in kinds:
        for family in families:
            out = _measured(records, family, "out")
            for name in out:
                lost.setdefault(name, [])
            for name in _named(out, "hurts"):
                lost[name].append(f"`{family}` {_points(out[name])}")
    rows = [(f"`{name}`", ", ".join(cells) or "none") for name, cells in lost.items()]
    return markdown(("method", "lost accuracy on"), rows)


def _calibration(kinds: Kinds) -> str:
    """Rows: a shift. Cells: whose negative log-likelihood under it became better or worse."""
    rows = []
    for records, families in kinds:
        for family in families:
            values = found.table(records, family, "out nll")
            less = found.findings({name: -of for name, of in values.items()})
            cells = [
                ", ".join(f"`{name}` {-less[name].difference:+.2f}" for name in _named(less, word))
                or "none"
                for word in ("helps", "hurts")
            ]
            rows.append((_shift(family), *cells))
    return markdown(("shift", "better (nats)", "worse (nats)"), rows)


def _methods() -> str:
    rows = []
    for name, configs in METHODS.items():
        tried = ", ".join(f"`{text}`" for text in dict.fromkeys(c.ambiguity for c in configs))
        rows.append((f"`{name}`", tried, f"`{DPO_METHODS[name]}`" if name in DPO_METHODS else "–"))
    others = [name for name in DPO_METHODS if name not in METHODS]
    rows += [(f"`{name}`", "–", f"`{DPO_METHODS[name]}`") for name in others]
    return markdown(("method", "reward models (chosen by validation)", "DPO (not tuned)"), rows)


def _strength(records: Sequence[Record]) -> str:
    """Rows: a set and a strength. Cells: mean accuracy under each shift minus that of erm, both at
    the lower of the two learning rates."""
    rate = min(config.lr for config in METHODS[BASE])
    grid = {name: [asdict(config) for config in configs] for name, configs in METHODS.items()}
    rows = []
    for method in radius.FAMILIES:
        for index, config in enumerate(METHODS[method]):
            if config.lr == rate:
                gains = (found.gain_of(records, f, method, index, grid) for f in FAMILIES)
                rows.append((f"`{config.ambiguity}`", *(f"{100 * g.mean():+.1f}" for g in gains)))
    return markdown(("set", *(f"`{family}`" for family in FAMILIES)), rows)


def _coverage(records: Sequence[Record], suggestions: Sequence[Record]) -> str:
    """Rows: a rule. Cells: in how many runs its radius covered the loss under a harder shift, the
    median radius, and on which shifts training at it made a difference."""
    harder = [
        family
        for family in FAMILIES
        if radius.losses(suggestions, family)[0] < radius.losses(suggestions, family)[1]
    ]
    trained = {
        family: found.findings(radius.suggested(records, suggestions, family, "out"))
        for family in FAMILIES
    }
    rows = []
    for rule, title in RULES.items():
        shares = [f"{radius.coverage(suggestions, f, rule, 'tv')[0]:.0%}" for f in harder]
        median = radius.coverage(suggestions, None, rule, "tv")[1]
        name = f"tv by {rule}"
        effects = [
            ", ".join(f"`{f}`" for f, all_of in trained.items() if all_of[name].word == word)
            or "none"
            for word in ("helps", "hurts")
        ]
        rows.append((title, f"`{median}`", *shares, *effects))
    head = ("rule", "median radius", *(f"covered `{family}`" for family in harder))
    return markdown((*head, "training at it helped", "training at it hurt"), rows)
