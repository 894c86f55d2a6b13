"""Pictures of a result: ratios as bars, scaling as curves."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from drrlhf.bench.registry import OURS
from drrlhf.bench.results import Result
from drrlhf.bench.runner import Record
from drrlhf.report import PALETTE, figure_of, save

_MARKERS = "osD^vP*X"
_HATCHES = ("", "//", "..", "xx")
# The axis of a scaling curve, and where its number stands in a record's shape.
AXES = {"tokens": 0, "vocabulary": 1, "pairs": 0}


def plot(result: Result, folder: str | os.PathLike[str], stem: str) -> list[Path]:
    """Draw ``<stem>_ratios.png`` and ``<stem>_scaling.png`` in `folder`; the paths of those drawn.

    Ratios: for each op, every implementation's median over its baseline's, on a logarithmic scale.
    Scaling: for each op and axis, time over tokens, vocabulary or pairs, with the interquartile
    range. A figure without data is not drawn.

    Raises:
        ImportError: matplotlib is missing.
    """
    drawn = []
    for name, draw in (("ratios", _ratios), ("scaling", _scaling)):
        figure = draw(result["records"])
        if figure is not None:
            figure.suptitle(_title(result), fontsize="medium")
            path = Path(folder) / f"{stem}_{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            save(figure, path)
            drawn.append(path)
    return drawn


def _title(result: Result) -> str:
    versions = result["versions"]
    return f"{result['device']}, torch {versions['torch']}, drrlhf {versions['drrlhf']}"


def _figure(rows: int, columns: int, width: float, heights: list[float]) -> tuple[Any, Any]:
    figure = figure_of(width, 0.6 + sum(heights))
    grid = figure.subplots(
        rows, columns, squeeze=False, gridspec_kw={"height_ratios": heights[:rows]}
    )
    for axis in grid.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, grid


def _ratios(records: list[Record]) -> Any:
    bars = [r for r in records if r["ratio"] is not None and r["axis"] is None]
    bars = [r for r in bars if r["contender"] != r["baseline"]]
    panels = list(dict.fromkeys((r["op"], r["baseline"]) for r in bars))
    if not bars:
        return None
    implementations = list(dict.fromkeys(r["contender"] for r in bars))
    sizes = [sum((r["op"], r["baseline"]) == panel for r in bars) for panel in panels]
    figure, grid = _figure(len(panels), 1, 8.5, [0.9 + 0.2 * size for size in sizes])
    for axis, (op, baseline) in zip(grid[:, 0], panels, strict=True):
        place = 0.0
        ticks: dict[str, float] = {}
        named: set[str] = set()
        for record in (r for r in bars if (r["op"], r["baseline"]) == (op, baseline)):
            work, name = _label(record), record["contender"]
            if ticks and work not in ticks:
                place += 0.6  # air between one piece of work and the next
            ticks.setdefault(work, place)
            number = implementations.index(name)
            axis.barh(
                place,
                record["ratio"] - 1,
                left=1,
                height=0.9,
                color=PALETTE[number % len(PALETTE)],
                hatch=_HATCHES[number // len(PALETTE) % len(_HATCHES)],
                edgecolor="white",
                label=None if name in named else name,
            )
            axis.annotate(
                f" {record['ratio']:.3g}", (max(record["ratio"], 1), place), va="center", fontsize=6
            )
            named.add(name)
            place += 1
        axis.set_yticks(list(ticks.values()), list(ticks), fontsize="x-small")
        axis.invert_yaxis()
        axis.set_xscale("log")
        _plain_numbers(axis.xaxis)
        axis.axvline(1, color="black", linewidth=1)
        axis.set_xlabel(f"{op}: ratio to {baseline}", fontsize="small")
        axis.tick_params(axis="x", labelsize="x-small")
        axis.margins(x=0.08)
        axis.legend(
            frameon=False,
            fontsize="x-small",
            ncols=4,
            loc="lower left",
            bbox_to_anchor=(0, 1),
            borderaxespad=0.2,
        )
    return figure


def _plain_numbers(axis: Any) -> None:
    """Ticks 1, 2, 5, 10 ... of a logarithmic axis, written as they are read."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _label(record: Record) -> str:
    parts = [record["metric"]]
    if record["op"] != "robust_risk":
        parts.append(record["dtype"])
    if record["head"]:
        parts.append(f"head {record['head']}")
    return ", ".join(parts)


def _scaling(records: list[Record]) -> Any:
    from matplotlib.ticker import NullLocator

    points = [r for r in records if r["axis"] is not None]
    panels = list(dict.fromkeys((r["op"], r["axis"]) for r in points))
    if not points:
        return None
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, grid = _figure(rows, columns, 4.6 * columns, [3.6] * rows)
    for unused in grid.flat[len(panels) :]:
        unused.set_visible(False)
    for axis, (op, along) in zip(grid.flat, panels, strict=False):
        curves: dict[str, dict[int, Record]] = {}
        for record in points:
            if (record["op"], record["axis"]) == (op, along):
                at = record["shape"][AXES[along]]
                curves.setdefault(_curve(record), {}).setdefault(at, record)
        for number, (name, line) in enumerate(curves.items()):
            places = sorted(line)
            axis.errorbar(
                places,
                [line[at]["value"] for at in places],
                yerr=[line[at]["spread"] / 2 for at in places],
                label=name,
                color=PALETTE[number % len(PALETTE)],
                marker=_MARKERS[number % len(_MARKERS)],
                markersize=4,
                linestyle=("-", "--", ":")[number // len(PALETTE) % 3],
            )
        places = sorted({at for line in curves.values() for at in line})
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xticks(places, [str(at) for at in places], fontsize="x-small", rotation=30)
        axis.xaxis.set_minor_locator(NullLocator())
        _plain_numbers(axis.yaxis)
        axis.tick_params(axis="y", labelsize="x-small")
        axis.set_xlabel(along)
        unit = next(iter(next(iter(curves.values())).values()))["unit"]
        axis.set_ylabel(f"{unit} (median ± half the interquartile range)", fontsize="small")
        axis.set_title(op, fontsize="small")
        axis.legend(frameon=False, fontsize="xx-small")
    return figure


def _curve(record: Record) -> str:
    """A reducer's curves are its sets; every other op's are those who do the work."""
    name = record["contender"]
    if record["op"] != "robust_risk" or name == record["baseline"]:
        return name
    return record["metric"] if name == OURS else f"{name} ({record['metric']})"
