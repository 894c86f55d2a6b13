"""What was measured, as tables: on the screen, and as the README's markdown."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from drrlhf.bench import heads, results, robust_risk, trainer_step
from drrlhf.bench.registry import OURS, variant
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
    "median ± interquartile range; ratio to the implementation marked *; peak memory beyond the "
    "inputs; error: RMS against float64 relative to its RMS, of the value or gradient that is "
    "furthest off"
)


_BY_WIDTH = 24  # so that the columns of one case stand under those of the last


def screen(outcome: Outcome) -> Group:
    """One case: a line for each implementation, with its reason where it did not run.

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
    spread = f" ± {_number(record['spread'])}" if "spread" in record else ""
    return f"{_number(record['value'])}{spread} {record['unit']}"


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _number(value: float | None) -> str:
    """Three significant digits; thousands in full."""
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def readme_tables(folder: str | os.PathLike[str]) -> dict[str, str]:
    """Markdown tables for the README and docs/, from the newest kept CPU results in `folder`.

    "speed": ours beside the others, one row a piece of work; "speed_short": those of whole losses
    and steps; "robust_risk": the cost of every set;
    "head": the log-prob head in bare products; "policy_loss": the loss of GRPO; "trainer_step": a
    whole step under each set; "packing": a step without padding; "sharing": one whose prompts lie
    there once. A table that no result has records for is left out.
    """
    tables: dict[str, str] = {}
    for name, needed, make in _TABLES:
        newest = (results.newest(folder, *records) for records in needed)
        found = [result for result in newest if result is not None]
        if found and (markdown := make(*found)):
            tables[name] = markdown
    return tables


def _mine(record: Record) -> bool:
    name = record["contender"]
    return name == OURS or name.startswith(f"{OURS} (")


def _robust_risk_markdown(result: results.Result) -> str:
    found = _records(result, op="robust_risk", shape=[robust_risk.PAIRS["cpu"]], axis=None)
    ratios = {record["metric"]: record["ratio"] for record in found if _mine(record)}
    rows = [(f"`{name}`", f"{ratios[name]:.1f}") for name in robust_risk.SETS if name in ratios]
    return markdown(("set", f"ratio to `{robust_risk.BASELINE}`"), rows)


def _head_markdown(result: results.Result) -> str:
    """Rows: dtype, head and direction. Cells: median time over that of one bare product."""
    others = (
        (heads.PLAIN, "plain PyTorch"),
        (heads.COMPILED, "torch.compile"),
        (heads.TRL, _trl(result)),
    )
    works: dict[tuple[str, str, str], list[Record]] = {}
    for r in _records(result, op="linear_token_logprobs", axis=None, baseline=heads.GEMM):
        # Log-probs alone: with entropies and the like a row would need more words.
        if r["contender"] != heads.GEMM and r["metric"] in ("forward", "forward+backward"):
            works.setdefault((r["dtype"], r["metric"], r["head"]), []).append(r)
    rows = []
    for (dtype, metric, head), same in works.items():
        by_name = {r["contender"]: f"{r['ratio']:.1f}" for r in same}
        cells = [", ".join(_our_cell(r) for r in same if _mine(r))]
        cells += [by_name.get(name, "–") for name, _ in others]
        direction = "scoring (forward only)" if metric == "forward" else f"head {head}"
        rows.append((f"{dtype}, {direction}", *cells))
    if not rows:
        return ""
    n, v, d = next(iter(works.values()))[-1]["shape"]
    unit = f"time of forward + backward, in products hidden·weightᵀ ({n}×{d} by {v}×{d})"
    return markdown((unit, "ours", *(title for _, title in others)), rows)


def _trainer_step_markdown(result: results.Result) -> str:
    """Rows: how a step is cut. Cells: median time over that of our own plain step."""
    works = {
        "step in accumulated batches": "{} accumulated batches of {} pairs, sequences of {}",
        "step in one forward": "{} batch of {} pairs, sequences of {}",
    }
    names = (*trainer_step.SET_IMPLEMENTATIONS, heads.TRL)
    rows = [(work, *cells) for work, _, cells in _ratios(result, "trainer_step", works, names)]
    sets = [f"`{text}`" for text in trainer_step.SETS]
    return markdown(("time of one step, relative to our own plain one", *sets, _trl(result)), rows)


