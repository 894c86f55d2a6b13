"""Attention over a row of blocks against its definition in float64, on a CPU and on a GPU."""

from __future__ import annotations

import random
import types

import pytest

pytest.importorskip("transformers")

import torch
from three_ways import ON_GPU

from drrlhf.layouts import attention, attention_cpu, attention_gpu, layout
from drrlhf.layouts.layout import Block

# Prefixes: right before, apart, in two pieces, of which one adjoins; blocks by themselves, of which
# one lies between a block and its prefix.
BLOCKS = (Block(0, 7), Block(7, 10, 0, 7), Block(10, 15, 0, 7), Block(15, 19, 0, 7, 10, 13))
BLOCKS += (Block(19, 22, 0, 5, 10, 19), Block(22, 25), Block(25, 27), Block(27, 30, 22, 24))
BLOCKS += (Block(30, 31),)
# More than 128 queries, a prefix that lies apart, one token alone.
LONGER = (Block(0, 150), Block(150, 170, 0, 150), Block(170, 470, 0, 150))
LONGER += (Block(470, 640, 0, 150, 170, 370), Block(640, 670), Block(670, 671, 640, 670))
PACKED = (Block(0, 3), Block(3, 12), Block(12, 13))
SINGLE = (Block(0, 1), Block(1, 2))


def attention_problem(blocks, dtype, window, scale, width=8):
    """Attention of 6 heads over 2 of keys by its definition in float64: inputs in ``dtype``, a
    gradient of the result, and the result with the gradients of the inputs."""
    generator = torch.Generator().manual_seed(0)
    length = blocks[-1].stop
    q, k, v, outer = (
        torch.randn(1, h, length, width, generator=generator).to(dtype) for h in (6, 2, 2, 6)
    )
    inputs = [x.double().requires_grad_() for x in (q, k, v)]
    seen = torch.zeros(length, length, dtype=torch.bool)
    for block in blocks:
        before = [*range(block.before, block.before_stop), *range(block.then, block.then_stop)]
        for i in range(block.start, block.stop):
            every = [*before, *range(block.start, i + 1)]
            seen[i, every[-(window or length) :]] = True
    keys, values = (x.repeat_interleave(3, 1) for x in inputs[1:])
    scores = (inputs[0] @ keys.mT) * (scale or width**-0.5)
    result = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values
    gradients = torch.autograd.grad(result, inputs, outer.double())
    return (q, k, v), outer, (result.detach(), *gradients)


def attended(inputs, outer, **options):
    """The result (1, heads, T, width) of `block_attention` and its gradients."""
    module = torch.nn.Module()
    module.num_key_value_groups = 3
    inputs = [x.detach().requires_grad_() for x in inputs]
    found, _ = attention.block_attention(module, *inputs, None, **options)
    gradients = torch.autograd.grad(found, inputs, outer.transpose(1, 2))
    return found.detach().transpose(1, 2), *gradients


def errors(found, expected):
    return [(x - y).square().mean().sqrt() for x, y in zip(found, expected, strict=True)]


def strided(tensor):
    """The same numbers, those of a head apart from one another."""
    return tensor.mT.contiguous().mT


