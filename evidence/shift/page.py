"""Write README.md and its plots from the results: ``python -m evidence.shift.page``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from drrlhf.files import write_text
from drrlhf.report import BLUE, PALETTE, VERMILION, save
from evidence.shift import radius
from evidence.shift.findings import (
    BASE,
    DPO_FAMILIES,
    FAMILIES,
    Finding,
    Record,
    by_method,
    findings,
    gain_of,
    read,
    table,
)

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
_NOTHING = "made a difference that these seeds can show"


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
        f"Generated from `results/` by `python -m evidence.shift.page`; the protocol is in "
        f"[PROTOCOL.md](PROTOCOL.md), written before the runs. {seeds} paired seeds; "
        f"{header['preference']}",
        "Differences are to `erm`, in points of accuracy where nothing else is said, with the 95 % "
        "interval over seeds; bold, and in the words: p < 0.05 after Holm's correction over the "
        "methods. `erm` itself is given in per cent. Where all training domains are equally large, "
        "`balanced` is `erm`.",
        "## Reward models",
        *_results(records, FAMILIES, "differences"),
    ]
    if dpo:
        runs = len({record["seed"] for record in dpo})
        parts += [
            "## DPO",
            f"SmolLM2's first 8 layers, {runs} paired seeds, nothing tuned.",
            *_results(dpo, DPO_FAMILIES, "dpo"),
        ]
    if suggestions:
        parts += ["## A radius by `drrlhf suggest-radius`", *_chooser(records, suggestions)]
    parts += [
        "## Dose and response (exploration)",
        "Mean accuracy under shift of every configuration of the reward models minus that of `erm` "
        "with the same learning rate and weight decay, in points; nothing here was chosen by "
        "validation.",
        "![accuracy above erm by strength](plots/doses.png)",
        f"<details><summary>Every configuration</summary>\n\n"
        f"{_doses(header, records, _there(records, FAMILIES))}\n\n</details>",
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
    losses = [radius.losses(suggestions, one) for one in [*families, None]]
    covered = {"loss, validation to shift": [f"{a:.3f} to {b:.3f}" for a, b in losses]}
    harder = [one for one, (before, after) in zip(families, losses) if after > before]
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
        "covered the mean loss under shift; in brackets the median suggestion. It is put to the "
        f"test where the shift costs more than validation does: {', '.join(harder)}.",
        _rows([*families, "all"], covered, "covered"),
        "Trained at the tried strength that is nearest to the suggestion, against `erm`:",
        *(_rows(families, kept, ACCURACIES[measure]) for measure, kept in cells.items()),
    ]


def _words(records: Sequence[Record], family: str) -> str:
    """One paragraph a shift: who helps, who hurts, and that the rest does nothing; and the same of
    the worst domain and of calibration."""
    mean, worst = (
        _said(findings(table(records, family, measure)), lambda x: f"{100 * x:+.1f} points")
        for measure in ("out", "worst")
    )
    less = {method: -values for method, values in table(records, family, "out nll").items()}
    calibration = _said(findings(less), lambda x: f"{-x:+.3f}")
    return (
        f"**{family}**, {SAID[family]}: {mean}. In the worst domain: {worst}. Negative "
        f"log-likelihood under shift: {calibration}."
    )


def _said(found: Mapping[str, Finding], number: Callable[[float], str]) -> str:
    by_word: dict[str, list[str]] = {"helps": [], "hurts": [], "nothing": []}
    for method, one in sorted(found.items(), key=lambda item: -item[1].difference):
        by_word[one.word].append(
            f"`{method}`" + (f" ({number(one.difference)})" if one.word != "nothing" else "")
        )
    if len(by_word["nothing"]) == len(found):
        return f"no method {_NOTHING}"
    by_word["nothing"] = ["none of the others"] if by_word["nothing"] else []
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
    records: Sequence[Record],
    measure: str,
    families: Sequence[str],
    title: str,
    scale: float,
    plain: str,
    signed: str,
) -> str:
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
    cells = {}
    for method, grid in header["grid"].items():
        for index, config in enumerate(grid):
            if method != BASE:
                name = f"{method}: {config['ambiguity']}, lr {config['lr']:g}"
                if config["balanced"]:
                    name += f", weight decay {config['weight_decay']:g}"
                gains = (gain_of(records, f, method, index, header["grid"]) for f in families)
                cells[name] = [f"{100 * gain.mean():+.1f}" for gain in gains]
    return _rows(families, cells, "configuration")


def plot_doses(header: Mapping[str, Any], records: Sequence[Record], path: Path) -> None:
    """A panel a method: accuracy under shift against strength, a line a shift, the lower rate."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    families = _there(records, FAMILIES)
    methods = [method for method in header["grid"] if method not in (BASE, "balanced")]
    figure = Figure(figsize=(12.5, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, -(-len(methods) // 2), sharey=True, squeeze=False).flat
    rate = min(config["lr"] for config in header["grid"][BASE])
    for method, panel in zip(methods, panels):
        grid = [(i, one) for i, one in enumerate(header["grid"][method]) if one["lr"] == rate]
        for family, color in zip(families, PALETTE):
            gains = (gain_of(records, family, method, i, header["grid"]) for i, _ in grid)
            panel.plot(
                range(len(grid)),
                [100 * gain.mean() for gain in gains],
                color=color,
                marker="o",
                markersize=3,
                label=family,
            )
        panel.axhline(0, color="black", linewidth=1)
        panel.set_xticks(
            range(len(grid)), [_short(one["ambiguity"]) for _, one in grid], fontsize=7
        )
        panel.set_title(method, fontsize=9)
        panel.grid(axis="y", alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels:  # what is left of the grid
        panel.set_axis_off()
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(),
        loc="outside upper left",
        ncols=len(families),
        frameon=False,
    )
    figure.supylabel("accuracy under shift above erm, points", fontsize=9)
    figure.supxlabel(f"strength, learning rate {rate:g}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(figure, path, dpi=140)


def _short(ambiguity: str) -> str:
    return ambiguity.split(",")[-1].split(":")[-1].replace("temperature", "t").replace("_size", "")


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
                    100 * one.difference,
                    height + 0.2 * shift - 0.1,
                    xerr=[[100 * (one.difference - one.low)], [100 * (one.high - one.difference)]],
                    fmt=marker,
                    color=color,
                    markersize=4,
                    capsize=2,
                    label=ACCURACIES[measure] if not height else None,
                )
        panel.axvline(0, color="black", linewidth=1)
        panel.set_yticks(range(len(methods)), methods)
        panel.set_title(f"{family}\n{fill(SAID[family], 26)}", fontsize=7)
        panel.grid(axis="x", alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2, frameon=False)
    figure.supxlabel("accuracy above erm, points, 95 % interval over paired seeds", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(figure, path, dpi=140)


def load(results: Path) -> tuple[dict[str, Any], list[Record], list[Record], list[Record]]:
    """The header and records of the reward models, those of DPO, and the suggestions."""
    header, records = read(results / "reward.jsonl")
    dpo, suggestions = (
        read(path)[1] if (path := results / f"{name}.jsonl").is_file() else []
        for name in ("dpo", "radius")
    )
    return header, records, by_method(dpo), suggestions


def from_results(results: Path) -> str:
    """`page` of what lies in a folder."""
    return page(*load(results))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--output", type=Path, default=HERE)
    options = parser.parse_args()
    header, records, dpo, _ = load(options.results)
    plots = options.output / "plots"
    plot(records, FAMILIES, plots / "differences.png")
    plot_doses(header, records, plots / "doses.png")
    if dpo:
        plot(dpo, DPO_FAMILIES, plots / "dpo.png")
    write_text(options.output / "README.md", from_results(options.results))


if __name__ == "__main__":
    main()
