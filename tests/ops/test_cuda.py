"""What the CUDA backend promises without a GPU: what kernels compile to, how it is chosen."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from drrlhf import backends
from tools import kept

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "benchmarks" / "results" / "cuda_kernels_ahead_of_time.json"
needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed")


def test_the_kept_table_is_of_every_architecture_and_of_no_spills():
    rows = json.loads(KEPT.read_text())["records"]
    assert {r["arch"] for r in rows} == {"sm_80", "sm_90", "sm_100"} and len(rows) >= 150
    assert [r for r in rows if r["spills"]] == []


# One text for all chips, apart from instructions: one of them shows warnings and kernels by name.
# What is compiled for one goes to one worker.
CHIPS = [
    pytest.param(
        arch,
        marks=[
            pytest.mark.xdist_group(f"compiled by nvcc {arch}"),
            *([] if arch == 90 else [pytest.mark.thorough]),
        ],
    )
    for arch in (80, 90, 100)
]


@pytest.fixture(scope="module", params=CHIPS)
def compiled(request):
    """Rows of one architecture, which are of now where the table was made from something else."""
    from tools import cuda_ahead_of_time as ahead

    arch = request.param
    return arch, kept.rows(KEPT, ahead.made_from(), arch, lambda: ahead.table((arch,)))


@needs_nvcc
def test_kernels_compile_without_warnings_or_spills_as_the_kept_table_says(compiled):
    from tools import cuda_ahead_of_time as ahead

    arch, found = compiled
    command = "python -m tools.cuda_ahead_of_time benchmarks/results"
    assert kept.differences(KEPT, ahead.made_from(), arch, found) == [], command
    assert len(found) >= 50 and {r["arch"] for r in found} == {f"sm_{arch}"}
    assert [r for r in found if r["spills"]] == []


@needs_nvcc
def test_rows_are_read_and_written_16_bytes_at_a_time(compiled):
    arch, found = compiled
    rows = [row for row in found if "instructions" in row]
    assert len(rows) == (48 if arch == 90 else 0)
    for row in rows:
        name, instructions = row["kernel"], row["instructions"]
        assert "load of 16 bytes" in instructions, name
        if "backward" in name or "chunk" in name:
            assert "store of 16 bytes" in instructions, name


def test_kernels_know_no_torch():
    """nvcc sees no torch: kernels, and whatever they include."""
    left, seen = sorted((ROOT / "csrc" / "cuda").glob("*.cu")), set()
    while left:
        path = left.pop().resolve()
        if path in seen:
            continue
        seen.add(path)
        text = path.read_text()
        assert "ATen" not in text and "torch/" not in text and "c10" not in text, path.name
        left += [path.parent / name for name in re.findall(r'#include "(.*)"', text)]
    assert {p.name for p in seen if p.suffix == ".h"} >= {"kernels.h", "softmax.h", "math.h"}


# As much of CUDA as csrc/cuda/device.h takes, where every call fails and is on record.
FAILING_CUDA = """
#include <cstdint>
#define __global__
#define __device__
#define __shared__
#define __launch_bounds__(...)
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
inline cudaError_t recorded = cudaSuccess;
inline cudaError_t fail() { return recorded = cudaErrorInvalidValue; }
inline cudaError_t cudaGetLastError() { auto e = recorded; recorded = cudaSuccess; return e; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid value"; }
struct dim3 { dim3(unsigned = 1) {} };
using cudaStream_t = void*;
enum { cudaLaunchAttributeCooperative, cudaDevAttrMultiProcessorCount };
struct cudaLaunchAttribute { int id; struct { int cooperative; } val; };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim; cudaStream_t stream; cudaLaunchAttribute* attrs; int numAttrs;
};
template <class... A> cudaError_t cudaLaunchKernelEx(A...) { return fail(); }
inline cudaError_t cudaGetDevice(int*) { return fail(); }
inline cudaError_t cudaDeviceGetAttribute(int*, int, int) { return fail(); }
template <class... A> cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(A...) {
  return fail();
}
inline cudaError_t cudaMemsetAsync(void*, int, std::size_t, cudaStream_t) { return fail(); }
template <class T> T __ldcg(const T* x) { return *x; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline void __nanosleep(int) {}
inline float __float2bfloat16_rn(float x) { return x; }
inline unsigned short __bfloat16_as_ushort(float) { return 0; }
inline float __float2half_rn(float x) { return x; }
inline unsigned short __half_as_ushort(float) { return 0; }
inline float __ushort_as_half(unsigned short) { return 0; }
inline float __half2float(float x) { return x; }
"""
AFTER_FAILURES = """
#include <cstdio>
#include "cuda/device.h"
void kernel() {}
int main() {
  using namespace drrlhf::cuda;
  std::printf("%d ", recorded), std::printf("%s ", launch(kernel, 1, 1, nullptr));
  std::printf("%d ", recorded), std::printf("%s ", clear_memory(nullptr, 1, nullptr));
  std::printf("%d ", recorded), std::printf("%d ", blocks_at_once(kernel, 1));
  std::printf("%d", recorded);
}
"""


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
def test_a_failure_that_is_told_is_not_found_again(tmp_path):
    """PyTorch asks for CUDA's last error after its own launches, and would raise ours once more."""
    (tmp_path / "cuda_runtime.h").write_text(FAILING_CUDA)
    for name in ("cuda_bf16.h", "cuda_fp16.h"):
        (tmp_path / name).write_text("")
    (tmp_path / "main.cpp").write_text(AFTER_FAILURES)
    compiled = ["c++", "-std=c++20", "-w", f"-I{tmp_path}", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*compiled, tmp_path / "main.cpp", "-o", tmp_path / "main"], check=True)
    said = subprocess.run([tmp_path / "main"], capture_output=True, text=True, check=True).stdout
    assert said == "0 invalid value 0 invalid value 0 0 0"


