"""The kernels of narrower vectors: what users with older processors run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from drrlhf import backends

HERE = Path(__file__).parent
WIDER = {"default": ("AVX2", "AVX512"), "avx2": ("AVX512",)}
FILES = ("token_logprobs", "linear_token_logprobs", "robust_risk", "row_worst_case", "policy_loss")
FILES += ("many_pairs", "memory", "backends_equal_reference")
TESTS = "cpp and (plain_pytorch or hard_rows or equals_reference or agree_to_rounding or many)"
TESTS += " or test_peak"


@pytest.mark.skipif(not backends.build_info()["built"], reason="the C++ extension is not built")
@pytest.mark.parametrize("capability", WIDER)
def test_narrower_vectors_are_no_less_accurate(capability):
    """Accuracy, tables and memory of the ops once more, by a process of a lower capability."""
    if torch.backends.cpu.get_cpu_capability() not in WIDER[capability]:
        pytest.skip("this process runs nothing wider")
    files = [str(HERE / f"test_{op}.py") for op in FILES]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", TESTS, *files]
    env = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "%]" in done.stdout


def test_no_level_of_vectors_is_asked_for_by_its_name():
    """GCC 11, Ubuntu 22.04's and RHEL 9's, refuses to compile that; it came with GCC 12."""
    sources = [p for p in (HERE.parents[1] / "csrc").rglob("*.*") if p.suffix in (".cpp", ".h")]
    asked = [x for p in sources for x in re.findall(r'_cpu_supports\("([^"]+)"', p.read_text())]
    assert "avx2" in asked
    assert not [x for x in asked if x.startswith("x86-64")]


@pytest.mark.skipif(
    not backends.build_info().get("isa", "").startswith("x86-64"), reason="of GCC on x86"
)
def test_the_widest_vectors_are_those_of_the_processor():
    levels = {
        "x86-64-v4": "avx512f avx512bw avx512cd avx512dq avx512vl",
        "x86-64-v3": "avx2 bmi1 bmi2 f16c fma abm movbe",  # abm has lzcnt
    }
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = set(next(x for x in lines if x.startswith("flags")).split())
    allowed = torch.backends.cpu.get_cpu_capability()
    expected = "x86-64"
    if allowed in ("AVX2", "AVX512") and flags.issuperset(levels["x86-64-v3"].split()):
        expected = "x86-64-v3"
        if allowed == "AVX512" and flags.issuperset(levels["x86-64-v4"].split()):
            expected = "x86-64-v4"
    assert backends.build_info()["isa"] == expected


@pytest.mark.skipif(not backends.build_info()["built"], reason="the C++ extension is not built")
@pytest.mark.skipif(not shutil.which("objdump"), reason="apt-get install binutils")
def test_rows_are_read_from_memory_of_any_alignment():
    """A std::vector begins at any multiple of 16 bytes; from there a load that needs 64 ends the
    process, on processors with AVX-512 alone. The stack and constants are aligned."""
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", backends._EXTENSION.__file__]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions = [f for f in code.split("\n\n") if "solve_rows" in f.strip().partition("\n")[0]]
    wide = [x for f in functions for x in f.splitlines() if re.search(r"\bvmov(ap[sd]|dqa)", x)]
    assert functions
    assert not [x for x in wide if "zmm" in x and re.search(r"\(%(?!rsp|rbp|rip)", x)]
