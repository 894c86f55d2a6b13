"""Builds csrc/cuda and csrc/ops_cuda.cpp for the host: python tests/emulated/build.py FILE.so

The kernels run as they stand on a stand-in for CUDA, cuda_on_host.h, and serve CPU tensors as
torch.ops.drrlhf_emulated. Loading the file with torch.ops.load_library registers them.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [ROOT / "csrc/ops_cuda.cpp", *sorted((ROOT / "csrc/cuda").glob("*.c*"))]


def newest() -> float:
    """When the newest text that the library is made of was written."""
    texts = [*(ROOT / "csrc").rglob("*.*"), *Path(__file__).parent.glob("*.*")]
    return max(path.stat().st_mtime for path in texts)


def build(library: Path, compiler: str = "c++") -> Path:
    """Compiles what changed and links it."""
    if library.exists() and library.stat().st_mtime > newest():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    includes = [f"-isystem{p}" for p in (*include_paths(), sysconfig.get_path("include"))]
    flags = [
        "-std=c++20",
        "-O1",  # without -g, which takes as long again over torch's headers
        "-fPIC",
        "-Wall",
        "-Wextra",
        "-Wno-unused-parameter",
        "-Wno-unknown-pragmas",
        "-ffp-contract=off",
        "-DDRRLHF_EMULATED",
        "-DDRRLHF_NO_MULTIVERSION",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f"-I{Path(__file__).parent}",
    ]

    def compiled(source: Path) -> str:
        out = library.with_name(f"{library.stem}.{source.stem}.o")
        command = [compiler, *flags, *includes, "-x", "c++", "-c", str(source), "-o", str(out)]
        subprocess.run(command, check=True)
        return str(out)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, SOURCES))
    folders = library_paths()
    subprocess.run(
        [
            compiler,
            "-shared",
            *objects,
            "-o",
            str(library),
            *(f"-L{p}" for p in folders),
            *(f"-Wl,-rpath,{p}" for p in folders),
            "-lc10",
            "-ltorch",
            "-ltorch_cpu",
        ],
        check=True,
    )
    return library


if __name__ == "__main__":
    build(Path(sys.argv[1]).resolve())
