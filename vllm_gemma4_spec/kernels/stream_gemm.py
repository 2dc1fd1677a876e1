"""NVFP4 GEMM of up to 128 rows that reads Marlin's own weights: ``nvfp4_stream.cu`` beside Marlin, as one operator.

It takes the batches in which it is the faster one (``chosen_rows``) and leaves the others to Marlin; there is no second
copy of a weight. Up to 64 rows a row's result has the same bits whatever rows stand beside it, which Marlin's has not.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from vllm_gemma4_spec.kernels import chosen_rows, cuda
from vllm_gemma4_spec.kernels.scratch import Scratch

logger = logging.getLogger("vllm.plugins.gemma4_spec")

COLUMNS, DEPTH = 256, 128  # outputs of a tile, inputs of a stage
MULTIPLE = 64  # of which N and K must be
MOST_ROWS = 128
ALL = -1  # every form
SAME_BITS = 64  # rows up to which a row's result does not depend on the others


@dataclass(frozen=True)
class Form:
    """How the kernel is compiled; see ``nvfp4_stream.cu``. Two forms differ in the order of additions by ``groups`` and
    by how many blocks share the weights (``sharing``), and in nothing else that reaches the result."""

    stages: int  # of the ring of weights
    groups: int = 2  # of eight warps: a stage is one group's, the next one the other's
    wgmma: bool = False
    first: int = 2  # stages of weights that do not wait for the kernel before this one
    pace: int = 1000  # cycles from one stage of those behind them to the next, until x is there; 0: at once
    sharing: int = 0  # blocks that share a tile at most, on average; 0: as many as there are

    @property
    def threads(self) -> int:
        return 256 * self.groups + (128 if self.wgmma else 64)

    def blocks(self, multiprocessors: int, n: int, k: int) -> int:
        most = min(multiprocessors, units(n, k))
        return min(most, self.sharing * -(-n // COLUMNS)) if self.sharing else most


# By compiled number of 8-row tiles; each ran in the fourth run of layer_chain.py on an H200. Up to 64 rows all add up
# in the same order: a row's bits are the same in each.
WGMMA_FORMS = {
    1: Form(6),
    2: Form(8, wgmma=True),
    4: Form(6, wgmma=True),
    6: Form(5, wgmma=True),
    8: Form(5, wgmma=True),
    10: Form(5, groups=1, wgmma=True, first=3, pace=0, sharing=8),
    16: Form(4, groups=1, wgmma=True, first=3, pace=0, sharing=8),
}
MMA_FORMS = {1: Form(4), 2: Form(4), 4: Form(4), 8: Form(4)}  # cards without wgmma


def _form(rows: int) -> int:
    """Which of :func:`forms` takes this many rows; one behind the last if none."""
    return sum(rows > 8 * tiles for tiles in forms())


def tiles_for(rows: int, forms: Iterable[int] = WGMMA_FORMS) -> int:
    return next(t for t in forms if rows <= 8 * t)


def mma_async(tiles: int) -> str:
    """``wgmma.m64n(8 * tiles)k16`` in CUDA C++: weights from registers, rows of x from shared memory."""
    sums = 4 * tiles
    d = ",".join(f"%{i}" for i in range(sums))
    a = ",".join(f"%{sums + i}" for i in range(4))
    outputs = ", ".join(f'"+f"(d[{i // 4}][{i % 4}])' for i in range(sums))
    inputs = ", ".join(f'"r"(a[{i}])' for i in range(4))
    return f"""
__device__ __forceinline__ void mma_async(float (&d)[{tiles}][4], const unsigned (&a)[4], unsigned long long x) {{
    asm volatile("wgmma.mma_async.sync.aligned.m64n{8 * tiles}k16.f32.bf16.bf16 "
                 "{{{d}}}, {{{a}}}, %{sums + 4}, 1, 1, 1, 0;"
                 : {outputs} : {inputs}, "l"(x));
}}
"""


def macros(tiles: int, scaled: bool, form: Form) -> dict[str, int]:
    return {
        "MT": tiles,
        "SCALED": int(scaled),
        "STAGES": form.stages,
        "GROUPS": form.groups,
        "WGMMA": int(form.wgmma),
        "FIRST": form.first,
        "PACE": form.pace,
    }


def source(tiles: int, scaled: bool, form: Form) -> str:
    """The kernel's CUDA C++ for inputs of up to ``8 * tiles`` rows."""
    text = resources.files(__package__).joinpath("nvfp4_stream.cu").read_text()
    defined = "".join(f"#define {k} {v}\n" for k, v in macros(tiles, scaled, form).items())
    return defined + mma_async(tiles) * form.wgmma + text


def shared_bytes(tiles: int, form: Form) -> int:
    """What the kernel's ``BARRIERS_AT`` and the barriers behind it come to."""
    stage = DEPTH // 16 * COLUMNS * 9 + tiles * 8 * DEPTH * 2 + (0 if form.wgmma else DEPTH * 2)
    return form.stages * stage + (form.groups - 1) * 2 * 2048 * 4 + 16 * form.stages


@functools.cache
def kernel(tiles: int, scaled: bool, form: Form) -> Any:
    made = cuda.Kernel(source(tiles, scaled, form), "nvfp4_stream", this_only=form.wgmma)
    made.allow_shared(shared_bytes(tiles, form))
    return made


