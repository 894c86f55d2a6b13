"""What a process of the tests does otherwise for interpreted Triton kernels (TRITON_INTERPRET=1),
for CUDA kernels built for the host (DRRLHF_EMULATED=FILE.so), on a GPU
(DRRLHF_TEST_DEVICE=cuda and the backend under test in DRRLHF_TEST_BACKEND), where every tensor that
a test makes is made, and with fresh memory filled with NaN (DRRLHF_FILL=1), so that whatever reads
what nothing wrote is found; with another build of the extension (DRRLHF_EXTENSION=FILE), such as
tests/sanitizers makes.

The tests stand in three layers, by their marks. What has none runs in every mode.

mathematics: what an op means. Proved once, on plain PyTorch, in the usual run.
(none): what a backend does. `test_backends_equal_reference` holds each to plain PyTorch, and with
    it to the mathematics; beside it stand the tests of a backend's own traps.
accuracy: errors beside those of PyTorch. Only where the arithmetic is the real one: in the usual
    run and on a GPU, neither interpreted nor emulated.

usual: what a function makes of an op whatever backend serves it (torch.func, compositions), or what
    rows of the table say too. In the usual run, for every backend that it has.

Two more marks keep a run short that is made before every change:

thorough: a case, mostly a `pytest.param` or a row of tests/cases, that proves on other numbers or
    another chip what a case beside it proves; `in_turn` marks those of a product of two parameters.
pairwise: of the product of a test's parameters as many cases as it takes for any two values of
    two parameters to meet (tests/cases).

DRRLHF_ALL=1 runs every layer and every case in whatever mode it is.
"""

from __future__ import annotations

import gc
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
from tests.cases import cover

MODES = ("DRRLHF_FILL", "TRITON_INTERPRET", "DRRLHF_EMULATED")
USUAL = not any(os.environ.get(mode, "0") != "0" for mode in MODES)
ALL = os.environ.get("DRRLHF_ALL", "0") != "0"
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
        backends._no_cuda = lambda *_: ""


def _left_out(item):
    """Whether another backend, or another mode, has proved what this test proves."""
    if ALL:
        return False
    marks = {mark.name for mark in item.iter_markers()}
    if "thorough" in marks:
        return True
    if "mathematics" in marks:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        return not USUAL or parameters.get("backend", "reference") != "reference"
    return not USUAL and bool(marks & {"accuracy", "usual"})


def _beyond_pairs(items):
    """Of the tests marked pairwise the cases in which no two values meet for the first time."""
    products = defaultdict(list)
    for item in items:
        if not ALL and item.get_closest_marker("pairwise"):
            products[item.nodeid.partition("[")[0]].append(item)
    for product in products.values():
        # A value is known by its identity: what pytest counts is the cases, not the values.
        kept = {*cover([tuple(map(id, item.callspec.params.values())) for item in product])}
        yield from (item for k, item in enumerate(product) if k not in kept)


# Fixtures of a module that take seconds: a second worker would make them again.
SHARED = {
    "quick",
    "place",
    "folder",
    "on_torchrun",
    "outcome",
    "finished",
    "material",
    "pair",
    "pair_with_our_head",
    "splits",
    "peaks",
    "children",
}


def pytest_itemcollected(item):
    """Sends the tests of a module that share one of SHARED to one worker; xdist reads the groups
    before other plugins may change the list."""
    sent = item.get_closest_marker("xdist_group")
    if not sent and SHARED & set(getattr(item, "fixturenames", ())):
        item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))


def pytest_collection_modifyitems(config, items):
    """Leaves out what takes minutes unless it is asked for by its mark, and what another layer
    proves."""
    built = "cuda_build" in config.getoption("-m")
    dropped = {
        item
        for item in items
        if (item.get_closest_marker("cuda_build") and not built) or _left_out(item)
    }
    dropped |= {*_beyond_pairs([item for item in items if item not in dropped])}
    config.hook.pytest_deselected(items=list(dropped))
    items[:] = [item for item in items if item not in dropped]


def pytest_collection_finish():
    """What is there once all modules are imported stays: every trainer that ends walks all objects
    for garbage, a quarter of a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def precision_stays():
    """transformers sets it for the whole process where a trainer compiles; what came after on the
    same worker then multiplied in TF32."""
    before = torch.backends.fp32_precision
    yield
    if torch.backends.fp32_precision != before:
        torch.backends.fp32_precision = before


@pytest.fixture
def fresh_memory_is_nan():
    """What DRRLHF_FILL=1 does to all tests, for one of them."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
