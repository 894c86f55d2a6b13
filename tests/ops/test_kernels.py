"""What Triton kernels compile to without a GPU; what they and CUDA's refuse, and how."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from three_ways import BACKENDS, DEVICE, EMULATED, INTERPRETED, ON_GPU, SLOW

import drrlhf as dr
from drrlhf import backends
from tools import kept

triton = pytest.importorskip("triton")
KEPT = Path(__file__).parents[2] / "benchmarks" / "results" / "kernels_ahead_of_time.json"
# What is compiled ahead is compiled without a GPU; on one, its minutes are for what runs there.
compiled_only = pytest.mark.skipif(SLOW or ON_GPU, reason="of the ordinary process alone")
# Where kernels of a GPU serve CPU tensors.
kernels_only = pytest.mark.skipif(not SLOW, reason="needs TRITON_INTERPRET=1 or DRRLHF_EMULATED")
interpreted_only = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")


# Every variant takes a second to compile: of one architecture all go to one worker.
ARCHITECTURES = [
    pytest.param(
        arch,
        marks=[
            pytest.mark.xdist_group(f"compiled {arch}"),
            *([] if arch == 90 else [pytest.mark.thorough]),
        ],
    )
    for arch in (80, 90, 100)
]
WRITE_AGAIN = "python -m tools.ahead_of_time benchmarks/results"


@pytest.fixture(scope="module", params=ARCHITECTURES)
def compiled(request):
    """What every variant of `tools.ahead_of_time` became for one architecture: rows of the table,
    which are of now where the table was made from something else (`tools.kept`)."""
    if SLOW or ON_GPU:
        pytest.skip("of the ordinary process alone")
    from tools import ahead_of_time as ahead

    arch = request.param
    rows = kept.rows(KEPT, ahead.made_from(), arch, lambda: ahead.records(arch))
    return arch, {row["kernel"]: row for row in rows}


@pytest.fixture
def variants():
    from tools import ahead_of_time

    return list(ahead_of_time.variants())


def spilling(rows):
    """Of bytes of the stack by variant, those that are not known.

    Where is_top1 is found a few addresses lie there, read again once a tile, which takes some
    60,000 cycles: none on sm_90 by Triton 3.6, 40 to 128 bytes by 3.9, 160 on sm_100.
    """
    return {
        (row["kernel"], row["arch"]): row["spills"]
        for row in rows
        if row["spills"] > (160 if "fold with all outputs" in row["kernel"] else 0)
    }


def test_the_kept_table_is_what_kernels_compile_to(compiled):
    from tools import ahead_of_time as ahead

    arch, rows = compiled
    assert rows
    assert kept.differences(KEPT, ahead.made_from(), arch, rows.values()) == [], WRITE_AGAIN


def test_no_default_configuration_spills(compiled):
    _, rows = compiled
    assert spilling(rows.values()) == {}


def test_shared_memory_fits_the_chip(compiled):
    arch, rows = compiled
    room = {80: 163, 90: 227, 100: 227}[arch] * 1024
    assert {name: row["shared"] for name, row in rows.items() if row["shared"] > room} == {}


def assert_products_are_pipelined(arch, products, rows):
    wanted = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[arch]
    assert [v.name for v in products if wanted not in rows[v.name]["instructions"]] == []
    # And their operands come asynchronously, several steps ahead: by TMA, or in copies of 16 bytes.
    copy = "cp.async.cg.shared" if arch == 80 else "cp.async.bulk.tensor"
    assert [v.name for v in products if copy not in rows[v.name]["instructions"]] == []
    # Beside the step of 64 in bfloat16 that is multiplied, shared memory holds the next.
    for v in products:
        columns = 128 if arch == 80 or v.small else 256
        height = 64 if arch == 100 and v.small else 128
        assert rows[v.name]["shared"] > 64 * 2 * (height + columns), v.name


def test_products_use_matrix_instructions(compiled, variants):
    arch, rows = compiled
    products = [v for v in variants if v.blocks is not None]
    assert len(products) >= 12
    assert_products_are_pipelined(arch, products, rows)


@compiled_only
@pytest.mark.parametrize("arch", [80, 100])
def test_a_product_on_the_other_chips(arch, variants):
    """Each has instructions of its own; what else it runs is compiled in the thorough run."""
    from tools import ahead_of_time as ahead

    names = [f"linear_token_logprobs, {what} (bf16)" for what in ("fold", "gradient of weight")]
    chosen = [v for v in variants if v.name in names]
    assert len(chosen) == len(names)
    found = kept.rows(KEPT, ahead.made_from(), arch, lambda: [ahead.build(v, arch) for v in chosen])
    rows = {row["kernel"]: row for row in found}
    assert_products_are_pipelined(arch, chosen, rows)
    assert spilling(rows[name] for name in names) == {}


def test_bandwidth_bound_kernels_load_16_bytes(compiled, variants):
    _, rows = compiled
    streams = [v.name for v in variants if v.streams]
    assert len(streams) >= 4
    for name in streams:
        assert "load of 16 bytes" in rows[name]["instructions"], name
        if "backward" in name:
            assert "store of 16 bytes" in rows[name]["instructions"], name


def test_nothing_of_one_vendor_alone():
    """No inline assembly and no libdevice: ROCm and XPU compile the same text."""
    for path in (Path(__file__).parents[2] / "kernels").glob("*.py"):
        text = path.read_text()
        assert "inline_asm" not in text and "libdevice" not in text, path.name


@compiled_only
def test_the_kept_table_is_of_every_variant_and_architecture(variants):
    """Those of other chips too, which only the thorough run compiles."""
    found = json.loads(KEPT.read_text())["records"]
    wanted = {(v.name, f"sm_{arch}") for v in variants for arch in (80, 90, 100)}
    assert {(r["kernel"], r["arch"]) for r in found} == wanted, WRITE_AGAIN
    assert spilling(found) == {}


TABLE = {
    "versions": {"compiler": "1"},
    "sources": "text",
    "records": [
        {"kernel": "a", "arch": "sm_90", "registers": 8},
        {"kernel": "a", "arch": "sm_80", "registers": 9},
    ],
}


def test_a_table_of_the_same_sources_is_read_and_of_others_is_not(tmp_path, monkeypatch):
    monkeypatch.delenv("DRRLHF_ALL", raising=False)
    path = tmp_path / "table.json"
    path.write_text(json.dumps(TABLE))
    now = [{"kernel": "a", "arch": "sm_90", "registers": 7}]
    made = {name: TABLE[name] for name in ("versions", "sources")}
    assert kept.rows(path, made, 90, lambda: now) == TABLE["records"][:1]
    assert kept.rows(path, made | {"sources": "another"}, 90, lambda: now) == now
    assert kept.rows(path, made | {"versions": {"compiler": "2"}}, 90, lambda: now) == now
    monkeypatch.setenv("DRRLHF_ALL", "1")
    assert kept.rows(path, made, 90, lambda: now) == now


def test_a_table_is_stale_where_a_row_differs_or_by_another_compiler_a_name(tmp_path):
    path = tmp_path / "table.json"
    path.write_text(json.dumps(TABLE))
    same = TABLE["records"][:1]
    for versions, rows, wanted in (
        ("1", same, []),
        ("1", [same[0] | {"registers": 7}], ["a"]),
        ("2", [same[0] | {"registers": 7}], []),
        ("2", [*same, same[0] | {"kernel": "b"}], ["b"]),
        ("1", [], ["a"]),
    ):
        made = {"versions": {"compiler": versions}, "sources": "text"}
        assert kept.differences(path, made, 90, rows) == wanted


def test_what_a_table_is_made_from_is_every_source_and_its_name(tmp_path):
    files = [tmp_path / name for name in ("a.h", "b.h")]
    for file in files:
        file.write_text("text")
    first = kept.made_from({"compiler": "1"}, files)
    assert first == kept.made_from({"compiler": "1"}, files[::-1])
    assert first != kept.made_from({"compiler": "1"}, files, "-O3")
    assert first != kept.made_from({"compiler": "1"}, files[:1])
    files[1].write_text("other")
    assert first != kept.made_from({"compiler": "1"}, files)
    files[1].write_text("text")
    files[1] = files[1].rename(tmp_path / "c.h")
    assert first != kept.made_from({"compiler": "1"}, files)


# --------------------------------------------------------------------------- bad input


def logits_and_labels():
    return torch.randn(4, 7), torch.tensor([0, 6, -100, 3])


@kernels_only
@pytest.mark.parametrize("label", [-1, 7, 2**40])
def test_a_label_outside_the_vocabulary_gives_nan_and_reads_nothing(label):
    logits, labels = logits_and_labels()
    labels[1] = label
    with backends.use(BACKENDS[0]):
        from drrlhf import ops

        logps = ops.token_logprobs(logits, labels, -100, 1.0, None, 0)[0]
        assert logps[1].isnan() and torch.isfinite(logps[[0, 2, 3]]).all()
        hidden, weight = torch.randn(4, 5), torch.randn(7, 5)
        head = (hidden, weight, None, labels, -100, 1.0, None, 1.0, 0)
        for keep in (0, 1, 4 if EMULATED else 3):
            logps, *_ = ops.linear_token_logprobs(*head, keep, 0)
            assert logps[1].isnan() and torch.isfinite(logps[[0, 2, 3]]).all()


@kernels_only
@pytest.mark.parametrize("boundaries", [[1, 4, 9], [0, 5, 4], [0, 4, 10], [0, -3, 9], [0, 4, 8]])
def test_boundaries_that_are_none_give_nan_and_read_nothing(boundaries):
    from drrlhf import ops

    with backends.use(BACKENDS[0]):
        logps, labels = torch.randn(9), torch.zeros(9, dtype=torch.long)
        sums = ops.sequence_logprobs(logps, labels, torch.tensor(boundaries), -100, False)
        assert sums.isnan().any()


@kernels_only
@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_a_nominal_weight_that_is_none_gives_nan(bad):
    from drrlhf import ops

    nominal = torch.tensor([1.0, bad, 1.0])
    with backends.use(BACKENDS[0]):
        for kind, a in (("tv", 0.1), ("kl_radius", 0.1), ("erm", 0.0)):
            value, weights, *_ = ops.robust_risk(
                torch.randn(3), nominal, None, None, kind, a, 0.0, 0.0, True
            )
            assert value.isnan() and weights.isnan().any()


@kernels_only
def test_a_group_that_there_is_not_gives_nan_and_leaves_the_weights():
    from drrlhf import ops

    state = torch.tensor([0.25, 0.75], dtype=torch.float64)
    with backends.use(BACKENDS[0]):
        for group in (-1, 2, 2**40):
            value, weights, _, after = ops.robust_risk(
                torch.randn(3),
                None,
                torch.tensor([0, 1, group]),
                state,
                "group",
                0.1,
                0.0,
                0.0,
                True,
            )
            assert value.isnan() and weights.isnan().all()
            assert torch.equal(after, state)


@pytest.mark.skipif(SLOW or ON_GPU, reason="there kernels serve")
def test_the_cpu_is_served_by_name_only_when_interpreted():
    with backends.use("triton"), pytest.raises(backends.BackendError, match="TRITON_INTERPRET=1"):
        dr.token_logprobs(*logits_and_labels())


@interpreted_only
def test_the_interpreter_is_for_those_who_ask():
    assert backends.serving("token_logprobs", "cpu") != "triton"
    with backends.use("triton"):
        assert backends.serving("token_logprobs", "cpu") == "triton"


@interpreted_only
def test_float64_logits_are_the_references():
    logits, labels = logits_and_labels()
    with backends.use("triton"), pytest.raises(backends.BackendError, match="float64"):
        dr.token_logprobs(logits.double(), labels)


def elsewhere(x):
    return x.to("meta")


ON_TWO_DEVICES = {
    "labels": lambda x, y: dr.token_logprobs(x, elsewhere(y)),
    "weight": lambda x, y: dr.linear_token_logprobs(x, elsewhere(x), y),
    "cu_seqlens": lambda x, y: dr.sequence_logprobs(x[0], y[:1].expand(7), cu_seqlens=elsewhere(y)),
    "nominal": lambda x, y: dr.robust_risk(x[0], nominal=elsewhere(x[0])),
    "groups": lambda x, y: dr.robust_risk(x[:, 0], "group:7", groups=elsewhere(y)),
    "ref_chosen_logps": lambda x, y: dr.preference_loss(x[0], x[1], elsewhere(x[2]), x[3]),
    "margin": lambda x, y: dr.reward_loss(x[0], x[1], margin=elsewhere(x[2])),
    "ref_logps": lambda x, y: dr.linear_preference_loss(
        x[:, None], x, y[:, None], elsewhere(x[:, 0])
    ),
}


@pytest.mark.parametrize("name", ON_TWO_DEVICES)
def test_tensors_on_different_devices_are_refused(name):
    x, y = logits_and_labels()
    with pytest.raises(ValueError, match=f"{name}: expected it on {DEVICE}.* as .*got meta"):
        ON_TWO_DEVICES[name](x, y)


@pytest.mark.skipif(EMULATED, reason="there the CUDA kernels would serve")
def test_an_old_gpu_is_told_which_backend_would_serve(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(backends, "_no_cuda", lambda _: "has none")
    with (
        backends.use("triton"),
        pytest.raises(backends.BackendError, match=r"this GPU has .*; reference would"),
    ):
        backends.kernel("robust_risk", "cuda")
    with backends.use("auto"):
        assert backends.serving("robust_risk", "cuda") == "reference"


# --------------------------------------------------------------------------- blocks of products


@pytest.mark.pairwise
@interpreted_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 33])
@pytest.mark.parametrize("budget", [0, 1 << 30])
def test_blocks_by_pointers_are_those_by_descriptors(monkeypatch, dtype, width, budget):
    """What GPUs before sm_90 run gives the bits of what the later ones do."""
    from drrlhf.kernels import tiles

    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(140, width, generator=g), torch.randn(133, width, generator=g)
    labels = torch.randint(0, 133, (140,), generator=g)
    labels[::7] = -100
    upstream = torch.linspace(0, 1, 140).round()  # half of the tokens have no part

    def run():
        h, w = (x.to(dtype).requires_grad_() for x in (hidden, weight))
        found = dr.linear_token_logprobs(
            h, w, labels, memory_budget=budget, outputs=("entropy", "is_top1")
        )
        found.logps.backward(upstream)
        return found.logps.detach(), found.entropy.detach(), found.is_top1, h.grad, w.grad

    with backends.use("triton"):
        described = run()
        monkeypatch.setattr(tiles, "describes", lambda _: False)
        for a, b in zip(described, run()):
            assert torch.equal(a, b)


@interpreted_only
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("listed", [False, True])
def test_a_product_in_parts_is_the_product(monkeypatch, across, listed):
    """Few tiles and a long depth: each part by a program of its own, then their sum."""
    from drrlhf.kernels import linear_token_logprobs as op

    n, counted, depth, width = 700, 300, 640, 40
    g = torch.Generator().manual_seed(0)
    factor = torch.randn(n, generator=g)
    factor[128:400] = 0.0
    rows = torch.randperm(n, generator=g)[:counted].sort()[0].int()
    tokens = op.Tokens(torch.cat([rows, rows[:1].expand(n - counted)]), torch.tensor(counted).int())
    blocks = op._active_blocks(factor, tokens) if listed else None
    a = torch.randn(n, 100 if across else depth, generator=g)
    b = torch.randn(n if across else depth, width, generator=g)
    a[counted:], b[counted if across else depth :] = 0.0, 0.0
    a[384:] = float("nan")  # behind the last block, which nothing writes
    if across:
        b = b * factor[:, None]
        b[384:] = float("nan")
        expected = a[:counted].T.double() @ b[:counted].double()
    else:
        expected = torch.zeros(n, width, dtype=torch.float64)
        product = a[:counted].double() @ b.double() * factor[:counted, None].double()
        expected[rows.long()] = product
    monkeypatch.setattr(op, "LEAST_STEPS", 1)
    launched = []
    launch = op.launch
    monkeypatch.setattr(op, "launch", lambda *x, **o: (launched.append(x), launch(*x, **o)))
    for programs in (1, 37, 64):
        monkeypatch.setattr(op, "processors_of", lambda _, p=programs: p)
        out = torch.zeros(expected.shape)
        op._product(
            a,
            b,
            tokens,
            out,
            0,
            n,
            across=across,
            blocks=blocks,
            factor=None if across else factor,
        )
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
    # As many parts as there are programs for, whose last one may end before it is full.
    assert len({x[1] for x in launched}) == 3


# --------------------------------------------------------------------------- poisoned memory


@interpreted_only
@pytest.mark.thorough
def test_every_output_is_written(monkeypatch):
    """With NaN in all memory that is handed out, no answer changes: DRRLHF_FILL=1 by hand."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(70, 33, generator=g), torch.randn(131, 33, generator=g)
    labels = torch.randint(0, 131, (70,), generator=g)
    labels[::3] = -100
    chosen, rejected = torch.randn(2, 700, generator=g)

    def results():
        found = []
        for budget in (0, 1 << 30):
            for needs in ((True, False), (True, True)):
                h, w = (x.clone().requires_grad_(n) for x, n in zip((hidden, weight), needs))
                logps = dr.linear_token_logprobs(h, w, labels, memory_budget=budget)
                seq = dr.sequence_logprobs(logps, labels, cu_seqlens=torch.tensor([0, 9, 9, 70]))
                seq.sum().backward()
                found += [logps, seq, h.grad, w.grad]
        x = (hidden @ weight.T).requires_grad_()
        logps = dr.token_logprobs(x, labels, outputs=("entropy", "is_top1")).logps
        logps.sum().backward()
        found += [logps, x.grad]
        c, r = chosen.clone().requires_grad_(), rejected.clone().requires_grad_()
        out = dr.preference_loss(c, r, chosen * 0, rejected * 0, ambiguity="kl:0.1,trim=0.1")
        out.loss.backward()
        two = dr.linear_preference_loss(
            hidden.view(10, 7, 33), weight, labels.view(10, 7), torch.zeros(10), ambiguity="tv:0.2"
        )
        return [x.detach().clone() for x in (*found, *out, c.grad, r.grad, *two) if x is not None]

    def poisoned(make):
        def empty(*arguments, **options):
            x = make(*arguments, **options)
            if x.is_floating_point():
                return x.fill_(float("nan"))
            return x.fill_(torch.iinfo(x.dtype).max // 2) if x.dtype != torch.bool else x

        return empty

    with backends.use("triton"):
        expected = results()
        monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
        monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
        monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
        for a, b in zip(expected, results()):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("way", ["tf32", "highest", "high"])
def test_products_are_as_precise_as_torch_is_told(way):
    """By either of torch's two interfaces, of which the older raises after the newer."""
    from drrlhf.kernels import tiles

    places = torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [place.fp32_precision for place in places]
    try:
        if way == "tf32":
            torch.backends.fp32_precision = way
        else:
            torch.set_float32_matmul_precision(way)
        assert tiles.precision_of(torch.ones(2)) == ("ieee" if way == "highest" else "tf32")
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision
