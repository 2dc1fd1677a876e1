"""NVFP4 GEMM of up to 64 rows that reads Marlin's own weights: ``nvfp4_stream.cu`` beside Marlin, as one operator.

On an H100 Marlin reads a layer of 31B at 2.0 TB/s and this kernel at 2.3, of 3.0. It takes small batches and leaves the
others to Marlin; there is no second copy of a weight. A row's result has the same bits whatever rows stand beside it,
which Marlin's has not.
"""

from __future__ import annotations

import functools
import logging
from importlib import resources
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from vllm_gemma4_spec.kernels import cuda
from vllm_gemma4_spec.kernels.small_batch_gemm import Scratch

logger = logging.getLogger("vllm.plugins.gemma4_spec")

COLUMNS, DEPTH = 256, 128  # outputs of a tile, inputs of a stage; N and K must be multiples
MOST_ROWS = 64
# Up to here faster than Marlin for 31B's shapes on an H100 (13 % at 1 to 8 rows, 6 % at 16, 2 % at 32; at 64 rows 20 %
# slower): benchmarks/results/h100-target-gemm.json.
FASTER_ROWS = 32
# Weights of a matrix from which on. 26B-A4B's are smaller: on an H200 its plain decoding took 4 % longer with them.
FASTER_WEIGHTS = 2**25
_TILES = (1, 2, 4, 8)  # compiled numbers of 8-row tiles
_STAGES = {1: 4, 2: 4, 4: 4, 8: 4}
_THREADS = 640


def tiles_for(rows: int) -> int:
    return next(t for t in _TILES if rows <= 8 * t)


def source(tiles: int, scaled: bool, stages: int) -> str:
    """The kernel's CUDA C++ for inputs of up to ``8 * tiles`` rows."""
    text = resources.files(__package__).joinpath("nvfp4_stream.cu").read_text()
    return f"#define MT {tiles}\n#define SCALED {int(scaled)}\n#define STAGES {stages}\n{text}"


def shared_bytes(tiles: int, scaled: bool, stages: int) -> int:
    """What the kernel's ``BARRIERS_AT`` and the barriers behind it come to."""
    stage = DEPTH // 16 * COLUMNS * 9 + scaled * DEPTH * 2 + 8 * tiles * (DEPTH * 2 + 16)
    return stages * stage + 2 * 2048 * 4 + 16 * stages


@functools.cache
def _kernel(tiles: int, scaled: bool, stages: int) -> Any:
    made = cuda.Kernel(source(tiles, scaled, stages), "nvfp4_stream")
    made.allow_shared(shared_bytes(tiles, scaled, stages))
    return made


@functools.cache
def parts(n: int, k: int, blocks: int) -> int:
    """The most blocks that share a tile of outputs when ``blocks`` have equal shares of the weights."""
    per_tile = k // DEPTH
    units = n // COLUMNS * per_tile

    def block_of(unit: int) -> int:
        return ((unit + 1) * blocks - 1) // units

    return max(block_of((tile + 1) * per_tile - 1) - block_of(tile * per_tile) + 1 for tile in range(n // COLUMNS))


SCRATCH = Scratch()


def stream_gemm(
    x: Tensor,
    pre_quant_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    global_scale: Tensor,
    n: int,
) -> Tensor:
    """``(x * pre_quant_scale) @ W.T`` for at most :data:`MOST_ROWS` rows, on the current stream.

    Args:
        x: ``[rows, K]`` bfloat16, contiguous.
        pre_quant_scale: ``[K]`` bfloat16, or None for ones.
        weight, weight_scale, global_scale: as Marlin holds them (``prepare_fp4_layer_for_marlin``): ``[K / 16, 2 * N]``
            int32, ``[K / 16, N]`` bytes, ``[1]`` float32.

    Returns:
        ``[rows, N]`` bfloat16; a row has the same bits whatever rows stand beside it.
    """
    rows, k = x.shape
    tiles, scaled = tiles_for(rows), pre_quant_scale is not None
    stages, blocks = _STAGES[tiles], _blocks(x.device.index)
    y = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    partial, arrivals = SCRATCH.on(x.device)
    _kernel(tiles, scaled, stages)(
        grid=(blocks, 1, 1),
        block=_THREADS,
        args=[
            weight,
            weight_scale,
            x,
            x if pre_quant_scale is None else pre_quant_scale,  # not read where there is none
            y,
            global_scale,
            partial,
            arrivals,
            rows,
            n,
            k,
            parts(n, k, blocks),
        ],
        shared_bytes=shared_bytes(tiles, scaled, stages),
    )
    return y


@functools.cache
def _blocks(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def linear(
    x: Tensor,
    pre_quant_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    global_scale: Tensor,
    workspace: Tensor,
    n: int,
    most_rows: int,
) -> Tensor:
    """One linear layer: up to ``most_rows`` rows here, more on Marlin; see :func:`stream_gemm`."""
    flat = x.reshape(-1, x.shape[-1])
    if flat.shape[0] <= most_rows:
        y = stream_gemm(flat.contiguous(), pre_quant_scale, weight, weight_scale, global_scale, n)
    else:
        if pre_quant_scale is not None:
            flat = flat * pre_quant_scale
        from vllm.model_executor.layers.quantization.utils.marlin_utils_fp4 import apply_fp4_marlin_linear

        y = apply_fp4_marlin_linear(flat, weight, weight_scale, global_scale, workspace, n, flat.shape[-1])
    return y.view(*x.shape[:-1], n)


def _linear_shape(x: Tensor, *parameters: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], parameters[-2])


@functools.cache
def register_operator() -> None:
    """``torch.ops.vllm.gemma4_spec_stream_linear``: opaque to torch.compile, which sees its shape only."""
    from vllm.utils.torch_utils import direct_register_custom_op

    direct_register_custom_op("gemma4_spec_stream_linear", linear, fake_impl=_linear_shape)


@functools.cache
def available() -> bool:
    """Whether the kernel compiles here; if not, the log says once why, and vLLM's kernels stay."""
    if torch.cuda.get_device_capability()[0] < 9:  # bfloat16 multiplication and programmatic launch
        return False
    try:
        for tiles in _TILES:
            for scaled in (False, True):
                _kernel(tiles, scaled, _STAGES[tiles])
    except (ImportError, RuntimeError) as error:
        logger.info("NVFP4 GEMMs of small batches stay on Marlin: %s", str(error).splitlines()[0])
        return False
    return True


def suits(layer: Module) -> bool:
    """Whether the kernel can take this layer, which Marlin has reordered: shape, dtype and device."""
    n, k = layer.output_size_per_partition, layer.input_size_per_partition
    return bool(
        layer.weight.is_cuda
        and layer.params_dtype == torch.bfloat16
        and n % COLUMNS == 0
        and k % DEPTH == 0
        and n * k >= FASTER_WEIGHTS
        and n // COLUMNS * (k // DEPTH) >= _blocks(layer.weight.device.index)  # every block has a share
        and getattr(layer, "bias", None) is None
        and available()
    )


def reserve(n: int, k: int, device: torch.device) -> None:
    """Make room for the partial sums of this shape; no scratch can be replaced once a CUDA graph is captured."""
    most = parts(n, k, _blocks(device.index))
    SCRATCH.reserve(device, n // COLUMNS * most * MOST_ROWS * COLUMNS, n // COLUMNS * 8)
    register_operator()
