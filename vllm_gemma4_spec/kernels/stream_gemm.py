"""NVFP4 GEMM of up to 128 rows that reads Marlin's own weights: ``nvfp4_stream.cu`` beside Marlin, as one operator.

It takes the batches in which it is the faster one, or as fast and launched early (``chosen_rows``), and leaves the
others to Marlin; there is no second copy of a weight. A low-rank branch (SVDQuant) is computed meanwhile and added to
the sums; what it gives of gate and up projections may be ``gelu(gate) * up``. Up to 64 rows a row's result has the same
bits whatever rows stand beside it, which Marlin's has not.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from vllm_gemma4_spec.kernels import chosen_rows, cuda
from vllm_gemma4_spec.kernels.scratch import PARTS, Scratch

logger = logging.getLogger("vllm.plugins.gemma4_spec")

COLUMNS, DEPTH = 256, 128  # outputs of a tile, inputs of a stage
MULTIPLE = 64  # of which N and K must be
MOST_ROWS = 128
ALL = -1  # every form
SAME_BITS = 64  # rows up to which a row's result does not depend on the others
SPREAD_FROM = 6  # tiles of 8 rows: for fewer the last block is the faster way
RANK = 32  # of a low-rank branch that the kernel takes in
SLICES = 64  # of the inputs, whose parts of the branch are added up
LowRank = tuple[Tensor, Tensor]  # svdquant_lora_a [RANK, K] and svdquant_lora_b [N, RANK], bfloat16


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

    def threads_with(self, rank: int) -> int:
        """With a branch, which has warps of its own: with wgmma those that idle else."""
        return self.threads + (32 if rank and not self.wgmma else 0)

    def blocks(self, multiprocessors: int, n: int, k: int) -> int:
        most = min(multiprocessors, units(n, k))
        return min(most, self.sharing * -(-n // COLUMNS)) if self.sharing else most


# By compiled number of 8-row tiles, ascending; each ran in the fourth run of layer_chain.py on an H200. Up to 64 rows
# all add up in the same order: a row's bits are the same in each.
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
    return bisect.bisect_left(tuple(forms()), -(-rows // 8))


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


def spreads(tiles: int, form: Form) -> bool:
    """Whether all blocks that share a tile of outputs add up its parts, and wait for each other's; else the last does.

    Not where the blocks of another process's kernel may hold multiprocessors meanwhile, and wait for theirs; nor on
    cards without wgmma, as none was tried; of their form, run on an H200, one of two chains had another result
    (``benchmarks/NOTES.md``, change 126).
    """
    return form.wgmma and tiles >= SPREAD_FROM and not cuda.beside_others()


def macros(tiles: int, scaled: bool, form: Form, rank: int = 0, gelu: bool = False) -> dict[str, int]:
    return {
        "MT": tiles,
        "SCALED": int(scaled),
        "RANK": rank,
        "GELU": int(gelu),
        "STAGES": form.stages,
        "GROUPS": form.groups,
        "WGMMA": int(form.wgmma),
        "FIRST": form.first,
        "PACE": form.pace,
        "SPREAD": int(spreads(tiles, form)),
    }


def source(tiles: int, scaled: bool, form: Form, rank: int = 0, gelu: bool = False) -> str:
    """The kernel's CUDA C++ for inputs of up to ``8 * tiles`` rows."""
    return cuda.source("nvfp4_stream.cu", macros(tiles, scaled, form, rank, gelu), mma_async(tiles) * form.wgmma)


def shared_bytes(tiles: int, form: Form, rank: int = 0) -> int:
    """What the kernel's ``BARRIERS_AT`` and the barriers behind it come to, and what a branch needs."""
    stage = DEPTH // 16 * COLUMNS * 9 + tiles * 8 * DEPTH * 2 + (0 if form.wgmma else DEPTH * 2)
    branch = (8 * tiles + COLUMNS) * rank * 2
    return form.stages * stage + (form.groups - 1) * 2 * 2048 * 4 + 16 * form.stages + 16 + branch


@functools.cache
def kernel(tiles: int, scaled: bool, form: Form, rank: int = 0, gelu: bool = False) -> Any:
    made = cuda.Kernel(source(tiles, scaled, form, rank, gelu), "nvfp4_stream", this_only=form.wgmma)
    made.allow_shared(shared_bytes(tiles, form, rank))
    return made


