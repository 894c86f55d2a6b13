"""Tiles of matrix products: their sizes, the order in which programs take them, their launch.

Operands come in blocks: by tensor descriptors where a GPU has TMA (sm_90 and later), by pointers
elsewhere. What is read outside of a tensor is 0, and what would be written there is dropped, so no
kernel masks an operand. As many programs run as there are processors, each takes every so-many-th
tile, and loading the next tile begins before the last one is finished.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, TypeAlias

import torch
import triton
import triton.language as tl
from drrlhf.kernels.launch import INTERPRETED, on
from drrlhf.kernels.numerics import narrow, rounded
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


class Tile(NamedTuple):
    """Rows and columns of a product's tile, the depth of one step, warps, and pipeline stages.

    group: blocks of rows whose tiles are taken together, column by column, for the cache's sake.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    group: int

    def looked_up(self) -> Tile:
        """For blocks whose places are loaded first, a step that shares the stages with theirs."""
        return self._replace(stages=2 * self.stages - 1)

    def options(self) -> dict[str, int]:
        """As arguments of a launch."""
        return {
            "BM": self.rows,
            "BN": self.columns,
            "BK": self.depth,
            "GROUP": self.group,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


FLOAT32 = Tile(64, 64, 32, 4, 2, 8)
TINY = Tile(64, 128, 32, 4, 1, 2)  # interpreted: small problems have edges too
SMALL_MEMORY = Tile(128, 128, 64, 8, 3, 8)  # sm_80 and sm_86 to sm_120, with 100 to 164 KiB
# sm_90 and sm_100, with 227 KiB. Of these an H100 measured 128x128, 64x256, 256x128, depths of 128,
# two to four stages, groups of 8 to 64, and 4 warps, each slower; see CONTRIBUTING.
LARGE_MEMORY = Tile(128, 256, 64, 8, 4, 8)
# Larger tiles of so much work spill on sm_100, or do not compile (Triton 3.9).
TENSOR_MEMORY = Tile(64, 128, 64, 8, 3, 8)
# What is stored passes through shared memory, and an operand read across its rows likes three.
THREE_STAGES = LARGE_MEMORY._replace(stages=3)
# Rows of a list are rounded up to whole blocks of so many; every tile's rows divide it.
BLOCK_ROWS = 128


def default_tile(
    dtype: torch.dtype,
    capability: tuple[int, int] | None,
    three_stages: bool = False,
    small: bool = False,
) -> Tile:
    """The tile of products in `dtype`; capability: of an NVIDIA GPU, None for others.

    three_stages: the kernel stores its tile in a narrow dtype, or reads an operand across its rows.
    small: more follows the product than a large tile leaves registers for.
    """
    if INTERPRETED:
        return TINY
    if dtype == torch.float32:
        return FLOAT32
    if small and capability is not None and capability[0] == 10:
        return TENSOR_MEMORY
    if small or capability is None or capability[0] not in (9, 10):
        return SMALL_MEMORY
    return THREE_STAGES if three_stages else LARGE_MEMORY


@functools.cache
def _properties(device: torch.device) -> tuple[tuple[int, int] | None, int]:
    """Compute capability (None where there is none) and multiprocessors of a device."""
    if device.type != "cuda":
        return None, 4 if device.type == "cpu" else 64
    found = torch.cuda.get_device_properties(device)
    capability = None if torch.version.hip else (found.major, found.minor)
    return capability, found.multi_processor_count


def tile_for(x: Tensor, three_stages: bool = False, small: bool = False) -> Tile:
    """The tile for products of x's dtype on its device, see `default_tile`."""
    return default_tile(x.dtype, _properties(x.device)[0], three_stages, small)


def processors_of(x: Tensor) -> int:
    """Multiprocessors of x's device."""
    return _properties(x.device)[1]


def precision_of(x: Tensor) -> str:
    """How products of float32 are taken, as torch's own are; no matter for narrower dtypes."""
    # torch.get_float32_matmul_precision() raises once this has been set by its newer name.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def aligned_columns(x: Tensor, columns: int) -> int:
    """Columns rounded up, so that rows of x's dtype begin on multiples of 16 bytes."""
    whole = 16 // x.element_size()
    return triton.cdiv(columns, whole) * whole


def describable(x: Tensor) -> Tensor:
    """x (rows, columns), or a copy whose rows a descriptor can take: they must lie on 16 bytes."""
    size = x.element_size()
    if x.stride(1) == 1 and x.stride(0) * size % 16 == 0 and x.data_ptr() % 16 == 0:
        # A row that is broadcast has stride 0, which describes no tensor.
        if x.stride(0) >= x.shape[1] or x.shape[0] == 1:
            return x
    room = x.new_empty(x.shape[0], aligned_columns(x, x.shape[1]))[:, : x.shape[1]]
    return room.copy_(x)


def describes(device: torch.device) -> bool:
    """Whether blocks move by descriptors there."""
    capability = _properties(device)[0]
    return INTERPRETED or (capability is not None and capability >= (9, 0))


Blocks: TypeAlias = TensorDescriptor | tuple[Tensor, int, int, int]


def blocks_of(x: Tensor, rows: int, columns: int) -> Blocks:
    """`describable` x as an argument of `load_block` and `store_block`, in blocks of this size."""
    # One row has any stride; a descriptor wants that of whole 16 bytes.
    stride = x.stride(0) if x.shape[0] > 1 else aligned_columns(x, x.shape[1])
    if describes(x.device):
        return TensorDescriptor(x, list(x.shape), [stride, 1], [rows, columns])
    return x, stride, *x.shape


def launch(kernel: Any, most: int, x: Tensor, tile: Tile, *arguments: Any, **options: Any) -> None:
    """Runs a kernel that takes at most `most` tiles on x's device, one program a processor."""
    programs = max(1, min(most, processors_of(x)))
    with on(x):
        kernel[(programs,)](
            *arguments, programs, DESCRIBED=describes(x.device), **options, **tile.options()
        )


# The interpreter multiplies the bits of bfloat16 as if they were integers.
WIDENS = tl.constexpr(INTERPRETED)


@triton.jit
def multiply(left, right, total, PRECISION: tl.constexpr):
    """left right + total, in float32."""
    if WIDENS:
        left, right = left.to(tl.float32), right.to(tl.float32)
    if left.dtype == tl.float32 and PRECISION == "ieee":
        # One sum of all products would lose digits that sums of each block's keep; written as a
        # sum the compiler would make one of them again.
        return tl.fma(tl.dot(left, right, input_precision=PRECISION), 1.0, total)
    else:
        return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def load_block(x, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DESCRIBED: tl.constexpr):
    """A block of `blocks_of`, 0 outside of the tensor."""
    if DESCRIBED:
        return x.load([row, column])
    else:
        ptr, stride, rows, columns = x
        o_row = row + tl.arange(0, ROWS)
        o_column = column + tl.arange(0, COLUMNS)
        p = ptr + (o_row.to(tl.int64) * stride)[:, None] + o_column[None, :]
        mask = (o_row < rows)[:, None] & (o_column < columns)[None, :]
        return tl.load(p, mask=mask, other=0.0)


@triton.jit
def store_block(x, row, column, value, DESCRIBED: tl.constexpr):
    """float32 value to a block of `blocks_of`, where that lies inside of the tensor."""
    if DESCRIBED:
        x.store([row, column], rounded(value, x.dtype))
    else:
        ptr, stride, rows, columns = x
        o_row = row + tl.arange(0, value.shape[0])
        o_column = column + tl.arange(0, value.shape[1])
        p = ptr + (o_row.to(tl.int64) * stride)[:, None] + o_column[None, :]
        mask = (o_row < rows)[:, None] & (o_column < columns)[None, :]
        tl.store(p, narrow(value, ptr), mask=mask)


@triton.jit
def place_of(tile, row_blocks, column_blocks, GROUP: tl.constexpr):
    """Row block and column block of a tile: GROUP row blocks at a time, column by column."""
    in_group = GROUP * column_blocks
    first = tile // in_group * GROUP
    size = tl.minimum(row_blocks - first, GROUP)
    return first + (tile % in_group) % size, (tile % in_group) // size


PIECES = tl.constexpr(4)


@triton.jit
def pieces(x, BM: tl.constexpr, BN: tl.constexpr):
    """x (BM, BN) as PIECES tensors, side by side: work on one needs registers for one at a time."""
    left, right = _halves(x, BM, BN)
    first, second = _halves(left, BM, BN // 2)
    third, fourth = _halves(right, BM, BN // 2)
    return first, second, third, fourth


@triton.jit
def _halves(x, BM: tl.constexpr, BN: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(x, (BM, 2, BN // 2)), (0, 2, 1)))
