"""Write README.md and its plots from the results: ``python -m benchmarks.ood.page``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ood import radius
from benchmarks.ood.findings import (
    BASE,
    DPO_FAMILIES,
    FAMILIES,
    Finding,
    Record,
    by_method,
    findings,
    read,
    table,
)
from drrlhf.report import BLUE, VERMILION

HERE = Path(__file__).parent
SAID = {
    "unseen": "a domain never trained on",
    "rare": "a domain that is 5 % of training",
    "votes": "labels of single votes, tested on clean ones",
    "clean": "the same without the noise",
    "wide": "trained on wide gaps, tested on narrow ones",
    "close": "trained on narrow gaps, tested on wide ones",
    "dpo-far": "a rare domain and two never trained on",
    "dpo-votes": "labels of single votes, tested on clean ones",
}
ACCURACIES = {"out": "mean under shift", "worst": "worst domain", "in": "in domain"}
CALIBRATION = {
    "out nll": "negative log-likelihood",
    "out ece": "calibration error",
    "out brier": "Brier score",
}
_NOTHING = "made no difference that these seeds can show"


def page(
    header: Mapping[str, Any],
    records: Sequence[Record],
    dpo: Sequence[Record] = (),
    suggestions: Sequence[Record] = (),
) -> str:
    """The text of README.md."""
    seeds = len({record["seed"] for record in records})
    parts = [
        "# Does robust training pay under shift?",
        f"Generated from `results/` by `python -m benchmarks.ood.page`; the protocol is in "
        f"[PROTOCOL.md](PROTOCOL.md), written before the runs. {seeds} paired seeds; "
        f"{header['preference']}",
        "Differences are to `erm`, in points of accuracy where nothing else is said, with the 95 % "
        "interval over seeds; bold, and in the words: p < 0.05 after Holm's correction over the "
        "methods. `erm` itself is given in per cent.",
        "## Reward models",
        *_results(records, FAMILIES, "differences"),
    ]
    if dpo:
        runs = len({record["seed"] for record in dpo})
        parts += ["## DPO", f"SmolLM2's first 8 layers, {runs} paired seeds, nothing tuned.",
                  *_results(dpo, DPO_FAMILIES, "dpo")]  # fmt: skip
    if suggestions:
        parts += ["## A radius by `drrlhf suggest-radius`", *_chooser(records, suggestions)]
    parts += [
        "## Dose and response (exploration)",
        "Mean accuracy under shift of every configuration of the reward models minus that of `erm` "
        "as chosen, in points; nothing here was chosen by validation.",
        _doses(header, records, _there(records, FAMILIES)),
    ]
    return "\n\n".join(parts) + "\n"


def _there(records: Sequence[Record], families: Sequence[str]) -> list[str]:
    return [one for one in families if table(records, one, "out")]


def _results(records: Sequence[Record], families: Sequence[str], name: str) -> list[str]:
    """Words, plot and tables of one kind of model."""
    families = _there(records, families)
    return [
        *(_words(records, family) for family in families),
        f"![difference to erm by method and shift](plots/{name}.png)",
        *(
            _table(records, measure, families, title, 100, "{:.1f}", "{:+.1f}")
            for measure, title in ACCURACIES.items()
        ),
        "Calibration under shift; less is better.",
        *(
            _table(records, measure, families, title, 1, "{:.3f}", "{:+.3f}")
            for measure, title in CALIBRATION.items()
        ),
    ]


def _chooser(records: Sequence[Record], suggestions: Sequence[Record]) -> list[str]:
    """How often a suggestion covered what came, and what training with it brought."""
    families = _there(records, FAMILIES)
    covered = {}
    for rule in radius.RULES:
        for family in radius.FAMILIES:
            found = [radius.coverage(suggestions, one, rule, family) for one in [*families, None]]
            covered[f"{family} by {rule}"] = [f"{share:.0%} ({text})" for share, text in found]
    cells: dict[str, dict[str, list[str]]] = {"out": {}, "worst": {}}
    for measure, kept in cells.items():
        for family in families:
            values = radius.suggested(records, suggestions, family, measure)
            for name, one in findings(values).items():
                kept.setdefault(name, []).append(_cell(one, 100, "{:+.1f}"))
    return [
        "Share of runs in which the worst case over the validation pairs, at the suggested radius, "
        "covered the mean loss under shift; in brackets the median suggestion.",
        _rows([*families, "all"], covered, "covered"),
        "Trained at the tried strength that is nearest to the suggestion, against `erm`:",
        *(_rows(families, kept, ACCURACIES[measure]) for measure, kept in cells.items()),
    ]


def _words(records: Sequence[Record], family: str) -> str:
    """One paragraph a shift: who helps, who hurts, and that the rest does nothing; and the same of
    the worst domain."""
    mean, worst = (_said(findings(table(records, family, m))) for m in ("out", "worst"))
    return f"**{family}**, {SAID[family]}: {mean}. In the worst domain: {worst}."


def _said(found: Mapping[str, Finding]) -> str:
    by_word: dict[str, list[str]] = {"helps": [], "hurts": [], "nothing": []}
    for method, one in sorted(found.items(), key=lambda item: -item[1].difference):
        number = f" ({100 * one.difference:+.1f} points)" if one.word != "nothing" else ""
        by_word[one.word].append(f"`{method}`{number}")
    return "; ".join(
        f"{', '.join(by_word[word])} {verb}"
        for word, verb in (("helps", "helped"), ("hurts", "hurt"), ("nothing", _NOTHING))
        if by_word[word]
    )


def _rows(families: Sequence[str], cells: Mapping[str, Sequence[str]], title: str) -> str:
    head = f"| {title} | {' | '.join(families)} |"
    lines = [head, "|---" * (len(families) + 1) + "|"]
    return "\n".join(lines + [f"| {name} | {' | '.join(row)} |" for name, row in cells.items()])


def _table(
    records: Sequence[Record], measure: str, families: Sequence[str], title: str, scale: float,
    plain: str, signed: str,
) -> str:  # fmt: skip
    cells: dict[str, list[str]] = {}
    for family in families:
        values = table(records, family, measure)
        cells.setdefault(BASE, []).append(plain.format(scale * values[BASE].mean()))
        for method, one in findings(values).items():
            # A method may be left out of a family.
            row = cells.setdefault(method, [])
            row += ["–"] * (families.index(family) - len(row)) + [_cell(one, scale, signed)]
    for row in cells.values():
        row += ["–"] * (len(families) - len(row))
    return _rows(families, cells, title)


def _cell(one: Finding, scale: float, signed: str) -> str:
    difference, low, high = (signed.format(scale * x) for x in one[1:4])
    mark = "**" if one.word != "nothing" else ""
    return f"{mark}{difference}{mark} [{low}, {high}]"


def _doses(header: Mapping[str, Any], records: Sequence[Record], families: Sequence[str]) -> str:
    base = {family: table(records, family, "out")[BASE] for family in families}
    cells = {}
    for method, grid in header["grid"].items():
        for index, config in enumerate(grid):
            if method != BASE:
                name = f"{method}: {config['ambiguity']}, lr {config['lr']:g}"
                if config["balanced"]:
                    name += f", weight decay {config['weight_decay']:g}"
                row = [table(records, family, "out", {method: index}) for family in families]
                cells[name] = [
                    f"{100 * (found[method] - base[family]).mean():+.1f}"
                    for found, family in zip(row, families)
                ]
    return _rows(families, cells, "configuration")


def plot(records: Sequence[Record], families: Sequence[str], path: Path) -> None:
    """A panel a shift: differences to erm with intervals, under shift and in domain."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    families = _there(records, families)
    figure = Figure(figsize=(2.1 * len(families) + 1, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(families), sharey=True, squeeze=False)[0]
    methods = [one for one in table(records, families[0], "out") if one != BASE]
    for panel, family in zip(panels, families):
        for shift, (measure, color, marker) in enumerate(
            (("out", VERMILION, "o"), ("in", BLUE, "s"))
        ):
            found = findings(table(records, family, measure))
            for method, one in found.items():
                height = methods.index(method)
                panel.errorbar(
                    100 * one.difference, height + 0.2 * shift - 0.1,
                    xerr=[[100 * (one.difference - one.low)], [100 * (one.high - one.difference)]],
                    fmt=marker, color=color, markersize=4, capsize=2,
                    label=ACCURACIES[measure] if not height else None,
                )  # fmt: skip
        panel.axvline(0, color="black", linewidth=1)
        panel.set_yticks(range(len(methods)), methods)
        panel.set_title(f"{family}\n{SAID[family]}", fontsize=7)
        panel.grid(axis="x", alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2, frameon=False)
    figure.supxlabel("accuracy above erm, points, 95 % interval over paired seeds", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--output", type=Path, default=HERE)
    options = parser.parse_args()
    header, records = read(options.results / "reward.jsonl")
    more = {name: read(path)[1] if (path := options.results / f"{name}.jsonl").is_file() else []
            for name in ("dpo", "radius")}  # fmt: skip
    dpo = by_method(more["dpo"])
    plot(records, FAMILIES, options.output / "plots" / "differences.png")
    if dpo:
        plot(dpo, DPO_FAMILIES, options.output / "plots" / "dpo.png")
    text = page(header, records, dpo, more["radius"])
    (options.output / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