class Flash:
    """What `attention_gpu` is told of PyTorch's flash attention, by definition: sequence by
    sequence, queries at the end of their keys. Without it a CPU runs all but the kernels."""

    @staticmethod
    def result(q, k, v, of_q, of_k, left, scale):
        parts = []
        for (a, b), (c, d) in zip(of_q.unfold(0, 2, 1).tolist(), of_k.unfold(0, 2, 1).tolist()):
            behind = torch.arange(a, b)[:, None] + (d - c) - (b - a) - a - torch.arange(d - c)
            seen = (behind >= 0) & (behind <= (d if left is None else left))
            queries = q[a:b].transpose(0, 1)
            keys, values = (x[c:d].transpose(0, 1).repeat_interleave(3, 0) for x in (k, v))
            scores = (queries @ keys.mT * scale).masked_fill(~seen, -torch.inf)
            parts.append((scores.softmax(-1) @ values).transpose(0, 1))
        return torch.cat(parts)

    @classmethod
    def forward(
        cls,
        q,
        k,
        v,
        of_q,
        of_k,
        most_q,
        most_k,
        dropout,
        causal,
        debug,
        *,
        scale,
        window_size_left=None,
        window_size_right=None,
    ):
        assert of_q.dtype == of_k.dtype == torch.int32 and most_q >= max(2, of_q.diff().max())
        assert most_k >= of_k.diff().max() and of_k[-1] == len(k) == len(v)
        assert (dropout, causal, debug) == (0.0, True, False) and window_size_right in (None, 0)
        assert all(x.stride(-1) == 1 for x in (q, k, v)), "as PyTorch asks"
        out = cls.result(q, k, v, of_q, of_k, window_size_left, scale)
        empty = out.new_zeros(0)
        return out, out.new_ones(3), empty + 1, empty + 2, empty

    @classmethod
    def backward(
        cls,
        grad,
        q,
        k,
        v,
        out,
        sums,
        of_q,
        of_k,
        most_q,
        most_k,
        dropout,
        causal,
        random,
        unused,
        *,
        scale,
        window_size_left=None,
        **more,
    ):
        assert len(sums) == 3 and len(random) == len(unused) == 0 and grad.shape == out.shape
        assert all(x.stride(-1) == 1 for x in (grad, q, k, v, out)), "as PyTorch asks"
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in (q, k, v)]
            found = cls.result(*inputs, of_q, of_k, window_size_left, scale)
        return torch.autograd.grad(found, inputs, grad)


@pytest.mark.skipif(ON_GPU, reason="there the real one serves")
@pytest.mark.parametrize("blocks", [BLOCKS, PACKED, SINGLE], ids=["prefixes", "packed", "single"])
@pytest.mark.parametrize(("window", "scale"), [(None, None), (4, 0.3)])
@pytest.mark.parametrize("lie", [torch.clone, strided])
def test_what_flash_attention_is_told(blocks, window, scale, lie, monkeypatch):
    monkeypatch.setattr(attention_cpu, "serves", lambda *tensors: False)
    monkeypatch.setattr(attention_gpu, "serves", lambda *tensors: True)
    monkeypatch.setattr(attention_gpu, "_flash", Flash.forward)
    monkeypatch.setattr(attention_gpu, "_flash_backward", Flash.backward)
    inputs, outer, expected = attention_problem(blocks, torch.float64, window, scale)
    inputs, outer = [lie(x) for x in inputs], lie(outer)
    options = {"sliding_window": window, "scaling": scale, attention.BLOCKS: blocks}
    for mine, right in zip(attended(inputs, outer, **options), expected, strict=True):
        torch.testing.assert_close(mine, right)
    for name in ("_flash", "_flash_backward"):  # both were needed
        monkeypatch.setattr(attention_gpu, name, None)
        with pytest.raises(TypeError):
            attended(inputs, outer, **options)


