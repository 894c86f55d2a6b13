"""What was measured, as tables: on the screen, and as the README's markdown."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from drrlhf.bench import heads, results, robust_risk, trainer_step
from drrlhf.bench.registry import OURS
from drrlhf.bench.runner import Outcome, Record

# Column, what it shows of a record, and the key that some record must have a number for.
_COLUMNS: tuple[tuple[str, Callable[[Record], str], str], ...] = (
    ("median ± IQR", lambda r: _time(r), "value"),
    ("ratio", lambda r: _number(r.get("ratio")), "ratio"),
    ("GB/s", lambda r: _number(r.get("gbps")), "gbps"),
    ("TFLOP/s", lambda r: _number(r.get("tflops")), "tflops"),
    ("tokens/s", lambda r: _number(r.get("tokens_per_s")), "tokens_per_s"),
    ("peak MiB", lambda r: _number(r.get("peak_mib")), "peak_mib"),
    ("error", lambda r: _error(r.get("rms_error")), "rms_error"),
)
LEGEND = (
    "median ± interquartile range; ratio to the contender marked *; peak memory beyond the inputs; "
    "error: RMS against float64 relative to its RMS, of the value or gradient that is furthest off"
)


_BY_WIDTH = 24  # so that the columns of one case stand under those of the last


def screen(outcome: Outcome) -> Group:
    """One case: a line for each contender, with its reason where it did not run.

    A case that failed its gate shows what is wrong, and no speed.
    """
    parts: list[Any] = [Text(str(outcome.case), style="italic")]
    parts += [Text(f"FAILED {line}", style="bold red") for line in outcome.failures]
    if outcome.records:
        parts.append(_table(outcome.records))
    for name, why in outcome.skipped.items():
        parts.append(Padding(Text(f"{name or 'skipped'}: {why}", style="dim"), (0, 0, 0, 2)))
    return Group(*parts, "")


def _table(records: Sequence[Record]) -> Table:
    columns = [c for c in _COLUMNS if any(r.get(c[2]) is not None for r in records)]
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("", min_width=_BY_WIDTH, no_wrap=True)
    for title, _, key in columns:
        wide = 18 if key == "value" else max(5, len(title))
        table.add_column(title, justify="right", min_width=wide, no_wrap=True)
    for record in records:
        mark = " *" if record["contender"] == record["baseline"] else ""
        table.add_row(f"  {record['contender']}{mark}", *(show(record) for _, show, _ in columns))
    return table


def _time(record: Record) -> str:
    if "spread" not in record:
        return f"{_number(record['value'])} {record['unit']}"
    return f"{_number(record['value'])} ± {_number(record['spread'])} {record['unit']}"


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _number(value: float | None) -> str:
    """Three significant digits; thousands in full."""
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def readme_tables(folder: str | os.PathLike[str]) -> dict[str, str]:
    """The README's markdown tables, from the newest kept results in `folder`.

    "robust_risk": the cost of every set; "head": the log-prob head in bare products;
    "trainer_step": a whole step under each set. One that no result has records for is left out.
    """
    tables = {}
    for name, op, make in (
        ("robust_risk", "robust_risk", _robust_risk_markdown),
        ("head", "linear_token_logprobs", _head_markdown),
        ("trainer_step", "trainer_step", _trainer_step_markdown),
    ):
        result = results.newest(folder, op)
        if result is not None and (markdown := make(result)):
            tables[name] = markdown
    return tables


def _mine(record: Record) -> bool:
    name = record["contender"]
    return name == OURS or name.startswith(f"{OURS} (")


def _robust_risk_markdown(result: results.Result) -> str:
    ratios = {
        record["metric"]: record["ratio"]
        for record in result["records"]
        if record["op"] == "robust_risk"
        and record["shape"] == [robust_risk.PAIRS["cpu"]]
        and record["axis"] is None
        and _mine(record)
    }
    rows = [(f"`{name}`", f"{ratios[name]:.1f}") for name in robust_risk.SETS if name in ratios]
    return _markdown(("set", f"ratio to `{robust_risk.BASELINE}`"), rows)


def _head_markdown(result: results.Result) -> str:
    """Rows: dtype, head and direction. Cells: median time over that of one bare product."""
    others = (
        (heads.PLAIN, "plain PyTorch"),
        (heads.COMPILED, "torch.compile"),
        (heads.TRL, "TRL {}".format(_short(result["versions"].get("trl", "")))),
    )
    measured = [
        record
        for record in result["records"]
        if record["op"] == "linear_token_logprobs"
        and record["axis"] is None
        and record["baseline"] == heads.GEMM
        and record["contender"] != heads.GEMM
    ]
    works = {(r["dtype"], r["metric"], r["head"]): r["shape"] for r in measured}
    rows = []
    for dtype, metric, head in works:
        same = [
            r for r in measured if (r["dtype"], r["metric"], r["head"]) == (dtype, metric, head)
        ]
        ours = [r for r in same if _mine(r)]
        by_name = {r["contender"]: f"{r['ratio']:.1f}" for r in same}
        cells = [", ".join(_our_cell(r) for r in ours)]
        cells += [by_name.get(name, "–") for name, _ in others]
        direction = "scoring (forward only)" if metric == "forward" else f"head {head}"
        rows.append((f"{dtype}, {direction}", *cells))
    if not rows:
        return ""
    n, v, d = next(iter(works.values()))
    unit = f"time of forward + backward, in products hidden·weightᵀ ({n}×{d} by {v}×{d})"
    return _markdown((unit, "ours", *(title for _, title in others)), rows)


def _trainer_step_markdown(result: results.Result) -> str:
    """Rows: how a step is cut. Cells: median time over that of our own plain step."""
    contenders = [*trainer_step.SET_CONTENDERS, heads.TRL]
    rows = []
    for metric, title in (
        ("step in accumulated batches", "{} accumulated batches of {} pairs, sequences of {}"),
        ("step in one forward", "{} batch of {} pairs, sequences of {}"),
    ):
        same = {
            r["contender"]: r
            for r in result["records"]
            if r["op"] == "trainer_step" and r["metric"] == metric
        }
        if same:
            shape = next(iter(same.values()))["shape"]
            cells = [f"{same[c]['ratio']:.2f}" if c in same else "–" for c in contenders]
            rows.append((title.format(*shape), *cells))
    trl = "TRL {}".format(_short(result["versions"].get("trl", "")))
    sets = [f"`{text}`" for text in trainer_step.SETS]
    return _markdown(("time of one step, relative to our own plain one", *sets, trl), rows)


def _our_cell(record: Record) -> str:
    variant = record["contender"].removeprefix(OURS).strip(" ()")
    return f"{record['ratio']:.1f}" + (f" ({variant})" if variant else "")


def _short(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rows = list(rows)
    if not rows:
        return ""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)