def test_architectures_that_run_a_gpu():
    built = ("8.0", "9.0", "10.0+PTX")
    runs = {(7, 5): False, (8, 0): True, (8, 6): True, (9, 0): True, (10, 0): True, (12, 0): True}
    assert {c: backends._runs_on(c, built) for c in runs} == runs
    assert not backends._runs_on((12, 0), ("8.0", "9.0"))


@pytest.mark.parametrize("ptx", ["", "+PTX"])
@pytest.mark.parametrize(
    ("built", "runs"),
    [("9.0a", {(9, 0)}), ("10.0a", {(10, 0)}), ("10.0f", {(10, 0), (10, 3)}), ("10.3f", {(10, 3)})],
)
def test_architectures_with_a_letter_run_nowhere_else(built, runs, ptx):
    capabilities = [(8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)]
    assert {c for c in capabilities if backends._runs_on(c, (built + ptx,))} == runs
    assert backends._runs_on((8, 6), (built + ptx, "8.0"))


class Built:
    """A build with kernels for one architecture."""

    @staticmethod
    def build_info():
        return {"cuda": True, "cuda_architectures": ["9.0"]}


@pytest.fixture
def on_an_old_gpu(monkeypatch):
    monkeypatch.setattr(backends, "_EXTENSION", Built)
    monkeypatch.setattr(backends.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends.torch.cuda, "get_device_capability", lambda _: (8, 6))


@pytest.mark.skipif("DRRLHF_EMULATED" in os.environ, reason="there it serves the CPU")
def test_a_build_for_another_gpu_says_what_it_has(on_an_old_gpu):
    with (
        backends.use("cuda"),
        pytest.raises(
            backends.BackendError,
            match=r"kernels for compute capability 9\.0, this GPU has 8\.6; rebuild with .*=8\.6",
        ),
    ):
        backends.kernel("robust_risk", "cuda")


@pytest.mark.skipif("DRRLHF_EMULATED" in os.environ, reason="there it serves the CPU")
def test_a_build_without_kernels_says_so():
    if backends.build_info().get("cuda"):
        pytest.skip("this build has them")
    with backends.use("cuda"), pytest.raises(backends.BackendError, match=r"built|CUDA"):
        backends.kernel("robust_risk", "cuda")


def run_setup(*, folder=ROOT, **environment):
    return subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


