"""Builds the C++ extension where it can, and says what it built.

DRRLHF_BUILD=auto (default)  build the CPU extension if torch and a compiler are there, otherwise
                             install pure Python and record the reason (`drrlhf doctor` shows it)
             cpu             build it or fail
             none            pure Python
             cuda            refused: this version has no CUDA kernels
torch must be importable during the build: pip install --no-build-isolation .
"""

import json
import os
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

MODE = os.environ.get("DRRLHF_BUILD", "auto")
SOURCES = ["csrc/ops.cpp", *(str(p) for p in sorted(Path("csrc/cpu").glob("*.cpp")))]
HEADERS = [str(p) for p in sorted(Path("csrc").rglob("*.h"))]
FLAGS = [
    "-O3", "-g0", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off",
    "-fvisibility=hidden", "-fopenmp", "-Wall", "-Wextra", "-Wno-unused-parameter",
]  # fmt: skip

if MODE not in ("auto", "cpu", "cuda", "none"):
    sys.exit(f"DRRLHF_BUILD: expected auto, cpu, cuda or none, got {MODE!r}")
if MODE == "cuda":
    sys.exit("DRRLHF_BUILD=cuda: this version has no CUDA kernels yet; use auto, cpu or none")

record = {"mode": "none", "reason": ""}


def obstacle() -> str:
    """Why the extension cannot be built here; empty when it can."""
    if MODE == "none":
        return "DRRLHF_BUILD=none was set"
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except ImportError as error:
        return (
            f"torch was not importable while building ({error}); install torch first and use "
            "pip install --no-build-isolation"
        )
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None and shutil.which("g++") is None:
        return f"no C++ compiler was found ({compiler}); install g++ and reinstall"
    return ""


def extension():
    """The extension and a build_ext that, in auto mode, turns a failed build into a reason."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):
        def run(self) -> None:
            try:
                super().run()
                record["mode"] = "cpu"
            except Exception as error:
                if MODE == "cpu":
                    raise
                record["reason"] = f"the C++ build failed: {error}"
                print(f"drrlhf: {record['reason']}; installing pure Python", file=sys.stderr)
                self.extensions.clear()
            write_record(Path("drrlhf") if self.inplace else Path(self.build_lib, "drrlhf"))

    return [
        CppExtension(
            "drrlhf._C",
            SOURCES,
            depends=HEADERS,
            extra_compile_args={"cxx": FLAGS},
            # Without it at::parallel_for, a template in a header, would run on one thread.
            extra_link_args=["-fopenmp"],
        )
    ], Build


def write_record(folder: Path) -> None:
    if folder.is_dir():
        (folder / "_build.json").write_text(json.dumps(record) + "\n")


class BuildPython(build_py):
    """Leaves the record of the build beside the package, also when there is no extension."""

    def run(self) -> None:
        super().run()
        write_record(Path("drrlhf") if self.editable_mode else Path(self.build_lib, "drrlhf"))


reason = obstacle()
commands: dict = {"build_py": BuildPython}
modules = []
if reason:
    if MODE == "cpu":
        sys.exit(f"DRRLHF_BUILD=cpu: {reason}")
    record["reason"] = reason
else:
    modules, commands["build_ext"] = extension()

setup(
    ext_modules=modules,
    cmdclass=commands,
    packages=[*find_packages(include=["drrlhf", "drrlhf.*"]), "drrlhf.kernels"],
    package_dir={"drrlhf.kernels": "kernels"},  # `kernels` alone is another package
)
