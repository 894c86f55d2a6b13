"""What C++ says when it refuses: numbers and shapes in full, and without streams."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from drrlhf import backends

CSRC = Path(__file__).parents[2] / "csrc"
# Each makes a message with a stream, or is one: see csrc/message.h, the one place that may.
STREAMS = re.compile(
    r"\bTORCH_\w*CHECK|\bTORCH_INTERNAL_ASSERT|\bTORCH_WARN|\bAT_ERROR|\bAT_ASSERT|\bAT_DISPATCH|"
    r"\bc10::str\b|\bstd::\w*stream\b|\bstd::c(out|err)\b|#include <\w*stream>"
)


def test_messages_go_through_no_stream():
    """Two copies of libstdc++ in a process, as static linking makes them, share no streams."""
    skipped = ("message.h", "FACTS.md")
    texts = {p.name: p.read_text() for p in CSRC.rglob("*.*") if p.name not in skipped}
    found = {name: STREAMS.search(re.sub("//.*", "", text)) for name, text in texts.items()}
    assert len(found) > 30 and [name for name, hit in found.items() if hit] == []
    # The one place hands torch one string, which it leaves as it is.
    macros = re.sub(r"\\\n", " ", (CSRC / "message.h").read_text())
    checks = re.findall(r"TORCH_CHECK\w*\(condition, (.*)\)$", macros, flags=re.MULTILINE)
    assert checks == ["::drrlhf::message(__VA_ARGS__)"] * 2


@pytest.mark.skipif(not backends.build_info()["built"], reason="the C++ extension is not built")
@pytest.mark.parametrize(
    "nominal,text",
    [(-2.5, "-2.5"), (-1e-9, "-1e-09"), (float("inf"), "inf"), (float("nan"), "nan")],
)
def test_numbers_are_said_in_full(nominal, text):
    weights = torch.tensor([1.0, nominal, 1.0], dtype=torch.float64)
    with pytest.raises(ValueError) as refused:
        torch.ops.drrlhf_cpp.robust_risk(
            torch.zeros(3), weights, None, None, "erm", 0.0, 0.0, 0.0, True
        )
    assert str(refused.value) == (
        f"nominal: expected finite weights >= 0 (0 masks a pair), got {text} at index 1; drop or "
        "clamp it"
    )


@pytest.mark.skipif(not backends.build_info()["built"], reason="the C++ extension is not built")
def test_shapes_dtypes_and_words_are_said_in_full():
    ops = torch.ops.drrlhf_cpp
    with pytest.raises(ValueError) as refused:
        ops.token_logprobs(
            torch.zeros(2, 3, 5), torch.zeros(4, dtype=torch.long), -100, 1.0, None, 0
        )
    assert str(refused.value) == "labels: expected a CPU tensor of shape [2, 3], got [4]"
    with pytest.raises(ValueError) as refused:
        ops.token_logprobs(
            torch.zeros(2, 5).double(), torch.zeros(2, dtype=torch.long), -100, 1.0, None, 0
        )
    assert str(refused.value) == "logits: expected float32, bfloat16 or float16, got Double"
    with pytest.raises(ValueError, match=r"^kind: unknown 'of_mine'$"):
        ops.robust_risk(torch.zeros(3), None, None, None, "of_mine", 0.0, 0.0, 0.0, True)
