"""Tables of what kernels compile to, kept in the checkout with what they were made from: while that
is the same, a test reads in a table what it would otherwise compile for a minute.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from drrlhf.files import write_text

Row = dict[str, Any]


def made_from(versions: dict[str, str], files: Iterable[Path], asked: str = "") -> Row:
    """What a table follows from: the compiler, the text of the sources, and what is asked."""
    text = hashlib.sha256(asked.encode())
    for path in sorted(files):
        text.update(f"{path.name}\n".encode() + path.read_bytes())
    return {"versions": versions, "sources": text.hexdigest()}


def write(path: Path, made: Row, rows: list[Row]) -> None:
    """Writes the table, and prints it."""
    result = {"suite": "ahead of time", **made, "records": rows}
    write_text(path, json.dumps(result, indent=1) + "\n")
    for r in rows:
        print(*(r[key] for key in ("arch", "registers", "spills", "shared", "kernel")))


def rows(path: Path, made: Row, arch: int, compiled: Callable[[], list[Row]]) -> list[Row]:
    """Rows of one architecture: as kept, where a table is of the same sources and compiler, and
    compiled now where it is not, or where every case is asked for (DRRLHF_ALL=1)."""
    table = json.loads(path.read_text(encoding="utf-8"))
    if made.items() <= table.items() and os.environ.get("DRRLHF_ALL", "0") == "0":
        found: list[Row] = [r for r in table["records"] if r["arch"] == f"sm_{arch}"]
        return found
    return compiled()


def differences(path: Path, made: Row, arch: int, rows: list[Row]) -> list[str]:
    """Kernels whose rows are not those that are kept; of another compiler, whose names are not."""
    table = json.loads(path.read_text(encoding="utf-8"))
    same = table["versions"] == made["versions"]
    kept, found = (
        {r["kernel"]: r if same else None for r in of if r["arch"] == f"sm_{arch}"}
        for of in (table["records"], rows)
    )
    return sorted(k for k in kept | found if k not in kept or k not in found or kept[k] != found[k])