def _ratios(
    result: results.Result, op: str, works: Mapping[str, str], names: Sequence[str]
) -> Iterator[tuple[str, Record, list[str]]]:
    """Of each metric that the first of `names` has a record of, in `works` with words for its
    shape: these words, that record, and everyone's time over the baseline's."""
    for metric, work in works.items():
        same = _by_implementation(result, op=op, metric=metric, axis=None)
        if first := same.get(names[0]):
            cells = [f"{same[name]['ratio']:.2f}" if name in same else "–" for name in names]
            yield work.format(*first["shape"]), first, cells


def _records(result: results.Result, **wanted: Any) -> list[Record]:
    """The records in which these keys have these values."""
    return [r for r in result["records"] if all(r[key] == value for key, value in wanted.items())]


def _by_implementation(result: results.Result, **wanted: Any) -> dict[str, Record]:
    return {record["contender"]: record for record in _records(result, **wanted)}


# Work, op, metric, dtype, head, who is ours, and what is shown of a record. Peers, which have no
# sets, train plainly.
_SPEED: tuple[tuple[str, str, str, str, str | None, str, str], ...] = (
    (
        "DPO step with `tv:0.1`, the reference's pass included, {1} pairs of {2} tokens, 384 of "
        "them the prompt",
        *("trainer_step", trainer_step.of_prompts(384, 64), "bfloat16", "frozen"),
        *(trainer_step.SHARED_TV, "tokens_per_s"),
    ),
    (
        "DPO step with `tv:0.1`, the reference's log-probs given, {} sequences of {} tokens",
        *("dpo_step", "tv:0.1, forward+backward", "bfloat16", None, OURS, "tokens_per_s"),
    ),
    (
        "GRPO loss with `tv:0.1`, {} prompts of {} completions of {} tokens, float32",
        *("policy_loss", "log-probs to gradients, dapo", "float32", None, OURS, "value"),
    ),
    (
        "bfloat16 head frozen ({0}×{2} by {1}×{2}), forward + backward",
        *("linear_token_logprobs", "forward+backward", "bfloat16", "frozen", OURS, "value"),
    ),
    (
        "log-probs from bfloat16 logits ({}×{}), forward",
        *("token_logprobs", "forward", "bfloat16", None, OURS, "value"),
    ),
    (
        "log-probs from bfloat16 logits ({}×{}), forward + backward",
        *("token_logprobs", "forward+backward", "bfloat16", None, OURS, "value"),
    ),
    (
        "float32 head trained, logits kept ({0}×{2} by {1}×{2}), forward + backward",
        "linear_token_logprobs",
        "forward+backward",
        *("float32", "trained", variant("slab kept"), "value"),
    ),
    (
        "bfloat16 head frozen ({0}×{2} by {1}×{2}), peak memory beyond the inputs",
        "linear_token_logprobs",
        "peak memory, forward+backward",
        *("bfloat16", "frozen", OURS, "peak_mib"),
    ),
)
SHORT = 3  # of these, the first ones tell most
_UNITS = {"peak_mib": "MiB", "tokens_per_s": "tokens/s"}


def _speed_markdown(*found: results.Result, most: int | None = None) -> str:
    """Rows: a piece of work. Cells: median time, memory or tokens per second, and what it was
    measured on; rows of different machines do not compare."""
    rows = []
    for work, op, metric, dtype, head, ours, key in _SPEED[:most]:
        wanted = {"op": op, "metric": metric, "dtype": dtype, "axis": None}
        wanted |= {} if head is None else {"head": head}
        with_ours = [r for r in found if _records(r, contender=ours, **wanted)]
        if not with_ours:
            continue
        result = max(with_ours, key=lambda result: result["date"])
        same = _by_implementation(result, **wanted)
        plain = "log_softmax" if op == "token_logprobs" else heads.PLAIN
        cells = (_amount(same.get(name), key) for name in (ours, plain, heads.COMPILED, heads.TRL))
        where = f"{result['device'].removesuffix(' Processor')}, {result['date']}"
        rows.append((work.format(*same[ours]["shape"]), *cells, where))
    return markdown(
        ("work", "drrlhf", "plain PyTorch", "torch.compile", _trl(found[0]), "measured on"), rows
    )


def _amount(record: Record | None, key: str) -> str:
    if record is None:
        return "–"
    value, unit = record[key], _UNITS.get(key, record["unit"])
    if unit == "us":
        value, unit = value / 1000, "ms"
    return f"{_number(value)} {unit}"


