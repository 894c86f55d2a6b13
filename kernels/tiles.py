"""Tiles of matrix products: their sizes, and how a size is chosen.

The default is a table, so that a first call compiles one kernel. DRRLHF_AUTOTUNE=1 times every size
of `SEARCH` once for each kernel, width, vocabulary and dtype, and keeps the choice on disk.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from drrlhf.kernels.launch import INTERPRETED, on
from torch import Tensor

AUTOTUNE = os.environ.get("DRRLHF_AUTOTUNE", "0") not in ("", "0")


class Tile(NamedTuple):
    """Rows and columns of a product's tile, the depth of one step, warps, and pipeline stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        """As arguments of a launch."""
        return {
            "BM": self.rows, "BN": self.columns, "BK": self.depth, "num_warps": self.warps,
            "num_stages": self.stages,
        }  # fmt: skip


SEARCH = (
    Tile(128, 256, 64, 8, 3),
    Tile(128, 256, 64, 8, 4),
    Tile(128, 128, 64, 4, 4),
    Tile(128, 128, 64, 8, 3),
    Tile(64, 256, 64, 8, 4),
    Tile(64, 128, 64, 4, 4),
)
FLOAT32 = Tile(64, 64, 32, 4, 2)
MANY_REGISTERS = Tile(64, 128, 64, 8, 3)  # where much follows the product
SMALL_MEMORY = Tile(128, 128, 64, 8, 3)  # sm_80 and sm_86 to sm_120, with 100 to 164 KiB
LARGE_MEMORY = Tile(128, 256, 64, 8, 3)  # sm_90 and sm_100, with 227 KiB
TINY = Tile(64, 128, 32, 4, 1)  # interpreted: small problems have edges too


def default_tile(
    dtype: torch.dtype, capability: tuple[int, int] | None, heavy: bool = False
) -> Tile:
    """The tile of products in `dtype`; capability: of an NVIDIA GPU, None for others.

    heavy: optional statistics, an entropy's gradient, a bias or a softcap follow the product.
    """
    if INTERPRETED:
        return TINY
    if dtype == torch.float32:
        return FLOAT32
    if heavy:
        return MANY_REGISTERS
    large = capability is not None and capability[0] in (9, 10)
    return LARGE_MEMORY if large else SMALL_MEMORY


@functools.cache
def _properties(device: torch.device) -> tuple[tuple[int, int] | None, int]:
    """Compute capability (None where there is none) and multiprocessors of a device."""
    if device.type != "cuda":
        return None, 4 if device.type == "cpu" else 64
    found = torch.cuda.get_device_properties(device)
    capability = None if torch.version.hip else (found.major, found.minor)
    return capability, found.multi_processor_count


def tile_for(x: Tensor, heavy: bool = False) -> Tile:
    """The default tile for products of x's dtype on its device, see `default_tile`."""
    return default_tile(x.dtype, _properties(x.device)[0], heavy)


def splits_of(x: Tensor, row_blocks: int, tiles: int) -> int:
    """Into how many parts to split `tiles` tiles of the vocabulary, each row block's loop.

    The fewest that keep the processors equally busy: parts of all row blocks run side by side.
    """
    processors = _properties(x.device)[1]

    def longest(splits: int) -> int:
        return triton.cdiv(row_blocks * splits, processors) * triton.cdiv(tiles, splits)

    most = min(tiles, max(1, triton.cdiv(4 * processors, row_blocks)))
    return min(range(1, most + 1), key=lambda splits: (longest(splits), splits))


def precision_of(x: Tensor) -> str:
    """How products of float32 are taken, as torch's own are; no matter for narrower dtypes."""
    return "tf32" if torch.get_float32_matmul_precision() != "highest" else "ieee"


@functools.cache
def _tuned(kernel: Any) -> Any:
    configs = [
        triton.Config(
            {"BM": t.rows, "BN": t.columns, "BK": t.depth},
            num_warps=t.warps,
            num_stages=t.stages,
        )
        for t in SEARCH
    ]
    return triton.autotune(configs, key=["width", "vocabulary"], cache_results=True)(kernel)


def launch(
    kernel: Any, grid: Callable[[int, int], tuple[int, ...]], x: Tensor, tile: Tile,
    *arguments: Any, tunable: bool = True, **options: Any,
) -> None:  # fmt: skip
    """Runs a kernel of tiles on x's device, with `tile` or with what tuning finds.

    grid: programs for a number of rows and columns of a tile. tunable: not where a second run would
    add to what the first one wrote.
    """
    with on(x):
        if AUTOTUNE and tunable and not INTERPRETED and x.dtype != torch.float32:
            _tuned(kernel)[lambda meta: grid(meta["BM"], meta["BN"])](*arguments, **options)
        else:
            kernel[grid(tile.rows, tile.columns)](*arguments, **options, **tile.options())


# The interpreter multiplies the bits of bfloat16 as if they were integers.
WIDENS = tl.constexpr(INTERPRETED)


@triton.jit
def multiply(left, right, total, PRECISION: tl.constexpr):
    """left right + total, in float32."""
    if WIDENS:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION)
