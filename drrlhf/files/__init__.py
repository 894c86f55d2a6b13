"""Files that are read and written by the same rules everywhere.

Here, with the standard library alone: files that are whole at any time, and files of JSON lines
that a run appends to. `drrlhf.files.tables` reads rows from the data of users.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a file beside ``path``, and move that into place when it is on the disk.

    Whatever ends the process, or the machine: a reader finds the old file or the new one. A process
    that is killed leaves ``.NAME.PID.part`` behind.
    """
    write_together({path: write})


def write_together(writes: Mapping[Path, Callable[[Path], Any]]) -> None:
    """`write_whole` for files that belong together: all are on the disk before the first gets its
    name."""
    parts = {path: path.with_name(f".{path.name}.{os.getpid()}.part") for path in writes}
    try:
        for path, write in writes.items():
            write(parts[path])
            with parts[path].open("rb") as file:
                os.fsync(file.fileno())
        for path, part in parts.items():
            os.replace(part, path)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def writes_text(text: str) -> Callable[[Path], Any]:
    """What `write_whole` and `write_together` call to write ``text``, as UTF-8."""
    return lambda part: part.write_text(text, encoding="utf-8")


def write_text(path: Path, text: str) -> None:
    """`write_whole` of ``text``, as UTF-8."""
    write_whole(path, writes_text(text))


def json_lines(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a file of JSON, such as a ``metrics.jsonl``, that a process of ours appends to;
    a last line cut off by a crash is left out, and a file that is not there has none.

    Raises:
        ValueError: a line before the last is not valid JSON.
    """
    path = Path(path)
    if not path.is_file():
        return []
    *lines, _ = path.read_bytes().split(b"\n")  # what follows the last line break is cut off
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from error
    return records