def _policy_loss_markdown(result: results.Result) -> str:
    """Rows: a form of the loss. Cells: median time over that of TRL's own loss."""
    works = {
        "log-probs to gradients, dapo": "from log-probs ({} prompts × {} completions × {} tokens)",
        "log-probs to gradients, grpo with a reference": "the same with a reference policy",
        "log-probs to gradients, grpo by sequence": "the same with sequence-level ratios",
        "hidden states to gradients": "from hidden states ({}×{}×{} tokens, head {}×{})",
    }
    found = _ratios(result, "policy_loss", works, (OURS, variant("erm"), heads.TRL))
    rows = [(work, record["dtype"], *cells) for work, record, cells in found]
    return markdown(("loss with its gradient", "dtype", "`tv:0.1`", "`erm`", _trl(result)), rows)


def _packing_markdown(result: results.Result) -> str:
    """Rows: padded and packed. Cells: tokens per second, and over the padded step's."""
    same = _by_implementation(result, op="trainer_step", metric="step of mixed lengths")
    layouts = trainer_step.LAYOUTS if trainer_step.LAYOUTS.keys() <= same.keys() else {}
    speeds = [(options, same[name]["tokens_per_s"]) for name, options in layouts.items()]
    rows = [
        (f"`padding_free={options['padding_free']}`", _number(speed), f"{speed / speeds[0][1]:.2f}")
        for options, speed in speeds
    ]
    return markdown(("step of mixed lengths", "tokens/s", "relative"), rows)


def _sharing_markdown(result: results.Result) -> str:
    """Rows: lengths of prompts and answers. Cells: how many times as fast as apart."""
    names = (trainer_step.APART, trainer_step.SHARED, trainer_step.SHARED_TV, heads.TRL)
    head = ("prompt", "answers", "apart", "shared", "shared, `tv:0.1`", _trl(result))
    return markdown(head, _rows_of_prompts(result, names, faster=True))


def _views_markdown(result: results.Result) -> str:
    """Rows: lengths of prompts and answers. Cells: time of the step, over that without views."""
    names = (trainer_step.SHARED, trainer_step.VIEWED, trainer_step.VIEWED_HALF)
    head = ("prompt", "answers", "no views", "all scored", "`views_scored=0.5`")
    return markdown(head, _rows_of_prompts(result, names, faster=False))


def _rows_of_prompts(
    result: results.Result, names: Sequence[str], faster: bool
) -> Iterator[Sequence[str]]:
    """Rows: steps by the lengths of prompts and answers. Cells: time over that of the first of
    ``names``, or the other way round; a row needs the second of them."""
    for _, prompt, answer in (shape for some in trainer_step.PROMPTS.values() for shape in some):
        same = _by_implementation(
            result, op="trainer_step", metric=trainer_step.of_prompts(prompt, answer)
        )
        if not {*names[:2]} <= same.keys():
            continue
        times = (same[n]["value"] / same[names[0]]["value"] if n in same else None for n in names)
        cells = ("–" if t is None else f"{1 / t if faster else t:.2f}" for t in times)
        yield (str(prompt), str(answer), *cells)


def _our_cell(record: Record) -> str:
    variant = record["contender"].removeprefix(OURS).strip(" ()")
    return f"{record['ratio']:.1f}" + (f" ({variant})" if variant else "")


def _trl(result: results.Result) -> str:
    return "TRL " + ".".join(result["versions"].get("trl", "").split(".")[:2])


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; nothing where there are no rows."""
    rows = list(rows)
    if not rows:
        return ""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


# What each is made from: op, and how the metric begins.
_TABLES: tuple[tuple[str, tuple[tuple[str, str], ...], Callable[..., str]], ...] = (
    ("speed", tuple(dict.fromkeys(row[1:3] for row in _SPEED)), _speed_markdown),
    (
        "speed_short",
        tuple(dict.fromkeys(row[1:3] for row in _SPEED[:SHORT])),
        partial(_speed_markdown, most=SHORT),
    ),
    ("robust_risk", (("robust_risk", ""),), _robust_risk_markdown),
    ("head", (("linear_token_logprobs", ""),), _head_markdown),
    ("policy_loss", (("policy_loss", ""),), _policy_loss_markdown),
    ("trainer_step", (("trainer_step", "step in "),), _trainer_step_markdown),
    ("packing", (("trainer_step", "step of mixed"),), _packing_markdown),
    ("sharing", (("trainer_step", "step of prompts"),), _sharing_markdown),
    ("views", (("trainer_step", "step of prompts"),), _views_markdown),
)
