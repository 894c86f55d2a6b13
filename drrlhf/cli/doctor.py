"""``drrlhf doctor``: what is installed, what was built, which backend serves each op, and why."""

from __future__ import annotations

import itertools
import json
import platform
from importlib import metadata
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from drrlhf.cli import _console
from drrlhf.version import __version__

# Package, and the extra that brings it.
PACKAGES = {
    "torch": None,
    "triton": None,
    "trl": "trl",
    "transformers": "trl",
    "datasets": "trl",
    "peft": "trl",
    "accelerate": "trl",
    "matplotlib": "trl",
}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show versions, what was built, and which backend serves each op on each device, and why."""
    try:
        from drrlhf import backends
    except (ImportError, ValueError) as error:
        _console.fail(f"drrlhf does not import: {error}")
        raise typer.Exit(1) from error
    report = {
        "versions": versions(),
        "devices": devices(),
        "build": backends.build_info(),
        "ops": [row._asdict() for row in backends.explain()],
    }
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _show(report, _console.console())


def versions() -> dict[str, str]:
    """Version of drrlhf, Python and every package we work with, or how to install it."""
    found = {"drrlhf": __version__, "python": platform.python_version()}
    for package, extra in PACKAGES.items():
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            hint = f" (pip install 'drrlhf[{extra}]')" if extra else ""
            found[package] = f"not installed{hint}"
    return found


def devices() -> dict[str, Any]:
    """CPU threads, and for every CUDA device its name and compute capability."""
    import torch

    cuda = {
        f"cuda:{i}": "{} (compute capability {}.{})".format(
            torch.cuda.get_device_name(i), *torch.cuda.get_device_capability(i)
        )
        for i in range(torch.cuda.device_count())
    }
    built = torch.version.cuda or torch.version.hip
    none = "none found" if built else "none (this torch was built without it)"
    return {"cpu": f"{torch.get_num_threads()} threads", **(cuda or {"cuda": none})}


def _show(report: dict[str, Any], console: Console) -> None:
    for title in ("versions", "devices", "build"):
        table = Table(title=title, title_justify="left", show_header=False)
        for name, value in report[title].items():
            table.add_row(name, Text("" if value is None else str(value)))
        console.print(table)
    table = Table(title="ops", title_justify="left")
    for head in ("op", "device", "served by", "why not by others, and what to know"):
        table.add_column(head)
    of_one = itertools.groupby(report["ops"], key=lambda row: (row["op"], row["device"]))
    for (op, device), rows in ((key, list(found)) for key, found in of_one):
        chosen = ", ".join(row["backend"] for row in rows if row["chosen"]) or "nothing"
        table.add_row(op, device, chosen, Text(_reasons(rows)))
    console.print(table)


def _reasons(rows: list[dict[str, Any]]) -> str:
    """One line per reason, after the backends that share it."""
    backends: dict[str, list[str]] = {}
    for row in rows:
        if row["reason"]:  # of the one that serves: for what it does
            backends.setdefault(row["reason"], []).append(row["backend"])
    return "\n".join(f"{', '.join(names)}: {reason}" for reason, names in backends.items())