# A torch of which setup.py sees enough to say what it would build.
CUDA_TORCH = """
import pathlib
from setuptools import Extension
from setuptools.command.build_ext import build_ext as BuildExtension

CUDA_HOME = str(pathlib.Path(__file__).parents[2])  # where bin/nvcc lies


def CUDAExtension(name, sources, define_macros, depends, extra_compile_args, extra_link_args):
    print("built for", *define_macros[0])
    return Extension(name, sources)
"""


@pytest.mark.parametrize(
    ("release", "built"),
    [
        ("12.4", "8.0 9.0+PTX"),
        ("12.8", "8.0 9.0 10.0+PTX"),
        ("13.0", "8.0 9.0 10.0+PTX"),
    ],
)
def test_the_default_is_what_nvcc_knows(tmp_path, monkeypatch, release, built):
    """Before 12.8 it knows no 10.0, and the whole build failed."""
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    (tmp_path / "torch" / "utils").mkdir(parents=True)
    version = "class version:\n    cuda = '12.4'\n__version__ = '2.6'\n"
    (tmp_path / "torch" / "__init__.py").write_text(version)
    (tmp_path / "torch" / "utils" / "__init__.py").write_text("")
    (tmp_path / "torch" / "utils" / "cpp_extension.py").write_text(
        CUDA_TORCH + "CppExtension = CUDAExtension\n"
    )
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    nvcc.chmod(0o755)
    settings = {"DRRLHF_BUILD": "cuda", "PYTHONPATH": str(tmp_path)}
    assert f'"{built}"' in run_setup(**settings).stdout
    listed = run_setup(TORCH_CUDA_ARCH_LIST="8.6", **settings)
    assert '"8.6"' in listed.stdout


def test_a_build_that_cannot_be_is_refused_with_the_reason():
    import torch

    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    done = run_setup(DRRLHF_BUILD="cuda")
    assert done.returncode and "is not a CUDA build" in done.stderr
    done = run_setup(DRRLHF_BUILD="gpu")
    assert done.returncode and "expected auto, cpu, cuda or none, got 'gpu'" in done.stderr


@pytest.mark.cuda_build
@needs_nvcc
def test_the_whole_extension_links_against_a_cuda_torch(tmp_path):
    """In an environment of its own; minutes, gigabytes, and no GPU."""
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    install = [python, "-m", "pip", "install", "-q"]
    subprocess.run([*install, "torch==2.14.1", "setuptools>=77", "wheel", "ninja"], check=True)
    where = "import nvidia, pathlib; print(pathlib.Path(list(nvidia.__path__)[0]) / 'cu13')"
    found = subprocess.run([python, "-c", where], capture_output=True, text=True, check=True)
    toolkit = Path(found.stdout.strip())
    # The wheel has no unversioned name for the linker.
    (tmp_path / "libcudart.so").symlink_to(toolkit / "lib" / "libcudart.so.13")
    nvcc = Path(
        subprocess.run(["nvcc", "--dryrun", "-c", "x.cu"], capture_output=True, text=True)
        .stderr.split("_HERE_=")[1]
        .split()[0]
    )
    settings = {
        **os.environ,
        "DRRLHF_BUILD": "cuda",
        "CUDA_HOME": str(nvcc.parent),
        "MAX_JOBS": "2",
        # nvcc's own headers first: those of the wheel have no crt/.
        "CPATH": f"{nvcc.parent / 'include'}:{toolkit / 'include'}",
        "LIBRARY_PATH": str(tmp_path),
    }
    subprocess.run(
        [*install, "--no-build-isolation", "--no-deps", str(ROOT)], env=settings, check=True
    )
    code = """
import torch, drrlhf as dr
from drrlhf import backends
info = backends.build_info()
assert info["mode"] == "cuda" and info["cuda_architectures"] == ["8.0", "9.0", "10.0+PTX"], info
for op in backends.OPS:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"drrlhf_cpp::{op}", "CUDA"), op
assert backends.serving("robust_risk", "cuda") == "cuda"
assert abs(float(dr.robust_risk(torch.arange(4.0), "tv:0.25").value) - 2.25) < 1e-6
"""
    subprocess.run([python, "-c", code], cwd=tmp_path, check=True)
