"""Builds the C++ extension where it can, and says what it built.

DRRLHF_BUILD=auto (default)  build the CPU extension if torch and a compiler are there, with CUDA
                             kernels if torch is a CUDA build and nvcc is there; otherwise install
                             without, and record the reason (`drrlhf doctor` shows it)
             cpu             build the CPU extension or fail
             cuda            build it with CUDA kernels or fail; no GPU is needed for that
             none            pure Python
TORCH_CUDA_ARCH_LIST         what CUDA kernels are compiled for; default "8.0;9.0;10.0+PTX", with an
                             nvcc before 12.8 "8.0;9.0+PTX"
torch must be importable during the build: pip install --no-build-isolation .
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

MODE = os.environ.get("DRRLHF_BUILD", "auto")
CPU_SOURCES = ["csrc/ops.cpp", *(str(p) for p in sorted(Path("csrc/cpu").glob("*.cpp")))]
CUDA_SOURCES = ["csrc/ops_cuda.cpp", *(str(p) for p in sorted(Path("csrc/cuda").glob("*.c*")))]
HEADERS = [str(p) for kind in ("*.h", "*.inc") for p in sorted(Path("csrc").rglob(kind))]
FLAGS = [
    "-O3", "-g0", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off",
    "-fvisibility=hidden", "-fopenmp", "-Wall", "-Wextra", "-Wno-unused-parameter",
    "-Wno-psabi",
]  # fmt: skip

NVCC_FLAGS = ["-O3", "-std=c++20", "-Xcompiler=-fvisibility=hidden,-Wall,-Wextra"]
ARCHITECTURES = "8.0;9.0;10.0+PTX"
OLDER_ARCHITECTURES = "8.0;9.0+PTX"  # for an nvcc that knows no 10.0

if MODE not in ("auto", "cpu", "cuda", "none"):
    sys.exit(f"DRRLHF_BUILD: expected auto, cpu, cuda or none, got {MODE!r}")
record = {"mode": "none", "reason": "", "cuda_reason": ""}


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


def cuda_obstacle() -> str:
    """Why CUDA kernels cannot be built here; empty when they can."""
    if MODE == "cpu":
        return "DRRLHF_BUILD=cpu was set"
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    if CUDA_HOME is None or not Path(CUDA_HOME, "bin", "nvcc").exists():
        return "nvcc was not found; install the CUDA toolkit or set CUDA_HOME"
    return ""


def default_architectures() -> str:
    """What the nvcc that will be called can compile for."""
    from torch.utils.cpp_extension import CUDA_HOME

    nvcc = str(Path(CUDA_HOME, "bin", "nvcc"))
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+)\.(\d+)", said)
    older = release and (int(release[1]), int(release[2])) < (12, 8)
    return OLDER_ARCHITECTURES if older else ARCHITECTURES


def architectures() -> list[str]:
    """TORCH_CUDA_ARCH_LIST as torch reads it, without the names that only it knows."""
    if "TORCH_CUDA_ARCH_LIST" not in os.environ:
        os.environ["TORCH_CUDA_ARCH_LIST"] = default_architectures()
    listed = os.environ["TORCH_CUDA_ARCH_LIST"]
    found = [x for x in re.split(r"[;\s]+", listed) if x]
    bad = [x for x in found if not re.fullmatch(r"\d+\.\d[a-z]?(\+PTX)?", x)]
    if bad or not found:
        sys.exit(
            f"TORCH_CUDA_ARCH_LIST: expected numbers such as {ARCHITECTURES!r}, got {listed!r}"
        )
    return found


def module(cuda: bool):
    """The extension, with or without CUDA kernels."""
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    kind, flags, macros = CppExtension, {"cxx": FLAGS}, []
    if cuda:
        kind, flags["nvcc"] = CUDAExtension, NVCC_FLAGS
        macros = [("DRRLHF_CUDA", f'"{" ".join(architectures())}"')]
    return kind(
        "drrlhf._C",
        CPU_SOURCES + (CUDA_SOURCES if cuda else []),
        depends=HEADERS,
        define_macros=macros,
        extra_compile_args=flags,
        # Without it at::parallel_for, a template in a header, would run on one thread.
        extra_link_args=["-fopenmp"],
    )


def build_command():
    """A build_ext that, in auto mode, turns a failed build into a lesser one and a reason."""
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def run(self) -> None:
            cuda = not record["cuda_reason"]
            inplace, editable = self.inplace, self.editable_mode
            try:
                super().run()
                record["mode"] = "cuda" if cuda else "cpu"
            except Exception as error:
                if MODE != "auto":
                    raise
                what, instead = ("CUDA", "no CUDA kernels") if cuda else ("C++", "pure Python")
                reason = f"the {what} build failed: {error}"
                print(f"drrlhf: {reason}; installing {instead}", file=sys.stderr)
                record["cuda_reason" if cuda else "reason"] = reason
                if cuda:
                    self.distribution.ext_modules = [module(False)]
                    self.reinitialize_command("build_ext")
                    self.inplace, self.editable_mode = inplace, editable
                    self.ensure_finalized()
                    return self.run()
                self.inplace = inplace  # which a build that fails leaves changed
                self.extensions.clear()
            write_record(Path("drrlhf") if self.inplace else Path(self.build_lib, "drrlhf"))

    return Build


def write_record(folder: Path) -> None:
    if folder.is_dir():
        (folder / "_build.json").write_text(json.dumps(record) + "\n")


class BuildPython(build_py):
    """Leaves the record of the build beside the package, also when there is no extension."""

    def run(self) -> None:
        super().run()
        write_record(Path("drrlhf") if self.editable_mode else Path(self.build_lib, "drrlhf"))


class BuildNothing(build_ext):
    """Leaves the record of why there is no extension where one was to be built in place."""

    def run(self) -> None:
        write_record(Path("drrlhf") if self.inplace else Path(self.build_lib, "drrlhf"))


reason = obstacle()
commands: dict = {"build_py": BuildPython, "build_ext": BuildNothing}
modules = []
if reason:
    if MODE in ("cpu", "cuda"):
        sys.exit(f"DRRLHF_BUILD={MODE}: {reason}")
    record["reason"] = reason
else:
    record["cuda_reason"] = cuda_obstacle()
    if MODE == "cuda" and record["cuda_reason"]:
        sys.exit(f"DRRLHF_BUILD=cuda: {record['cuda_reason']}")
    modules, commands["build_ext"] = [module(not record["cuda_reason"])], build_command()

setup(
    ext_modules=modules,
    cmdclass=commands,
    packages=[*find_packages(include=["drrlhf", "drrlhf.*"]), "drrlhf.kernels"],
    package_dir={"drrlhf.kernels": "kernels"},  # `kernels` alone is another package
)