def units(n: int, k: int) -> int:
    """What blocks have equal shares of: a stage of a tile of outputs."""
    return -(-n // COLUMNS) * -(-k // DEPTH)


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
        ``[rows, N]`` bfloat16; up to 64 rows a row has the same bits whatever rows stand beside it.
    """
    tiles = tiles_for(x.shape[0], forms())
    return launch(tiles, forms()[tiles], x, pre_quant_scale, weight, weight_scale, global_scale, n)


def launch(
    tiles: int,
    form: Form,
    x: Tensor,
    pre_quant_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    global_scale: Tensor,
    n: int,
) -> Tensor:
    """The kernel of this form for up to ``8 * tiles`` rows; the rest as in :func:`stream_gemm`."""
    rows, k = x.shape
    y = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    partial, arrivals = SCRATCH.on(x.device)
    box, shape = (DEPTH // 16, COLUMNS), (k // 16, n)
    weights = [cuda.weight_map(w.data_ptr(), *shape, item, *box) for w, item in ((weight, 8), (weight_scale, 1))]
    scaled = pre_quant_scale is not None
    kernel(tiles, scaled, form)(
        grid=(form.blocks(_multiprocessors(x.device.index), n, k), 1, 1),
        block=form.threads,
        args=[
            *weights,
            *([x, pre_quant_scale] if scaled else [cuda.matrix_map(x.data_ptr(), rows, k, 2, 8 * tiles, 64)]),
            y,
            global_scale,
            partial,
            arrivals,
            rows,
            n,
            k,
        ],
        shared_bytes=shared_bytes(tiles, form),
    )
    return y


@functools.cache
def forms() -> dict[int, Form]:
    """Forms for this card: the tensor cores of Hopper have instructions of their own, which no later card has."""
    return WGMMA_FORMS if torch.cuda.get_device_capability()[0] == 9 else MMA_FORMS


@functools.cache
def _multiprocessors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _times(layer: Module) -> chosen_rows.Times:
    """Median microseconds of both kernels on this layer's weights, which each time come from memory and not the L2."""
    n, k, device = layer.output_size_per_partition, layer.input_size_per_partition, layer.weight.device
    weights = (layer.weight, layer.weight_scale, layer.weight_global_scale)
    us = chosen_rows.clock(device, calls=7)
    found: chosen_rows.Times = {}
    largest = [8 * tiles for tiles in forms()]
    for count in itertools.chain.from_iterable(zip([1, *(r + 1 for r in largest)], largest, strict=False)):
        x = torch.randn(count, k, device=device, dtype=torch.bfloat16)
        ours, marlins = (
            us(functools.partial(linear, x, None, *weights, layer.workspace, n, streamed)) for streamed in (ALL, 0)
        )
        found[count] = ours, marlins
    return found


def faster(layer: Module) -> int:
    """Which forms are faster than Marlin for a layer that suits and is ready; bit i is the i-th of :func:`forms`.

    With ``VLLM_BATCH_INVARIANT=1`` all, whatever they take: Marlin's order of additions depends on the batch.
    """
    import vllm.envs

    if vllm.envs.VLLM_BATCH_INVARIANT:
        return ALL
    n, k = layer.output_size_per_partition, layer.input_size_per_partition
    try:
        return chosen_rows.chosen(n, k, _maker(), lambda: _times(layer))
    except RuntimeError as error:  # no memory for it, or the kernel does not run here
        logger.info("NVFP4 GEMM %dx%d stays on Marlin: %s", n, k, str(error).partition("\n")[0])
        return 0


@functools.cache
def _maker() -> str:
    return chosen_rows.made_by(*(source(tiles, False, form) for tiles, form in forms().items()))


def linear(
    x: Tensor,
    pre_quant_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    global_scale: Tensor,
    workspace: Tensor,
    n: int,
    streamed: int,
) -> Tensor:
    """One linear layer: batches of the forms in ``streamed`` here, others on Marlin; see :func:`faster`."""
    import vllm.envs

    flat = x.reshape(-1, x.shape[-1])
    if streamed and flat.shape[0] <= 8 * max(forms()) and streamed >> _form(flat.shape[0]) & 1:
        parts = flat.contiguous().split(SAME_BITS if vllm.envs.VLLM_BATCH_INVARIANT else MOST_ROWS)
        y = _joined([stream_gemm(part, pre_quant_scale, weight, weight_scale, global_scale, n) for part in parts])
    else:
        if pre_quant_scale is not None:
            flat = flat * pre_quant_scale
        from vllm.model_executor.layers.quantization.utils.marlin_utils_fp4 import apply_fp4_marlin_linear

        y = apply_fp4_marlin_linear(flat, weight, weight_scale, global_scale, workspace, n, flat.shape[-1])
    return y.view(*x.shape[:-1], n)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


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
        for tiles, form in forms().items():
            for scaled in (False, True):
                kernel(tiles, scaled, form)
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
        and n % MULTIPLE == 0
        and k % MULTIPLE == 0
        and getattr(layer, "bias", None) is None
        and available()
    )


def reserve(n: int, k: int, device: torch.device) -> None:
    """Make room for the partial sums of this shape; no scratch can be replaced once a CUDA graph is captured."""
    blocks = min(_multiprocessors(device.index), units(n, k))
    SCRATCH.reserve(device, blocks * 2 * MOST_ROWS * COLUMNS, -(-n // COLUMNS) * 8)
    register_operator()
