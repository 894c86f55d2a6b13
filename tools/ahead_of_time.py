"""What the Triton kernels compile to for chips that are not here: registers, spills, shared memory.

``python -m tools.ahead_of_time FOLDER`` writes the table; tests hold the default
configurations to it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tools import kept

ARCHITECTURES = (80, 90, 100)
FILE = "kernels_ahead_of_time.json"


@dataclass(frozen=True)
class Variant:
    """A kernel with the constants of one way to launch it.

    types: of its arguments by name. divisible: integers that are multiples of 16. streams: is bound
    by memory bandwidth. blocks: of a kernel with a matrix product, what its descriptors move, by
    names of a tile's sides; the tile is one of `drrlhf.kernels.tiles`, made for an architecture.
    three_stages, small: see `tiles.default_tile`.
    """

    name: str
    kernel: Any
    types: dict[str, Any]
    constants: dict[str, Any]
    warps: int = 4
    most_registers: int | None = None
    divisible: frozenset[str] = frozenset()
    blocks: dict[str, tuple[str, str]] | None = None
    three_stages: bool = False
    small: bool = False
    streams: bool = False


# What a table says of a variant's instructions: the name of each, and its text in PTX.
_INSTRUCTIONS = {
    "mma.sync": r"mma\.sync",
    "wgmma.mma_async": r"wgmma\.mma_async",
    "tcgen05.mma": r"tcgen05\.mma",
    "cp.async.cg.shared": r"cp\.async\.cg\.shared",
    "cp.async.bulk.tensor": r"cp\.async\.bulk\.tensor",
    "load of 16 bytes": r"ld\.global\S*\.v4\.b32",
    "store of 16 bytes": r"st\.global\S*\.v4\.b32",
}
_SIZES = frozenset(
    (
        "width",
        "vocabulary",
        "stride",
        "out_stride",
        "h_stride",
        "w_stride",
        "d_stride",
        "ratios_stride",
        "parts_stride",
        "columns_here",
        "depth",
        "most",
        "slots_here",
        "first_slot",
        "first_column",
        "length",
        "tokens",
    )
)
# What `tiles.blocks_of` gives without descriptors: a pointer, a stride, rows, columns.
_POINTED = ("*bf16", "i32", "i32", "i32")
_NUMBERS = {"scale", "softcap", "inverse_temperature", "unit"}
_INTEGERS = {
    "rows_ptr",
    "slots_ptr",
    "count_ptr",
    "listed_ptr",
    "listed_count_ptr",
    "arrived_ptr",
    "label_ptr",
    "blocks_ptr",
    "blocks_count_ptr",
}
_LABELS = {"labels_ptr", "groups_ptr", "cu_ptr"}
_DOUBLES = {"scratch_ptr", "masses_ptr", "before_ptr", "after_ptr"}


def _types(kernel: Any, **given: Any) -> dict[str, Any]:
    """The usual type of each argument by its name, unless given."""
    found: dict[str, Any] = {}
    for name in kernel.arg_names:
        if name in _INTEGERS:
            found[name] = "*i32"
        elif name in _LABELS:
            found[name] = "*i64"
        elif name in _DOUBLES:
            found[name] = "*fp64"
        elif name == "top1_ptr":
            found[name] = "*i1"
        elif name.endswith("_ptr"):
            found[name] = "*fp32"
        else:
            found[name] = "fp32" if name in _NUMBERS else "i32"
    return found | given


def _token_logprobs() -> Iterator[Variant]:
    from drrlhf.kernels import token_logprobs as op

    rows, block, warps = op.configuration(151936)
    for dtype in ("bf16", "fp32"):
        common = {"CAPPED": False, "PRECISE": dtype == "fp32", "ROWS": rows, "BLOCK": block}
        for aligned in (True, False):
            options: dict[str, Any] = {
                "warps": warps,
                "streams": True,
                "divisible": _SIZES if aligned else frozenset(),
            }
            how = f"{dtype}, {'aligned' if aligned else 'any'} rows"
            kernel: Any = op.token_logprobs_kernel
            for extras in (False, True):
                yield Variant(
                    f"token_logprobs{' with all outputs' if extras else ''} ({how})",
                    kernel,
                    _types(kernel, x_ptr="*" + dtype),
                    common
                    | dict.fromkeys(("ENTROPY", "MEAN", "TOP1", "SQUARES"), extras)
                    | {"ALIGNED": aligned, "DEBUG": False},
                    **options,
                )
            kernel = op.token_logprobs_backward_kernel
            yield Variant(
                f"token_logprobs_backward ({how})",
                kernel,
                _types(kernel, x_ptr="*" + dtype, out_ptr="*" + dtype),
                common | {"ALIGNED": aligned, "BY_LOGP": True, "BY_ENTROPY": False},
                **options,
            )


def _linear_token_logprobs() -> Iterator[Variant]:
    from drrlhf.kernels import head_products as products
    from drrlhf.kernels import tiles

    def variant(
        what: str,
        kernel: Any,
        blocks: dict[str, tuple[str, str]],
        three_stages: bool,
        out: str | None = None,
        small: bool = False,
        **constants: Any,
    ) -> Variant:
        narrow = {"bias_ptr": "*bf16"}
        if out is not None:
            narrow["out_ptr"] = out
        return Variant(
            f"linear_token_logprobs, {what} (bf16)",
            kernel,
            _types(kernel, **narrow),
            constants | {"PRECISION": "ieee", "BLOCK_ROWS": tiles.BLOCK_ROWS},
            divisible=_SIZES,
            blocks=blocks,
            three_stages=three_stages,
            small=small,
        )

    of_logits = {"h_blocks": ("rows", "depth"), "w_blocks": ("columns", "depth")}
    logits = {"BIAS": False, "CAPPED": False, "PRECISE": False}
    bent = {"BIAS": True, "CAPPED": True, "PRECISE": False}
    names = ("ENTROPY", "MEAN", "TOP1", "SQUARES")
    # Without a softcap the mean logit needs no tile.
    extras = ("ENTROPY", "TOP1", "SQUARES")
    fold = of_logits | {"ratios_blocks": ("rows", "piece")}
    folds: tuple[tuple[str, dict[str, Any], tuple[str, ...], bool], ...] = (
        ("fold", logits, (), False),
        ("fold storing ratios", logits, (), True),
        ("fold with all outputs", logits, extras, False),
        ("fold with all outputs storing ratios", logits, extras, True),
        ("fold with bias and softcap", bent, (), False),
        ("fold with bias, softcap and all outputs storing ratios", bent, names, True),
    )
    for what, of, asked, store in folds:
        yield variant(
            what,
            products.fold_kernel,
            fold,
            store,
            RAGGED=False,
            RISING=True,
            STORE=store,
            small=of is bent,
            **of,
            **dict[str, Any]((name, name in asked) for name in names),
        )
    gradient = of_logits | {"out_blocks": ("rows", "piece")}
    for what, of, more in (
        ("gradient", logits, {"BY_LOGP": True, "BY_ENTROPY": False, "ONES": False}),
        ("gradient at slots", logits, {"BY_LOGP": True, "BY_ENTROPY": False, "ONES": True}),
        (
            "gradient with entropy, bias and softcap",
            bent,
            {"BY_LOGP": True, "BY_ENTROPY": True, "ONES": False},
        ),
    ):
        yield variant(
            what,
            products.gradient_kernel,
            gradient,
            True,
            "*bf16",
            of is bent,
            AT_SLOTS="slots" in what,
            **of,
            **more,
        )
    along = {"a_blocks": ("rows", "depth"), "b_blocks": ("depth", "columns")}
    across = {"a_blocks": ("depth", "rows"), "b_blocks": ("depth", "columns")}
    once = {"LISTED": False, "PARTIAL": False, "FACTOR": False, "ADD": False, "ACROSS": False}
    kernel = products.product_kernel
    yield variant("gradient of hidden", kernel, along, False, "*bf16", **once | {"FACTOR": True})
    yield variant(
        "gradient of hidden from kept ratios",
        kernel,
        along,
        False,
        "*bf16",
        **once | {"FACTOR": True, "LISTED": True},
    )
    yield variant(
        "gradient of hidden, added", kernel, along, False, "*fp32", **once | {"ADD": True}
    )
    yield variant(
        "gradient of hidden in parts", kernel, along, False, "*fp32", **once | {"PARTIAL": True}
    )
    yield variant("gradient of weight", kernel, across, True, "*bf16", **once | {"ACROSS": True})
    yield variant(
        "gradient of weight from kept ratios",
        kernel,
        across,
        True,
        "*bf16",
        **once | {"ACROSS": True, "LISTED": True},
    )


def _pairs() -> Iterator[Variant]:
    from drrlhf.kernels import robust_risk, sequence_preference_loss
    from drrlhf.kernels.sequence_logprobs import TOKENS

    pair = ("fp32", "fp32")
    search = {
        "NOMINAL": False,
        "TRIMS": False,
        "UPDATE": True,
        "WEIGHTED": False,
        "SIZE": 8,
        "DEBUG": False,
    }
    kinds = (
        "erm",
        "tv",
        "kl_radius",
        "kl_temperature",
        "chi2_radius",
        "chi2_penalty",
        "cvar",
        "cvar_temperature",
        "group",
    )
    sums = {"SUMS": True, "SOLVES": True, "PACKED": True, "TOKENS": TOKENS}
    fused = sequence_preference_loss.sequence_preference_loss_kernel
    for block, warps in (robust_risk.SMALL, robust_risk.LARGE):
        for kind in kinds:
            constants = search | {"KIND": kind, "BLOCK": block}
            for name, kernel, count, more in (
                ("robust_risk", robust_risk.robust_risk_kernel, 3, {}),
                ("sequence_preference_loss", fused, 5, sums),
            ):
                if name != "robust_risk" and kind not in ("tv", "kl_radius"):
                    continue
                types = _types(kernel, parameters=(pair,) * count)
                yield Variant(
                    f"{name}, {kind}, blocks of {block}",
                    kernel,
                    types,
                    constants | more,
                    warps,
                    robust_risk.REGISTERS,
                )


def _row_worst_case() -> Iterator[Variant]:
    from drrlhf.kernels import row_worst_case as op

    kernel = op.row_worst_case_kernel
    types = _types(kernel, mask_ptr="*i1", nominal_ptr="*fp64", parameters=(("fp32", "fp32"),))
    for kind in ("erm", "tv", "kl_temperature", "cvar"):
        for width in (4, 16):
            constants = {"KIND": kind, "MASKED": True, "NOMINAL": True, "WIDTH": width}
            rows = {"ROWS": op.ENTRIES // width}
            yield Variant(
                f"row_worst_case, {kind}, {width} wide", kernel, types, constants | rows, op.WARPS
            )


def _policy_loss() -> Iterator[Variant]:
    from drrlhf.kernels import policy_loss
    from drrlhf.kernels.sequence_logprobs import TOKENS, WARPS

    constants: dict[str, Any] = {
        "OLD": True,
        "ENTROPY": True,
        "REFERENCE": True,
        "CORRECTED": True,
        "TOKENS": TOKENS,
        "DOUBLE": False,
        "DEBUG": False,
    }
    kernel = policy_loss.policy_loss_kernel
    given = {"parameters": (("fp32", "fp32"),) * 3, "losses_ptr": "*fp64", "mask_ptr": "*i64"}
    for level, packed in (("token", False), ("sequence", True)):
        more = {"BY_SEQUENCE": level == "sequence", "PACKED": packed, "MASKED": not packed}
        layout = "packed" if packed else "padded"
        yield Variant(
            f"policy_loss, by {level}, {layout}",
            kernel,
            _types(kernel, **given),
            constants | more,
            WARPS,
            policy_loss.REGISTERS,
        )
    kernel = policy_loss.policy_loss_backward_kernel
    yield Variant(
        "policy_loss_backward, padded rows",
        kernel,
        _types(kernel),
        {"PACKED": False, "TOKENS": TOKENS},
        WARPS,
        divisible=_SIZES,
        streams=True,
    )


def variants() -> Iterator[Variant]:
    """Every kernel that a default call may compile, in the ways that matter."""
    yield from _token_logprobs()
    yield from _linear_token_logprobs()
    yield from _pairs()
    yield from _row_worst_case()
    yield from _policy_loss()


def build(variant: Variant, arch: int) -> dict[str, Any]:
    """A row of the table: a variant compiled for an NVIDIA architecture; needs no GPU."""
    import triton
    from drrlhf.kernels import tiles
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants, warps, stages = variant.constants, variant.warps, 3
    types = variant.types
    if variant.blocks is not None:
        tile = tiles.default_tile(
            torch.bfloat16, (arch // 10, 0), variant.three_stages, variant.small
        )
        if constants.get("LISTED") and constants.get("ACROSS"):
            tile = tile.looked_up()
        constants = constants | {
            "BM": tile.rows,
            "BN": tile.columns,
            "BK": tile.depth,
            "GROUP": tile.group,
        }
        warps, stages = tile.warps, tile.stages
        sides = tile._asdict() | {"piece": tile.columns // tiles.PIECES.value}
        constants["DESCRIBED"] = arch >= 90
        types = types | {
            name: f"tensordesc<bf16[{sides[rows]}, {sides[columns]}]>" if arch >= 90 else _POINTED
            for name, (rows, columns) in variant.blocks.items()
        }
    names = variant.kernel.arg_names
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    whole = {
        n
        for n, kind in signature.items()
        if n in variant.divisible or (isinstance(kind, str) and kind.startswith("*"))
    }
    whole_in = [
        (names.index(n), i) for n, kind in signature.items() if kind is _POINTED for i in range(4)
    ]
    source = ASTSource(
        fn=variant.kernel,
        signature=signature,
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={
            place: [["tt.divisibility", 16]]
            for place in [*((names.index(n),) for n in whole), *whole_in]
        },
    )
    options: dict[str, Any] = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    if variant.most_registers is not None:
        options["maxnreg"] = variant.most_registers
    found = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, spills = _resources(found.asm["cubin"])
    ptx = found.asm["ptx"]
    return {
        "kernel": variant.name,
        "arch": f"sm_{arch}",
        "registers": registers,
        "spills": spills,
        "shared": found.metadata.shared,
        "instructions": [name for name, text in _INSTRUCTIONS.items() if re.search(text, ptx)],
    }


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack, which only spills use here."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    match = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    assert match is not None, done.stdout
    return int(match[1]), int(match[2])


def made_from() -> dict[str, Any]:
    """What the table follows from: Triton brings the whole compiler."""
    import triton

    here = Path(__file__)
    root = here.parents[1]
    sources = [*(root / "kernels").glob("*.py"), root / "drrlhf" / "conventions.py", here]
    return kept.made_from({"triton": triton.__version__}, sources)


def records(arch: int) -> list[dict[str, Any]]:
    """Rows of every variant for one architecture, compiled now."""
    return [build(v, arch) for v in variants()]


def main(folder: str) -> None:
    """Writes the table of every variant and architecture."""
    rows = [row for arch in ARCHITECTURES for row in records(arch)]
    kept.write(Path(folder) / FILE, made_from(), rows)


if __name__ == "__main__":
    main(sys.argv[1])