def units(n: int, k: int) -> int:
    """What blocks have equal shares of: a stage of a tile of outputs."""
    return -(-n // COLUMNS) * -(-k // DEPTH)


def parts(blocks: int, n: int, gelu: bool) -> int:
    """Tiles of sums that the kernel leaves in memory at most: with ``gelu`` ``Results::part_at`` says where."""
    return blocks + -(-n // COLUMNS) if gelu else 2 * blocks


SCRATCH = PARTS
BRANCH_SCRATCH = Scratch()  # parts of the branch, behind them its t; how many of each are there


def stream_gemm(
    x: Tensor,
    pre_quant_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    global_scale: Tensor,
    n: int,
    low_rank: LowRank | None = None,
    gelu: bool = False,
) -> Tensor:
    """``(x * pre_quant_scale) @ W.T`` for at most :data:`MOST_ROWS` rows, on the current stream.

    Args:
        x: ``[rows, K]`` bfloat16, contiguous.
        pre_quant_scale: ``[K]`` bfloat16, or None for ones.
        weight, weight_scale, global_scale: as Marlin holds them (``prepare_fp4_layer_for_marlin``): ``[K / 16, 2 * N]``
            int32, ``[K / 16, N]`` bytes, ``[1]`` float32.
        low_rank: ``(A, B)`` to add ``(x @ A.T) @ B.T``; with None for ``pre_quant_scale``.
        gelu: give ``gelu_tanh(first half) * second half`` of the outputs, if :func:`halves_are_tiles`; without
            ``low_rank``.

    Returns:
        ``[rows, N]`` bfloat16, or ``[rows, N / 2]`` with ``gelu``; up to 64 rows a row has the same bits whatever rows
        stand beside it.
    """
    tiles = tiles_for(x.shape[0], forms())
    return launch(tiles, forms()[tiles], x, pre_quant_scale, weight, weight_scale, global_scale, n, low_rank, gelu)


def launch(
    tiles: int,
    form: Form,
    x: Tensor,
    pre_quant_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    global_scale: Tensor,
    n: int,
    low_rank: LowRank | None = None,
    gelu: bool = False,
) -> Tensor:
    """The kernel of this form for up to ``8 * tiles`` rows; the rest as in :func:`stream_gemm`."""
    rows, k = x.shape
    if pre_quant_scale is not None and (form.wgmma or gelu):
        x, pre_quant_scale = scaled_rows(x, pre_quant_scale), None
    y = torch.empty(rows, n // 2 if gelu else n, dtype=x.dtype, device=x.device)
    partial, arrivals = SCRATCH.on(x.device)
    box, shape = (DEPTH // 16, COLUMNS), (k // 16, n)
    weights = [cuda.weight_map(w.data_ptr(), *shape, item, *box) for w, item in ((weight, 8), (weight_scale, 1))]
    scaled, rank, branch = pre_quant_scale is not None, 0, []
    if low_rank is not None:
        rank = RANK
        parts, met = BRANCH_SCRATCH.on(x.device)
        branch = [x, *low_rank, parts, parts[SLICES * MOST_ROWS * RANK :], met]
    kernel(tiles, scaled, form, rank, gelu)(
        grid=(form.blocks(cuda.multiprocessors(x.device.index), n, k), 1, 1),
        block=form.threads_with(rank),
        args=[
            *weights,
            *([x, pre_quant_scale] if scaled else [cuda.recent_map(x.data_ptr(), rows, k, 2, 8 * tiles, 64)]),
            *branch,
            y,
            global_scale,
            partial,
            arrivals,
            rows,
            n,
            k,
        ],
        shared_bytes=shared_bytes(tiles, form, rank),
    )
    return y


def scaled_rows(x: Tensor, by: Tensor) -> Tensor:
    """``x * by``, on the current stream: wgmma reads x from shared memory, to which tensor copies bring it as it is.

    A kernel of its own that the GEMM need not wait for with its weights. Threads of the GEMM that multiplied on the way
    took 2 us more (``benchmarks/NOTES.md``, changes 92, 94, 106).
    """
    y, pieces = torch.empty_like(x), x.numel() // 8
    args = [x, by, y, pieces, x.shape[1] // 8]
    _scaled_rows()(grid=(-(-pieces // 256), 1, 1), block=256, args=args)
    return y


def scaled_rows_source() -> str:
    return cuda.source("scaled_rows.cu")


@functools.cache
def _scaled_rows() -> Any:
    return cuda.Kernel(scaled_rows_source(), "scaled_rows")


@functools.cache
def forms() -> dict[int, Form]:
    """Forms for this card: the tensor cores of Hopper have instructions of their own, which no later card has."""
    return WGMMA_FORMS if torch.cuda.get_device_capability()[0] == 9 else MMA_FORMS


def _times(layer: Module, gelu: bool = False) -> chosen_rows.Times:
    """Median microseconds of both kernels on this layer's weights, which each time come from memory and not the L2.

    Args:
        gelu: Marlin with the kernel of the activation behind it.
    """
    n, k, device = layer.output_size_per_partition, layer.input_size_per_partition, layer.weight.device
    weights = (layer.weight, layer.weight_scale, layer.weight_global_scale)
    us = chosen_rows.clock(device, calls=7)
    found: chosen_rows.Times = {}
    largest = [8 * tiles for tiles in forms()]
    for count in itertools.chain.from_iterable(zip([1, *(r + 1 for r in largest)], largest, strict=False)):
        x = torch.randn(count, k, device=device, dtype=torch.bfloat16)
        ours, marlins = (
            us(functools.partial(linear, x, None, *weights, layer.workspace, n, streamed, gelu=gelu))
            for streamed in (ALL, 0)
        )
        found[count] = ours, marlins
    return found


def faster(layer: Module, gelu: bool = False) -> int:
    """Which forms take their batches, of a layer that suits and is ready; bit i is the i-th of :func:`forms`.

    With ``VLLM_BATCH_INVARIANT=1`` all, whatever they take: Marlin's order of additions depends on the batch.

    Args:
        gelu: of the forms that give the activation, too.
    """
    import vllm.envs

    if vllm.envs.VLLM_BATCH_INVARIANT:
        return ALL
    n, k = layer.output_size_per_partition, layer.input_size_per_partition
    try:
        return chosen_rows.chosen(n, k, _maker(gelu), lambda: _times(layer, gelu), gelu)
    except RuntimeError as error:  # no memory for it, or the kernel does not run here
        what = "stays without its activation" if gelu else "stays on Marlin"
        logger.info("NVFP4 GEMM %dx%d %s: %s", n, k, what, str(error).partition("\n")[0])
        return 0


@functools.cache
def _maker(gelu: bool = False) -> str:
    return chosen_rows.made_by(*(source(tiles, False, form, gelu=gelu) for tiles, form in forms().items()))


def linear(
    x: Tensor,
    pre_quant_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    global_scale: Tensor,
    workspace: Tensor,
    n: int,
    streamed: int,
    low_rank_a: Tensor | None = None,
    low_rank_b: Tensor | None = None,
    gelu: bool = False,
) -> Tensor:
    """One linear layer: batches of the forms in ``streamed`` here, others on Marlin; see :func:`faster`.

    With ``low_rank_a`` and ``low_rank_b`` plus ``(x @ A.T) @ B.T``, and without ``pre_quant_scale``. With ``gelu``
    ``gelu_tanh(gate) * up`` of what is one half of the outputs each, ``[..., N / 2]``, and without those.
    """
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    rows = flat.shape[0]
    if streamed and rows <= 8 * max(forms()) and streamed >> _form(rows) & 1:
        low_rank = None if low_rank_a is None or low_rank_b is None else (low_rank_a, low_rank_b)
        weights = (weight, weight_scale, global_scale, n, low_rank, gelu)
        parts = [flat] if rows <= SAME_BITS else flat.split(_most_rows())
        y = _joined([stream_gemm(part.contiguous(), pre_quant_scale, *weights) for part in parts])
    else:
        if pre_quant_scale is not None:
            flat = flat * pre_quant_scale
        from vllm.model_executor.layers.quantization.utils.marlin_utils_fp4 import apply_fp4_marlin_linear

        y = apply_fp4_marlin_linear(flat, weight, weight_scale, global_scale, workspace, n, flat.shape[-1])
        if low_rank_a is not None and low_rank_b is not None:
            y = torch.addmm(y, torch.nn.functional.linear(flat, low_rank_a), low_rank_b.t())
        if gelu:
            y = activated(y)
    return y.view(*x.shape[:-1], y.shape[-1])


def activated(y: Tensor) -> Tensor:
    """``gelu_tanh(first half) * second half`` of each row, by vLLM's kernel."""
    half = y.new_empty(y.shape[0], y.shape[1] // 2)
    torch.ops._C.gelu_tanh_and_mul(half, y)
    return half


def _most_rows() -> int:
    """Most rows of one launch, where a batch has more than ``SAME_BITS``."""
    import vllm.envs

    return SAME_BITS if vllm.envs.VLLM_BATCH_INVARIANT else MOST_ROWS


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _linear_shape(
    x: Tensor,
    pre_quant_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    global_scale: Tensor,
    workspace: Tensor,
    n: int,
    streamed: int,
    low_rank_a: Tensor | None = None,
    low_rank_b: Tensor | None = None,
    gelu: bool = False,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], n // 2 if gelu else n)


@functools.cache
def register_operator() -> None:
    """``torch.ops.vllm.gemma4_spec_stream_linear``: opaque to torch.compile, which sees its shape only."""
    from vllm.utils.torch_utils import direct_register_custom_op

    direct_register_custom_op("gemma4_spec_stream_linear", linear, fake_impl=_linear_shape)


def compile_forms(*wanted: tuple[bool, int], gelu: bool = False) -> None:
    """All forms for this card, for each ``(scaled, rank)``."""
    asked = [(t, f, scaled, rank) for t, f in forms().items() for scaled, rank in wanted]
    of = [(t, scaled, f, rank, gelu) for t, f, scaled, rank in asked if not (scaled and f.wgmma)]
    cuda.compile_together((source(*what), what[2].wgmma) for what in of)
    for what in of:
        kernel(*what)


@functools.cache
def available() -> bool:
    """Whether the kernel compiles here; if not, the log says once why, and vLLM's kernels stay."""
    if torch.cuda.get_device_capability()[0] < 9:  # bfloat16 multiplication and programmatic launch
        return False
    try:
        compile_forms((False, 0), (True, 0))
        _scaled_rows()
    except (ImportError, RuntimeError) as error:
        logger.info("NVFP4 GEMMs of small batches stay on Marlin: %s", str(error).splitlines()[0])
        return False
    return True


@functools.cache
def branch_available(rank: int, dtype: torch.dtype) -> bool:
    """Whether the kernel takes low-rank branches of this rank in; if not, the log says once why: they stay GEMMs of
    their own."""
    try:
        if rank != RANK or dtype != torch.bfloat16:
            raise RuntimeError(f"it takes bfloat16 of rank {RANK}")
        if cuda.beside_others():
            raise RuntimeError("its blocks wait for each other, which CUDA MPS does not allow for")
        compile_forms((False, rank))
    except (ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        logger.info("Low-rank branches of rank %d, %s, stay out of the NVFP4 GEMM: %s", rank, dtype, reason)
        return False
    return True


@functools.cache
def gelu_available() -> bool:
    """Whether the forms that give the activation compile; if not, the log says once why, and it stays a kernel."""
    try:
        compile_forms((False, 0), gelu=True)
    except (ImportError, RuntimeError) as error:
        logger.info("Activations stay out of the NVFP4 GEMM: %s", str(error).splitlines()[0])
        return False
    return True


def halves_are_tiles(n: int) -> bool:
    """Whether each output's gate and up projection stand in the same place of a tile each."""
    return n % (2 * COLUMNS) == 0


def reserve_branch(device: torch.device) -> None:
    """As :func:`reserve`, for layers with a branch."""
    BRANCH_SCRATCH.reserve(device, SLICES * MOST_ROWS * RANK + MOST_ROWS * RANK // 2, 2)


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


def reserve(n: int, k: int, device: torch.device, gelu: bool = False) -> None:
    """Make room for the partial sums of this shape; before any CUDA graph of this engine is captured."""
    blocks = min(cuda.multiprocessors(device.index), units(n, k))
    SCRATCH.reserve(device, parts(blocks, n, gelu) * MOST_ROWS * COLUMNS, -(-n // COLUMNS) * 8)
    register_operator()
