"""Write README.md and its plots from the results: ``python -m benchmarks.ood.page``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ood.findings import (
    BASE,
    FAMILIES,
    Finding,
    Record,
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
}
ACCURACIES = {"out": "mean under shift", "worst": "worst domain", "in": "in domain"}
CALIBRATION = {
    "out nll": "negative log-likelihood",
    "out ece": "calibration error",
    "out brier": "Brier score",
}
_NOTHING = "made no difference that these seeds can show"


def page(header: Mapping[str, Any], records: Sequence[Record]) -> str:
    """The text of README.md."""
    families = [one for one in FAMILIES if table(records, one, "out")]
    seeds = len({record["seed"] for record in records})
    parts = [
        "# Does robust training pay under shift?",
        f"Generated from `results/` by `python -m benchmarks.ood.page`; the protocol is in "
        f"[PROTOCOL.md](PROTOCOL.md), written before the runs. {seeds} paired seeds; "
        f"{header['preference']}",
        "## In words",
        *(_words(family, findings(table(records, family, "out"))) for family in families),
        "![difference to erm by method and shift](plots/differences.png)",
        "## Accuracy",
        "Points above or below `erm` with the 95 % interval over seeds; bold: p < 0.05 after "
        "Holm's correction over the methods. `erm` is given in per cent.",
        *(_accuracy_table(records, measure, families) for measure in ACCURACIES),
        "## Calibration under shift",
        "Differences to `erm`, which is given as it is; less is better.",
        *(_calibration_table(records, measure, families) for measure in CALIBRATION),
        "## Dose and response (exploration)",
        "Mean accuracy under shift of every configuration minus that of `erm` as chosen, in "
        "points; nothing here was chosen by validation.",
        _doses(header, records, families),
    ]
    return "\n\n".join(parts) + "\n"


def _words(family: str, found: Mapping[str, Finding]) -> str:
    """One paragraph a shift: who helps, who hurts, and that the rest does nothing."""
    by_word: dict[str, list[str]] = {"helps": [], "hurts": [], "nothing": []}
    for method, one in sorted(found.items(), key=lambda item: -item[1].difference):
        number = f" ({100 * one.difference:+.1f} points)" if one.word != "nothing" else ""
        by_word[one.word].append(f"`{method}`{number}")
    said = [
        f"{', '.join(by_word[word])} {verb}"
        for word, verb in (("helps", "helped"), ("hurts", "hurt"), ("nothing", _NOTHING))
        if by_word[word]
    ]
    return f"**{family}**, {SAID[family]}: {'; '.join(said)}."


def _rows(families: Sequence[str], cells: Mapping[str, Sequence[str]], title: str) -> str:
    head = f"| {title} | {' | '.join(families)} |"
    lines = [head, "|---" * (len(families) + 1) + "|"]
    return "\n".join(lines + [f"| {name} | {' | '.join(row)} |" for name, row in cells.items()])


def _accuracy_table(records: Sequence[Record], measure: str, families: Sequence[str]) -> str:
    return _table(records, measure, families, ACCURACIES[measure], 100, "{:.1f}", "{:+.1f}")


def _calibration_table(records: Sequence[Record], measure: str, families: Sequence[str]) -> str:
    return _table(records, measure, families, CALIBRATION[measure], 1, "{:.3f}", "{:+.3f}")


def _table(
    records: Sequence[Record], measure: str, families: Sequence[str], title: str, scale: float,
    plain: str, signed: str,
) -> str:  # fmt: skip
    cells: dict[str, list[str]] = {}
    for family in families:
        values = table(records, family, measure)
        cells.setdefault(BASE, []).append(plain.format(scale * values[BASE].mean()))
        for method, one in findings(values).items():
            difference, low, high = (signed.format(scale * x) for x in one[1:4])
            mark = "**" if one.word != "nothing" else ""
            cells.setdefault(method, []).append(f"{mark}{difference}{mark} [{low}, {high}]")
    return _rows(families, cells, title)


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


def plot(records: Sequence[Record], path: Path) -> None:
    """A panel a shift: differences to erm with intervals, under shift and in domain."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    families = [one for one in FAMILIES if table(records, one, "out")]
    figure = Figure(figsize=(12.5, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(families), sharey=True, squeeze=False)[0]
    for panel, family in zip(panels, families):
        for shift, (measure, color, marker) in enumerate(
            (("out", VERMILION, "o"), ("in", BLUE, "s"))
        ):
            found = findings(table(records, family, measure))
            for height, one in enumerate(found.values()):
                panel.errorbar(
                    100 * one.difference, height + 0.2 * shift - 0.1,
                    xerr=[[100 * (one.difference - one.low)], [100 * (one.high - one.difference)]],
                    fmt=marker, color=color, markersize=4, capsize=2,
                    label=ACCURACIES[measure] if not height else None,
                )  # fmt: skip
        panel.axvline(0, color="black", linewidth=1)
        panel.set_yticks(range(len(found)), list(found))
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
    parser.add_argument("--results", type=Path, default=HERE / "results" / "reward.jsonl")
    parser.add_argument("--output", type=Path, default=HERE)
    options = parser.parse_args()
    header, records = read(options.results)
    plot(records, options.output / "plots" / "differences.png")
    (options.output / "README.md").write_text(page(header, records), encoding="utf-8")


if __name__ == "__main__":
    main()
