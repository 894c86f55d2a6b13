"""The kernels of narrower vectors: what users with older processors run."""

from __future__ import annotations

import os
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
