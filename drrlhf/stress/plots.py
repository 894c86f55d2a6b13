"""The plots of the report page, as SVG that stands in the page itself.

What is not data has the colour of the page's text, so that it can be read on a light page and on a
dark one. Models are told apart by a legend in the page, which breaks its lines on a narrow screen.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from drrlhf.report import LINE_STYLES, PALETTE, as_written, figure_of, light

_TITLES = {
    "tv": "total variation: share of weight moved",
    "kl": "KL divergence",
    "chi2": "chi-square divergence",
    "cvar": "CVaR: 1 - alpha, the share set aside",
}
_INK = "#010203"  # stands for the text's colour: no data has it
# As matplotlib draws it, and as the legend of the page shows it.
_MARKERS = (("o", "●"), ("s", "■"), ("D", "◆"), ("^", "▲"), ("v", "▼"), ("*", "★"))


def color_of(number: int) -> str:
    """The colour of a model, under a name that the style of the page gives its light and dark."""
    return f"var(--line-{number % len(PALETTE)})"


def legend(names: Sequence[str]) -> list[dict[str, str]]:
    """What stands for each name in a plot: "name", "color" and "marker"."""
    return [
        {
            "name": name,
            "color": color_of(number),
            "marker": _MARKERS[number % len(_MARKERS)][1],
        }
        for number, name in enumerate(names)
    ]


def curves_plot(result: Mapping[str, Any]) -> str:
    """Worst cases over the radius: a column a family; accuracy above, loss below."""
    with _style():
        figure = figure_of(11.5, 5.6, "svg")
        axes = figure.subplots(2, len(_TITLES), sharex="col", sharey="row")
        for column, (family, title) in enumerate(_TITLES.items()):
            for row, metric in enumerate(("accuracy", "loss")):
                axis = axes[row][column]
                for number, model in enumerate(result["models"].values()):
                    points = model["curves"][family]
                    x = [1 - one["radius"] if family == "cvar" else one["radius"] for one in points]
                    _line(axis, x, [one[metric] for one in points], number)
                if metric == "accuracy":
                    axis.axhline(result["settings"]["floor"], color=_INK, lw=1, ls="--")
            axes[1][column].set_xlabel(title, fontsize="small")
        axes[0][0].set_ylabel("worst-case accuracy")
        axes[1][0].set_ylabel("worst-case loss")
        return _svg(figure, axes.flat)


def best_of_plot(section: Mapping[str, Any]) -> str:
    """The gold reward of the answer that is picked among n, and, dotted, of the best among them."""
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    with _style():
        figure = figure_of(8.0, 4.2, "svg")
        axis = figure.subplots()
        for number, curve in enumerate(section["curves"].values()):
            points = curve["points"]
            counts = [point["n"] for point in points]
            _line(axis, counts, [point["gold"] for point in points], number)
        # The best possible is that of the prompts, whatever model picks.
        best = [point["best_possible"] for point in points]
        axis.plot(counts, best, color=_INK, lw=1, ls=":")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_locator(FixedLocator(counts))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.set_xlabel("n, the answers that the model picks one of")
        axis.set_ylabel("gold reward")
        return _svg(figure, [axis])


def _style() -> Any:
    import matplotlib

    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    settings: dict[Any, Any] = {
        **dict.fromkeys((*inked, "grid.color"), _INK),
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "svg.hashsalt": "drrlhf",
        "svg.fonttype": "none",
    }
    return matplotlib.rc_context(settings)


def _line(axis: Any, x: Sequence[float], found: Sequence[Mapping[str, float]], number: int) -> None:
    """A line with its band; what is not known leaves a gap."""
    color = PALETTE[number % len(PALETTE)]
    low, value, high = (
        [math.nan if one[key] is None else one[key] for one in found]
        for key in ("low", "value", "high")
    )
    axis.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
    axis.plot(
        x,
        value,
        color=color,
        marker=_MARKERS[number % len(_MARKERS)][0],
        markersize=4,
        linestyle=LINE_STYLES[number // len(PALETTE) % len(LINE_STYLES)],
    )


def _svg(figure: Any, axes: Any) -> str:
    """The figure as an element for a page: no prolog, no metadata, no ids that two plots share."""
    for axis in axes:
        light(axis)
    as_written(figure)
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    text = written.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # The first <style> holds for the whole page; its rule goes to the element itself.
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = text.replace("<svg ", '<svg style="stroke-linejoin: round" aria-hidden="true" ', 1)
    for number, color in enumerate(PALETTE):
        text = text.replace(f": {color.lower()}", f": {color_of(number)}")
    return text.replace(_INK, "currentColor")
