"""The memory that the head promises to stay within, metered in processes of their own."""

from __future__ import annotations

import child
import pytest

from drrlhf import backends
from drrlhf.bench import memory

SCRIPT = """
import ctypes
import sys
import torch
import drrlhf as dr
from drrlhf.bench.memory import peak_extra_bytes

# Large blocks return to the system when they are freed, so that what is held is what is resident:
# otherwise some processes, by where their heap lies, kept 8 MiB of freed ones between others.
M_MMAP_THRESHOLD = -3
assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 17)
N, V, D = 512, 32064, 256
kind, budget = sys.argv[1], int(sys.argv[2]) or None
generator = torch.Generator().manual_seed(0)
hidden = torch.randn(N, D, generator=generator).bfloat16().requires_grad_(kind != "scored")
weight = (0.1 * torch.randn(V, D, generator=generator)).bfloat16()
weight.requires_grad_(kind == "trained")
labels = torch.randint(0, V, (N,), generator=generator)
upstream = torch.randn(N, generator=generator)


def ours():
    logps = dr.linear_token_logprobs(hidden, weight, labels, memory_budget=budget)
    if kind != "scored":
        logps.backward(upstream)


def plain():
    logits = (hidden @ weight.T).float()
    logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1).backward(upstream)


run = plain if kind == "plain" else ours
run()  # what is allocated once: code, thread pools
hidden.grad = weight.grad = None
print(peak_extra_bytes(run) / 2**20)
"""

pytestmark = [
    pytest.mark.skipif(not backends.build_info()["built"], reason="the C++ extension is not built"),
    pytest.mark.skipif(bool(memory.obstacle("cpu")), reason="memory is not metered here"),
]

HIDDEN = 512 * 256 * 2 / 2**20  # MiB of one copy of hidden
HEAD = 32064 * 256 * 2 / 2**20  # and of the gradient of the head
SLACK = 6  # MiB: the allocator's, and the products' own scratch


LIMITS = {
    ("frozen", 0): 48 + 2 * HIDDEN + SLACK,
    ("frozen", 16): 16 + 2 * HIDDEN + SLACK,
    ("trained", 32): 32 + HEAD + 3 * HIDDEN + SLACK,
    ("trained", 128): 128 + HEAD + 3 * HIDDEN + SLACK,
    ("scored", 0): SLACK,
}


@pytest.fixture(scope="module")
def peaks():
    """MiB of each kind under each budget."""
    kinds = [*LIMITS, ("plain", 0)]
    found = child.run_each([(SCRIPT, {}, [kind, str(b * 2**20)]) for kind, b in kinds])
    assert [done.stderr for done in found if done.returncode] == []
    return dict(zip(kinds, (float(done.stdout) for done in found), strict=True))


@pytest.mark.parametrize("kind,budget", LIMITS)
def test_peak(kind, budget, peaks):
    assert peaks[kind, budget] <= LIMITS[kind, budget]


def test_plain_pytorch_is_far_above(peaks):
    """Or the meter would see nothing."""
    assert peaks["plain", 0] > 150
