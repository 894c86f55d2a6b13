"""What the CUDA kernels compile to: registers, spills and shared memory, without a GPU.

``python -m tools.cuda_ahead_of_time FOLDER`` writes the table, from a source tree and with
nvcc. Warnings are errors.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tools import kept

CSRC = Path(__file__).parents[1] / "csrc"
SOURCES = CSRC / "cuda"
ARCHITECTURES = (80, 90, 100)
FILE = "cuda_kernels_ahead_of_time.json"
FLAGS = [
    "-O3",
    "-std=c++20",
    "-c",
    "-o",
    "/dev/null",
    "-Xptxas=-v",
    "-Werror=all-warnings",
    "-Xcompiler=-Wall,-Wextra,-Werror",
]
PTX = ["-O3", "-std=c++20", "-arch=sm_90", "-ptx"]
_INSTRUCTIONS = {"load of 16 bytes": "ld.global.v4", "store of 16 bytes": "st.global.v4"}
_ENTRY = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for 'sm_(?P<arch>\d+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.S,
)


def compile_source(source: Path, architectures: tuple[int, ...] = ARCHITECTURES) -> str:
    """What ptxas says of one file; RuntimeError where it does not compile."""
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    done = subprocess.run(["nvcc", *FLAGS, *targets, str(source)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc {source.name}: {done.stderr[-4000:]}")
    return done.stderr


def name_of(mangled: str) -> str:
    """A kernel's name and template arguments, without namespaces and parameters."""
    whole = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
    name = re.sub(r"\(anonymous namespace\)|drrlhf::(?:cuda::)?|::", "", whole)
    return re.sub(r"\([^()<>]*(?:\([^()]*\)[^()]*)*\)\s*$", "", name).removeprefix("void ").strip()


def records(said: str) -> list[dict[str, object]]:
    """Rows of the table from what ptxas said."""
    rows: list[dict[str, object]] = []
    for entry in _ENTRY.finditer(said):
        shared = re.search(r"(\d+) bytes smem", entry["rest"])
        rows.append(
            {
                "kernel": name_of(entry["kernel"]),
                "arch": f"sm_{entry['arch']}",
                "registers": int(entry["registers"]),
                "spills": int(entry["stores"]) + int(entry["loads"]),
                "shared": int(shared[1]) if shared else 0,
            }
        )
    return rows


def table(architectures: tuple[int, ...] = ARCHITECTURES) -> list[dict[str, object]]:
    """Every kernel, compiled now."""
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(
            lambda source: compile_source(source, architectures), sorted(SOURCES.glob("*.cu"))
        )
        rows = [row for said in found for row in records(said)]
    known = instructions() if 90 in architectures else {}
    for row in rows:
        if row["arch"] == "sm_90" and row["kernel"] in known:
            row["instructions"] = known[str(row["kernel"])]
    return sorted(rows, key=lambda row: (str(row["kernel"]), str(row["arch"])))


def instructions() -> dict[str, list[str]]:
    """By kernel of rows of logits, how it reads and writes them on sm_90."""
    with tempfile.NamedTemporaryFile(suffix=".ptx") as file:
        command = ["nvcc", *PTX, "-o", file.name, str(SOURCES / "token_logprobs.cu")]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc token_logprobs.cu: {done.stderr[-4000:]}")
        entries = Path(file.name).read_text().split(".entry ")[1:]
    return {
        name_of(name): [what for what, said in _INSTRUCTIONS.items() if said in text]
        for name, text in (entry.split("(", 1) for entry in entries)
    }


def made_from() -> dict[str, object]:
    """What the table follows from."""
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release ([\d.]+)", said)
    assert release is not None, said
    sources = [p for folder in ("core", "cuda") for p in (CSRC / folder).iterdir()]
    return kept.made_from({"nvcc": release[1]}, sources, " ".join(FLAGS + PTX))


def main(folder: str) -> None:
    """Writes the table of every kernel and architecture."""
    kept.write(Path(folder) / FILE, made_from(), table())


if __name__ == "__main__":
    if len(sys.argv) != 2 or not shutil.which("nvcc"):
        sys.exit("usage: python -m tools.cuda_ahead_of_time FOLDER, with nvcc on PATH")
    main(sys.argv[1])
