"""GEMMs of a few rows with bfloat16 weights: ``bf16_rows.cu`` beside cuBLAS, as one operator.

Google's assistants and other drafters come in bfloat16. cuBLAS takes 5 to 8 us for each of their GEMMs, waits for the
kernel ahead before it asks for a weight, and adds up parts in a second kernel. The kernel here reads the weight where
PyTorch has it; all of it is on its way when the kernel ahead ends.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_gemma4_spec.kernels import cuda

logger = logging.getLogger("vllm.plugins.gemma4_spec")

ROWS, COLUMNS = 16, 256  # outputs of a tile; what K is a multiple of
WARPS = 8  # of a block
BLOCKS = 2  # on a multiprocessor
MOST_PARTS = 4  # blocks of a cluster
TILES = (1, 2, 4)  # of 8 rows, that the kernel is compiled for
MOST_ROWS = 8 * TILES[-1]


@dataclass(frozen=True)
class Launch:
    split: int  # warps of a block that share a tile of outputs
    parts: int  # blocks that do


def chunks(tiles: int, gelu: bool) -> int:
    """Of 32 inputs of its outputs, that a warp has in registers: of a thread's 128, 64, or 32 beside many sums."""
    return (8 if tiles < 4 else 4) // (2 if gelu else 1)


@functools.cache
def plan(n: int, k: int, tiles: int, gelu: bool, multiprocessors: int) -> Launch:
    """As many warps as run at once, each with as few of the inputs as that allows."""
    units, outputs = k // (32 * chunks(tiles, gelu)), n // ROWS // (2 if gelu else 1)
    most = multiprocessors * BLOCKS * WARPS
    split = parts = 1
    while split < WARPS and split * 2 <= units and outputs * split * 2 <= most:
        split *= 2
    while split == WARPS and parts < MOST_PARTS and split * parts * 2 <= units and outputs * split * parts * 2 <= most:
        parts *= 2
    return Launch(split, parts)


def macros(tiles: int, gelu: bool) -> dict[str, int]:
    return {"MT": tiles, "GELU": int(gelu), "CHUNKS": chunks(tiles, gelu), "FIT": BLOCKS}


def source(tiles: int, gelu: bool) -> str:
    """The kernel's CUDA C++ for inputs of up to ``8 * tiles`` rows."""
    before = "#define CLUSTER\n" + cuda.source("rows_device.cu")
    return cuda.source("bf16_rows.cu", macros(tiles, gelu), before)


@functools.cache
def _kernel(tiles: int, gelu: bool) -> Any:
    made = cuda.Kernel(source(tiles, gelu), "bf16_rows")
    made.allow_shared(shared_bytes(tiles, gelu, MOST_PARTS))
    return made


def shared_bytes(tiles: int, gelu: bool, parts: int) -> int:
    """A sum of each thread's, of all blocks of a cluster."""
    return parts * WARPS * (2 if gelu else 1) * tiles * 512


@functools.cache
def _multiprocessors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def gemm(x: Tensor, weight: Tensor, gelu: bool = False, how: Launch | None = None) -> Tensor:
    """``x @ weight.T`` for at most :data:`MOST_ROWS` rows, on the current stream.

    Args:
        x: ``[rows, K]`` bfloat16, contiguous.
        weight: ``[N, K]`` bfloat16, contiguous; K a multiple of 256, N of 16 (32 with gelu).
        gelu: give ``gelu_tanh(first half) * second half`` of the outputs.
        how: None for what suits the card.

    Returns:
        ``[rows, N]`` bfloat16, or ``[rows, N / 2]`` with ``gelu``.
    """
    (rows, k), n = x.shape, weight.shape[0]
    tiles = next(t for t in TILES if rows <= 8 * t)
    how = how or plan(n, k, tiles, gelu, _multiprocessors(x.device.index))
    outputs = n // ROWS // (2 if gelu else 1)
    y = torch.empty(rows, n // 2 if gelu else n, dtype=x.dtype, device=x.device)
    _kernel(tiles, gelu)(
        grid=(-(-outputs * how.split // WARPS), 1, how.parts),
        block=32 * WARPS,
        args=[weight, x, y, rows, n, k, how.split],
        shared_bytes=shared_bytes(tiles, gelu, how.parts),
        cluster=how.parts,
    )
    return y


def linear(x: Tensor, weight: Tensor, gelu: bool) -> Tensor:
    """One linear layer, ``[..., K]`` to ``[..., N]`` (``[..., N / 2]`` with ``gelu``): larger batches by cuBLAS."""
    flat = x.reshape(-1, x.shape[-1])
    if flat.shape[0] <= MOST_ROWS:
        y = gemm(flat.contiguous(), weight, gelu)
    else:
        y = F.linear(flat, weight)
        if gelu:
            y, both = y.new_empty(y.shape[0], y.shape[1] // 2), y
            torch.ops._C.gelu_tanh_and_mul(y, both)
    return y.view(*x.shape[:-1], y.shape[-1])


def _output_shape(x: Tensor, weight: Tensor, gelu: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0] // 2 if gelu else weight.shape[0])


@functools.cache
def register_operator() -> None:
    """``torch.ops.vllm.gemma4_spec_bf16_linear``: opaque to torch.compile, which sees its shape only."""
    from vllm.utils.torch_utils import direct_register_custom_op

    direct_register_custom_op("gemma4_spec_bf16_linear", linear, fake_impl=_output_shape)


@functools.cache
def available() -> bool:
    """Whether the kernel runs on the current card; if not, the log says once why, and cuBLAS keeps all."""
    if not cuda.starts_early(torch.device("cuda")):
        return False
    try:
        for tiles in TILES:
            for gelu in (False, True):
                _kernel(tiles, gelu)
    except (ImportError, RuntimeError) as error:
        logger.info("bfloat16 GEMMs of few rows stay cuBLAS's: %s", str(error).partition("\n")[0])
        return False
    return True


def suits(weight: Tensor, gelu: bool = False) -> bool:
    """Whether the kernel can take this weight: shape, dtype, memory and device."""
    return (
        cuda.nvidia(weight)
        and weight.dtype == torch.bfloat16
        and weight.dim() == 2
        and weight.is_contiguous()
        and weight.data_ptr() % 16 == 0
        and weight.shape[0] % (2 * ROWS if gelu else ROWS) == 0
        and weight.shape[1] % COLUMNS == 0
        and available()
    )