@pytest.mark.skipif(not ON_GPU, reason="PyTorch's flash attention is a GPU's")
@pytest.mark.parametrize(
    "blocks",
    [BLOCKS, LONGER, PACKED, SINGLE],
    ids=["prefixes", "longer", "packed", "single"],
)
@pytest.mark.parametrize("window", [None, 4, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flash_attention_is_as_good_as_masks(blocks, window, dtype, monkeypatch):
    """The standard is PyTorch's attention block by block, with masks."""
    inputs, outer, expected = attention_problem(blocks, dtype, window, 0.4, width=64)
    options = {"sliding_window": window, "scaling": 0.4, attention.BLOCKS: blocks}
    assert attention_gpu.serves(*inputs)
    ours = attended(inputs, outer, **options)
    assert all(x.dtype == dtype for x in ours)
    with monkeypatch.context() as without:
        without.setattr(attention_gpu, "serves", lambda *tensors: False)
        theirs = attended(inputs, outer, **options)
    for mine, masks, right in zip(errors(ours, expected), errors(theirs, expected), expected):
        # SINGLE sees itself alone: what is right is copied, or 0.
        size = right.square().mean().sqrt()
        assert mine <= 2 * masks + torch.finfo(dtype).eps * size / 2


@pytest.mark.parametrize(
    ("capability", "served"),
    [
        ((7, 5), set()),
        ((8, 0), {128, 192, 200, 224, 256}),
        ((8, 6), {128, 192, 256}),
        ((8, 9), {128, 192, 256}),
        ((9, 0), {128, 192, 200, 224, 256}),
        ((10, 0), {128, 192, 200, 224, 256}),
        ((12, 0), {128, 192, 256}),
    ],
)
def test_widths_that_flash_attention_has_a_backward_for(monkeypatch, capability, served):
    """As PyTorch's own choice of attention has them, for inputs that have a gradient."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)

    def on_a_gpu(width):
        return types.SimpleNamespace(
            shape=(1, 2, 4, width), device=torch.device("cuda"), dtype=torch.bfloat16
        )

    widths = (128, 192, 200, 224, 256, 288)
    assert {w for w in widths if attention_gpu.serves(*[on_a_gpu(w)] * 3)} == served


@pytest.mark.skipif(not ON_GPU, reason="autocast of a GPU")
def test_autocast_on_a_gpu():
    inputs, outer, expected = attention_problem(BLOCKS, torch.float32, None, None, width=64)
    assert not attention_gpu.serves(*inputs)
    with torch.autocast("cuda", torch.bfloat16):
        assert attention_gpu.serves(*inputs)
        found = attended(inputs, outer.bfloat16(), **{attention.BLOCKS: BLOCKS})
    for mine, right in zip(errors(found, expected), expected, strict=True):
        assert 0 < mine < 0.02 * right.square().mean().sqrt()


WAYS = ["block by block"] if ON_GPU else ["kernel", "extension", "block by block"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("window", "scale"), [(None, None), (4, 0.3)])
def test_attention_is_that_of_its_definition(way, window, scale, monkeypatch):
    """Blocks with and without a prefix, windows, keys that heads share, a scale."""
    inputs, outer, expected = attention_problem(BLOCKS, torch.float32, window, scale)
    options = {"sliding_window": window, "scaling": scale, attention.BLOCKS: BLOCKS}
    if way == "block by block":
        options["dropout"] = 1e-30  # PyTorch's own functions serve it
    monkeypatch.setattr(attention_cpu, "_compiled", lambda dtype: way == "extension")
    for mine, right in zip(attended(inputs, outer, **options), expected, strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(ON_GPU, reason="of a CPU's kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", range(4))
def test_numbers_of_a_head_may_lie_apart(dtype, which):
    """PyTorch's kernel, called by itself, reads behind them."""
    (*inputs,), outer, _ = attention_problem(BLOCKS, dtype, None, None)
    expected = attended(inputs, outer, **{attention.BLOCKS: BLOCKS})
    given = [*inputs, outer]
    given[which] = strided(given[which])
    found = attended(given[:3], given[3], **{attention.BLOCKS: BLOCKS})
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("way", WAYS)
def test_attention_in_float64_is_exact(way, monkeypatch):
    """Though a build has the extension, whose scores are float32."""
    inputs, outer, expected = attention_problem(BLOCKS, torch.float64, 4, None)
    options = {"sliding_window": 4, attention.BLOCKS: BLOCKS}
    if way == "block by block":
        options["dropout"] = 1e-30
    built = {"built": way == "extension"}
    monkeypatch.setattr(attention_cpu.backends, "build_info", lambda: built)
    for mine, right in zip(attended(inputs, outer, **options), expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(ON_GPU, reason="autocast of a CPU")
def test_a_backward_inside_autocast_is_that_outside():
    inputs, outer, _ = attention_problem(BLOCKS, torch.bfloat16, None, None)
    options = {attention.BLOCKS: BLOCKS}
    expected = attended(inputs, outer, **options)
    with torch.autocast("cpu", torch.bfloat16):
        found = attended(inputs, outer, **options)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


def across_others(blocks):
    """Whether a block sees what lies before one that sees nothing."""
    alone = [block.start for block in blocks if not block.beginning]
    return any(
        block.beginning and any(block.before < start < block.start for start in alone)
        for block in blocks
    )


def test_rows_of_random_batches():
    """Long sequences take no short beginning, and those behind them may: of prompts that begin
    with the same word."""
    across = 0
    for seed in range(30):
        draw = random.Random(seed)
        begun = [[draw.randrange(9) for _ in range(4)] for _ in range(2)]
        sequences = [
            begun[draw.randrange(2)][: draw.randrange(2, 5)]
            + [draw.randrange(9) for _ in range(draw.choice([3, 20, 70]))]
            for _ in range(7)
        ]
        ids, mask = torch.zeros(7, 80, dtype=torch.long), torch.zeros(7, 80, dtype=torch.long)
        for i, one in enumerate(sequences):
            ids[i, : len(one)], mask[i, : len(one)] = torch.tensor(one), 1
        blocks = layout.shared(ids, mask).blocks
        across += across_others(blocks)
        inputs, outer, expected = attention_problem(blocks, torch.float32, None, None)
        found = attended(inputs, outer, **{attention.BLOCKS: blocks})
        for mine, right in zip(found, expected, strict=True):
            torch.testing.assert_close(mine.double(), right, rtol=1e-5, atol=1e-5)
    assert across > 2


@pytest.mark.accuracy
@pytest.mark.skipif(ON_GPU, reason="of the extension")
@pytest.mark.parametrize("window", [None, 100])
def test_bfloat16_gradients_are_as_good_as_pytorchs(window, monkeypatch):
    """Parts of more than 128 queries, prefixes that lie apart; the standard is PyTorch's kernel."""
    inputs, outer, expected = attention_problem(LONGER, torch.bfloat16, window, 0.4, width=32)
    found = []
    for compiled in (True, False):
        monkeypatch.setattr(attention_cpu, "_compiled", lambda dtype, compiled=compiled: compiled)
        options = {"sliding_window": window, "scaling": 0.4, attention.BLOCKS: LONGER}
        found.append(errors(attended(inputs, outer, **options), expected))
    for ours, theirs in zip(*found, strict=True):
        assert theirs > 0 and ours < 2 * theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_under_checkpointing(dtype):
    inputs, outer, _ = attention_problem(BLOCKS, dtype, None, None)
    expected = attended(inputs, outer, **{attention.BLOCKS: BLOCKS})
    again = [x.detach().requires_grad_() for x in inputs]

    def layer(*inputs):
        module = torch.nn.Module()
        module.num_key_value_groups = 3
        found, _ = attention.block_attention(module, *inputs, None, **{attention.BLOCKS: BLOCKS})
        return found.transpose(1, 2)

    found = torch.utils.checkpoint.checkpoint(layer, *again, use_reentrant=False)
    gradients = torch.autograd.grad(found, again, outer)
    for mine, theirs in zip((found, *gradients), expected, strict=True):
        if ON_GPU:  # PyTorch adds up gradients of queries in any order there
            torch.testing.assert_close(mine, theirs, rtol=0.02, atol=0.02)
        else:
            assert torch.equal(mine, theirs)


@pytest.mark.skipif(ON_GPU, reason="of the extension")
@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([Block(0, 3), Block(4, 5)], "tokens in order"),
        ([Block(0, 3), Block(3, 6, 0, 3, 2, 5)], "prefixes before them"),
        ([Block(0, 3), Block(3, 6, 3, 2)], "prefixes before them"),
        ([Block(0, 3), Block(3, 6, -1, 2)], "prefixes before them"),
        ([Block(0, 3)], "cover 6 tokens, got 3"),
        ([Block(0, 3, 0, 2)], "tokens in order"),
    ],
)
def test_blocks_that_are_no_row_are_refused(blocks, message):
    q, norms = torch.ones(2, 6, 4), torch.zeros(2, 6, 1)
    outer = q.transpose(0, 1)
    arguments = outer, q, q, q, outer, norms, torch.tensor(blocks), 6, 1.0
    with pytest.raises(ValueError, match=message):
        torch.ops.drrlhf_cpp.row_attention_backward(*arguments)
