"""`sequence_preference_loss`, the op: what its kernel refuses by itself, and torch's own checks.

What it gives is held to plain PyTorch by `test_backends_equal_reference`, and to its parts by
`test_linear_preference_loss`, the function that calls it.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from three_ways import BACKENDS

from drrlhf import backends

PAIRS, LENGTH = 6, 5


@pytest.fixture(params=BACKENDS)
def backend(request):
    with backends.use(request.param):
        yield request.param


needs_cpp = pytest.mark.skipif("cpp" not in BACKENDS, reason="the C++ extension is not built")


def op_arguments(packed=False, **change):
    """What the op takes, by name: pairs of ragged sequences whose first token may be ignored."""
    g = torch.Generator().manual_seed(1)
    lengths = torch.randint(2, LENGTH + 1, (2 * PAIRS,), generator=g)
    inside = torch.arange(LENGTH) < lengths.unsqueeze(1)
    labels = torch.where(inside, 3, -100)
    labels[::3, 0] = -100
    labels = labels[inside] if packed else labels
    return {
        "logps": -torch.rand(labels.shape, generator=g),
        "labels": labels,
        "cu_seqlens": F.pad(lengths.cumsum(0), (1, 0)) if packed else None,
        "ref_logps": -5 - 5 * torch.rand(2 * PAIRS, generator=g),
        "nominal": None,
        "groups": None,
        "group_weights": None,
        "ignore_index": -100,
        "beta": 0.1,
        "label_smoothing": 0.0,
        "kind": "tv",
        "parameter": 0.2,
        "temperature": 0.0,
        "trim": 0.0,
        "update": True,
    } | change


@needs_cpp
@pytest.mark.parametrize(
    "change,message",
    [
        ({"cu_seqlens": torch.tensor([1, 9, 20])}, "from 0 to"),
        ({"cu_seqlens": torch.tensor([0, 9, 2**40])}, "from 0 to"),
        ({"cu_seqlens": torch.tensor([0, 2**40, 0])}, "from 0 to|not decrease"),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.long)}, r"expected shape \(S\+1,\)"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, "expected"),
        ({"ref_logps": torch.zeros(3)}, "ref_logps: expected shape"),
        ({"nominal": torch.zeros(3)}, "nominal: expected shape"),
        ({"kind": "group", "groups": torch.zeros(3), "group_weights": torch.ones(2)}, "groups"),
        (
            {"kind": "group", "groups": torch.full((6,), 9), "group_weights": torch.ones(2)},
            "groups",
        ),
        ({"kind": "nonsense"}, "kind: unknown"),
    ],
)
def test_the_kernel_checks_for_itself(change, message):
    arguments = op_arguments(packed=True, **change)
    with pytest.raises(ValueError, match=message):
        torch.ops.drrlhf_cpp.sequence_preference_loss(*arguments.values())


@needs_cpp
def test_the_kernel_checks_for_pairs():
    arguments = op_arguments()
    arguments |= {name: arguments[name][:3] for name in ("logps", "labels", "ref_logps")}
    with pytest.raises(ValueError, match="even number"):
        torch.ops.drrlhf_cpp.sequence_preference_loss(*arguments.values())


@pytest.mark.usual
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["tv", "group"])
def test_opcheck(backend, packed, kind):
    change = {"kind": kind}
    if kind == "group":
        change |= {
            "groups": torch.arange(PAIRS) % 2,
            "group_weights": torch.full((2,), 0.5, dtype=torch.float64),
        }
    arguments = op_arguments(packed, **change)
    arguments["logps"].requires_grad_()
    torch.library.opcheck(
        torch.ops.drrlhf.sequence_preference_loss.default, tuple(arguments.values())
    )
