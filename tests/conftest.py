"""What a process of the tests does otherwise for interpreted Triton kernels (TRITON_INTERPRET=1),
for CUDA kernels built for the host (DRRLHF_EMULATED=FILE.so), on a GPU
(DRRLHF_TEST_DEVICE=cuda and the backend under test in DRRLHF_TEST_BACKEND), where every tensor that
a test makes is made, and with fresh memory filled with NaN (DRRLHF_FILL=1), so that whatever reads
what nothing wrote is found; with another build of the extension (DRRLHF_EXTENSION=FILE), such as
tests/sanitizers makes.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections import defaultdict

import pytest
import torch

if extension := os.environ.get("DRRLHF_EXTENSION"):
    spec = importlib.util.spec_from_file_location("drrlhf._C", extension)
    sys.modules["drrlhf._C"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["drrlhf._C"])

from drrlhf import backends, ops

# Parameter sets of one test: the interpreter takes a second for what a kernel does in none, the
# host a millisecond. DRRLHF_MOST=1000 runs all.
MOST = 5 if os.environ.get("TRITON_INTERPRET") == "1" else 24
MOST = int(os.environ.get("DRRLHF_MOST", MOST))
FILL = os.environ.get("DRRLHF_FILL") == "1"


def pytest_configure(config):
    if FILL:
        torch.use_deterministic_algorithms(True)
    if os.environ.get("TRITON_INTERPRET") == "1":
        # numpy says of infinities and NaN what kernels keep quiet about.
        config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning")
        config.addinivalue_line("filterwarnings", "ignore::UserWarning:triton")
    if (device := os.environ.get("DRRLHF_TEST_DEVICE", "cpu")) != "cpu":
        torch.set_default_device(device)

        class Generator(torch.Generator):  # a type still: libraries annotate with it
            def __new__(cls, where=device):
                return super().__new__(cls, where)

        torch.Generator = Generator
    if library := os.environ.get("DRRLHF_EMULATED"):
        emulated = torch.library.Library("drrlhf_emulated", "DEF")
        for schema in ops.SCHEMAS.values():
            emulated.define(schema)
        config.emulated = emulated  # its ops are gone when it is
        torch.ops.load_library(library)
        backends.LIBRARIES["cuda"] = "drrlhf_emulated"
        backends.DEVICES["cuda"] = ("cuda", "cpu")
        backends._no_cuda = lambda: ""


def pytest_collection_modifyitems(config, items):
    """Leaves out what takes minutes unless it is asked for by its mark; of a test with many
    parameter sets, runs as many as MOST, evenly spread, in another mode than the usual."""
    dropped = set()
    if "cuda_build" not in config.getoption("-m"):
        dropped = {item for item in items if item.get_closest_marker("cuda_build")}
    modes = ("DRRLHF_FILL", "TRITON_INTERPRET", "DRRLHF_EMULATED")
    if any(os.environ.get(mode, "0") != "0" for mode in modes):
        by_test = defaultdict(list)
        for item in items:
            by_test[item.nodeid.split("[")[0]].append(item)
        kept = set()
        for same in by_test.values():
            step = max(1.0, len(same) / MOST)
            kept |= {same[int(i * step)] for i in range(min(len(same), MOST))}
        dropped |= set(items) - kept
    config.hook.pytest_deselected(items=list(dropped))
    items[:] = [item for item in items if item not in dropped]


@pytest.fixture
def fresh_memory_is_nan():
    """What DRRLHF_FILL=1 does to all tests, for one of them."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
