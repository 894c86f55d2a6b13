"""The report of a stress test: one HTML file with its plots inside, and the same as JSON."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drrlhf.files import write_together, writes_text
from drrlhf.report import PALETTE

HTML_FILE, JSON_FILE = "report.html", "report.json"
COMPARED = ("tv:0.1", "kl:0.1", "chi2:0.1", "cvar:0.3")
_TITLES = {
    "tv": "total variation: share of weight moved",
    "kl": "KL divergence",
    "chi2": "chi-square divergence",
    "cvar": "CVaR: 1 - alpha, the share set aside",
}


def write_report(result: Mapping[str, Any], output_dir: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` and ``report.json`` of what `stress_test` returned; the HTML's path.

    Both are written whole before either gets its name, so a crash leaves the old report or the new.
    """
    folder = Path(output_dir)
    page, data = render(result), json.dumps(_finite(result), indent=1, allow_nan=False) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    write_together({folder / HTML_FILE: writes_text(page), folder / JSON_FILE: writes_text(data)})
    return folder / HTML_FILE


def _finite(value: Any) -> Any:
    """The same with null for NaN, which JSON does not know."""
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def render(result: Mapping[str, Any]) -> str:
    """The page as text."""
    from jinja2 import Environment

    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    models = result["models"]
    page = Environment(autoescape=True, trim_blocks=True).from_string(template)
    return page.render(
        result=result,
        settings=result["settings"],
        models=models,
        names=list(models),
        any_required=any(model["requirements"] for model in models.values()),
        compared=COMPARED,
        plain={name: point(model, "tv:0")["accuracy"] for name, model in models.items()},
        worst={
            name: {label: point(model, label)["accuracy"] for label in COMPARED}
            for name, model in models.items()
        },
        format_radius=format_radius,
        plot=_plot(result),
    )


def point(model: Mapping[str, Any], ambiguity: str) -> dict[str, Any]:
    """The point of a model's curves at one set."""
    family = ambiguity.partition(":")[0]
    return next(one for one in model["curves"][family] if one["set"] == ambiguity)


def format_radius(family: str, radius: Mapping[str, Any]) -> str:
    """A robustness radius in a few words."""
    if radius["radius"] is None:
        return f"{family}: below without any adversary"
    if radius["beyond"]:
        return f"{family}: never"
    low = "none" if radius["low"] is None else f"{radius['low']:.3g}"
    return f"{family}:{radius['radius']:.3g} [{low}]"


def _plot(result: Mapping[str, Any]) -> str:
    """A column a family; accuracy above, loss below; as SVG."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.5, 5.6), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots(2, len(_TITLES), sharex="col", sharey="row")
    for column, (family, title) in enumerate(_TITLES.items()):
        for row, metric in enumerate(("accuracy", "loss")):
            _panel(axes[row][column], result, family, metric)
        axes[1][column].set_xlabel(title, fontsize="small")
    axes[0][0].set_ylabel("worst-case accuracy")
    axes[1][0].set_ylabel("worst-case loss")
    if len(result["models"]) > 1:
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=4, frameon=False)
    written = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "drrlhf", "svg.fonttype": "none"}):
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    text = written.getvalue()
    return text[text.index("<svg") :]


def _panel(axis: Any, result: Mapping[str, Any], family: str, metric: str) -> None:
    for number, (name, model) in enumerate(result["models"].items()):
        points = model["curves"][family]
        x = [1 - one["radius"] if family == "cvar" else one["radius"] for one in points]
        color = PALETTE[number % len(PALETTE)]
        found = [one[metric] for one in points]
        axis.fill_between(
            x,
            [one["low"] for one in found],
            [one["high"] for one in found],
            color=color,
            alpha=0.2,
            linewidth=0,
        )
        axis.plot(x, [one["value"] for one in found], color=color, label=name, marker=".")
    if metric == "accuracy":
        axis.axhline(result["settings"]["floor"], color="black", linewidth=1, linestyle="--")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
