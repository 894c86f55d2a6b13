"""The report of a stress test: one HTML file with its plots inside, and the same as JSON."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drrlhf.files import write_together, writes_text
from drrlhf.stress.plots import best_of_plot, curves_plot, legend

HTML_FILE, JSON_FILE = "report.html", "report.json"
GENERATED = "generated"  # the kind of a result of `stress_generated`
COMPARED = ("tv:0.1", "kl:0.1", "chi2:0.1", "cvar:0.3")
PAGE = Path(__file__).with_name("page")


def write_report(result: Mapping[str, Any], output_dir: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` and ``report.json`` of what `stress_test` or `stress_generated`
    returned; the HTML's path.

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
    """The page as text: nothing in it is fetched, and no text of a pair or a name is markup."""
    from markupsafe import Markup

    from drrlhf.stress import view

    if result.get("kind") == GENERATED:
        return _page("generated.html", result, example=view.answer_example, named=view.named)
    models, best_of = result["models"], result.get("best_of")
    return _page(
        "page.html",
        result,
        compared=COMPARED,
        plain={name: point(model, "tv:0")["accuracy"] for name, model in models.items()},
        worst={
            name: {label: point(model, label)["accuracy"] for label in COMPARED}
            for name, model in models.items()
        },
        rows={name: view.change_rows(model, len(models)) for name, model in models.items()},
        sides=view.SIDES,
        most_lost=view.most_lost,
        worst_by=view.worst_by,
        example=view.example,
        radii=_radii,
        legend=legend,
        plot=Markup(curves_plot(result)),
        best_of_plot=Markup(best_of_plot(best_of)) if best_of is not None else "",
    )


def _page(template: str, result: Mapping[str, Any], **more: Any) -> str:
    """A template with what every page has, and with ``more``."""
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup

    from drrlhf.stress import view

    pages = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, loader=FileSystemLoader(PAGE)
    )
    filters = (view.percent, view.band, view.number_band, view.sort_key, view.heat)
    pages.filters |= {one.__name__: one for one in filters}
    style, script = ((PAGE / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    models = result["models"]
    return pages.get_template(template).render(
        result=result,
        settings=result["settings"],
        models=models,
        names=list(models),
        several=len(models) > 1,
        gates=view.gates(models),
        style=Markup(style),
        script=Markup(script),
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **more,
    )


def point(model: Mapping[str, Any], ambiguity: str) -> dict[str, Any]:
    """The point of a model's curves at one set."""
    family = ambiguity.partition(":")[0]
    return next(one for one in model["curves"][family] if one["set"] == ambiguity)


def _radii(model: Mapping[str, Any]) -> list[str]:
    """The robustness radii, a line each; one line where they all say that there is none."""
    radii = model["robustness_radius"]
    if all(radius["radius"] is None for radius in radii.values()):
        return ["already below"]
    return [format_radius(family, radius) for family, radius in radii.items()]


def format_radius(family: str, radius: Mapping[str, Any]) -> str:
    """A robustness radius in a few words."""
    if radius["radius"] is None:
        return f"{family}: below without any adversary"
    if radius["beyond"]:
        return f"{family}: never"
    low = "none" if radius["low"] is None else f"{radius['low']:.3g}"
    return f"{family}:{radius['radius']:.3g} [{low}]"
