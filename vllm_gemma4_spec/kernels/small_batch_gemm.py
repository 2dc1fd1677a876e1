"""Small-batch NVFP4 GEMMs: ``nvfp4_rows.cu`` beside Marlin, as one operator.

Marlin is laid out for larger batches: on an H200 an E4B drafter's six GEMMs of one row take it 77 us a
layer, of which reading the weights is 12. The kernel here takes over for up to :func:`most_rows`; Marlin, with its
own copy of the weights, keeps the rest.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from vllm_gemma4_spec.kernels import cuda, stream_gemm
from vllm_gemma4_spec.kernels.packing import COLUMNS, ROWS, pack
from vllm_gemma4_spec.kernels.scratch import Scratch

logger = logging.getLogger("vllm.plugins.gemma4_spec")

_LANES = 32
MOST_ROWS = 128


@dataclass(frozen=True)
class Form:
    """How the kernel is compiled: what a warp takes at once, which a larger batch is cut up into."""

    tiles: int  # of 8 rows
    pair: int = 1  # tiles of 16 outputs

    @property
    def rows(self) -> int:
        return 8 * self.tiles

    @property
    def most_warps(self) -> int:  # what the kernel's registers allow
        return 8 if self.tiles * self.pair > 4 else 16

    def chunks(self, rows: int) -> int:
        return -(-rows // self.rows)


_FORMS = tuple(map(Form, (1, 2, 3, 4, 8)))


@dataclass(frozen=True)
class Launch:
    """How one GEMM is cut up: warps of a block, warps sharing a tile of outputs, blocks sharing one."""

    warps: int
    split: int
    parts: int


def most_rows(n: int, k: int) -> int:
    """Rows up to which the kernel is faster than Marlin (H200, E4B's shapes: ``benchmarks/NOTES.md``)."""
    if n <= 512:
        return 64  # Marlin takes 23 us for [256, 2560], whatever the rows
    return 16 if n * k >= 2**25 else 32


def plan(n: int, k: int, form: Form, chunks: int, gelu: bool, multiprocessors: int) -> Launch:
    """A launch for ``[rows, k] @ [k, n]``: up to 24 warps per multiprocessor, none without work.

    Args:
        chunks: that the rows are cut up into.
        gelu: two tiles of outputs belong together.
    """
    blocks, group, most = k // COLUMNS, 2 if gelu and form.pair == 1 else 1, form.most_warps
    outputs = n // ROWS // form.pair
    if blocks >= 32 and outputs * chunks < 2 * multiprocessors:
        split = 5 if blocks % 5 == 0 and 5 * group <= most else 4
        return Launch(split * group, split, 4)
    fitting = [s for s in (10, 8, 5, 4, 2) if blocks % s == 0 and s * group <= most]
    split = next((s for s in fitting if outputs * chunks * s <= 24 * multiprocessors), 1)
    slots = group
    while split * slots * 2 <= 4 and outputs % (slots * 2) == 0:
        slots *= 2
    return Launch(split * slots, split, 1)


def source(form: Form, gelu: bool, scaled: bool) -> str:
    """The kernel's CUDA C++."""
    text = resources.files(__package__).joinpath("nvfp4_rows.cu").read_text()
    macros = {"MT": form.tiles, "NT": form.pair, "GELU": int(gelu), "SCALED": int(scaled)}
    return "".join(f"#define {name} {value}\n" for name, value in macros.items()) + text


@functools.cache
def _kernel(form: Form, gelu: bool, scaled: bool) -> Any:
    return cuda.Kernel(source(form, gelu, scaled), "nvfp4_rows")


@functools.cache
def _launch(n: int, k: int, form: Form, chunks: int, gelu: bool, device: int) -> Launch:
    return plan(n, k, form, chunks, gelu, torch.cuda.get_device_properties(device).multi_processor_count)


SCRATCH = Scratch()


def form_for(rows: int) -> Form:
    return next(f for f in _FORMS if rows <= f.rows)


def gemm(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    global_scale: Tensor,
    gelu: bool = False,
    pre_quant_scale: Tensor | None = None,
    form: Form | None = None,
    how: Launch | None = None,
) -> Tensor:
    """``(x * pre_quant_scale) @ W.T`` for at most :data:`MOST_ROWS` rows, on the current stream.

    Args:
        x: ``[rows, K]`` bfloat16, contiguous.
        codes, scales: of :func:`~vllm_gemma4_spec.kernels.packing.pack`.
        global_scale: ``[1]`` float32, ModelOpt's ``weight_scale_2``.
        gelu: give ``gelu_tanh(first half) * second half`` of the outputs.
        pre_quant_scale: ``[K]`` bfloat16, or None for ones.

    Returns:
        ``[rows, N]`` bfloat16, or ``[rows, N / 2]`` with ``gelu``.
    """
    rows, k = x.shape
    n, form = codes.shape[0] * ROWS, form or form_for(rows)
    chunks = form.chunks(rows)
    y = torch.empty(rows, n // 2 if gelu else n, dtype=x.dtype, device=x.device)
    how = how or _launch(n, k, form, chunks, gelu, x.device.index)
    partial, arrivals = SCRATCH.on(x.device)
    pre = x if pre_quant_scale is None else pre_quant_scale  # not read where there is none
    _kernel(form, gelu, pre_quant_scale is not None)(
        grid=(chunks, n // ROWS // form.pair // (how.warps // how.split), how.parts),
        block=how.warps * _LANES,
        args=[
            codes,
            scales,
            x,
            pre,
            y,
            global_scale,
            partial,
            arrivals,
            rows,
            n,
            k,
            how.split,
        ],
        shared_bytes=how.warps * form.pair * form.tiles * 4 * _LANES * 4,
    )
    return y


def linear(
    x: Tensor,
    pre_quant_scale: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    global_scale: Tensor,
    marlin_weight: Tensor,
    marlin_scale: Tensor,
    marlin_global_scale: Tensor,
    workspace: Tensor,
    streamed: int,
    n: int,
    gelu: bool,
) -> Tensor:
    """One linear layer, by the kernel that suits the number of rows; see :func:`gemm`.

    Args:
        streamed: of batches too large for :func:`gemm`, those that stream; see ``stream_gemm.faster``.
    """
    flat = x.reshape(-1, x.shape[-1])
    if flat.shape[0] <= most_rows(n, flat.shape[-1]):
        y = gemm(flat.contiguous(), codes, scales, global_scale, gelu, pre_quant_scale)
    else:
        weights = (marlin_weight, marlin_scale, marlin_global_scale, workspace)
        y = stream_gemm.linear(flat, pre_quant_scale, *weights, n, streamed)
        if gelu:
            gate_up, y = y, y.new_empty(y.shape[0], n // 2)
            torch.ops._C.gelu_tanh_and_mul(y, gate_up)
    return y.view(*x.shape[:-1], y.shape[-1])


def _output_shape(x: Tensor, *parameters: Any) -> Tensor:
    n, gelu = parameters[-2:]
    return x.new_empty(*x.shape[:-1], n // 2 if gelu else n)


@functools.cache
def register_operator() -> None:
    """``torch.ops.vllm.gemma4_spec_nvfp4_gemm``: opaque to torch.compile, which sees its shape only."""
    from vllm.utils.torch_utils import direct_register_custom_op

    direct_register_custom_op("gemma4_spec_nvfp4_gemm", linear, fake_impl=_output_shape)


@functools.cache
def available() -> bool:
    """Whether the kernel compiles here; if not, the log says once why, and vLLM's kernels stay."""
    try:
        _kernel(_FORMS[0], False, False)
    except (ImportError, RuntimeError) as error:
        logger.warning("Small-batch NVFP4 GEMMs stay on Marlin: %s", str(error).splitlines()[0])
        return False
    return True


def suits(layer: Module) -> bool:
    """Whether the kernel can take this layer: shape, dtype and device."""
    n, k = layer.output_size_per_partition, layer.input_size_per_partition
    return bool(
        layer.weight.is_cuda
        and layer.params_dtype == torch.bfloat16
        and n % (2 * ROWS) == 0
        and k % COLUMNS == 0
        and getattr(layer, "bias", None) is None
        and available()
    )


def reserve(n: int, k: int, device: torch.device, scaled: bool = False) -> None:
    """Compile what GEMMs of this shape need, and make room for their partial sums.

    No module can be loaded, and no scratch replaced, once a CUDA graph is being captured.
    """
    floats = 1
    for form in [f for f in _FORMS if f.rows - 8 < most_rows(n, k)]:
        for gelu in (False,) if scaled else (False, True):
            _kernel(form, gelu, scaled)
            how = _launch(n, k, form, 1, gelu, device.index)
            if how.parts > 1:
                floats = max(floats, how.parts * n * form.rows)
    SCRATCH.reserve(device, floats, n // ROWS)


def prepare(layer: Module, scaled: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and global scale of a layer that has just been loaded.

    To be called before Marlin reorders ``layer.weight`` in place.

    Args:
        scaled: the GEMM is to multiply its input by ``pre_quant_scale``.
    """
    codes, scales = pack(layer.weight.data, layer.weight_scale.data)
    reserve(layer.output_size_per_partition, layer.input_size_per_partition, codes.device, scaled)
    register_operator()
    torch.cuda.synchronize(codes.device)  # a GEMM may start before the kernel ahead of it, that packs, has ended
    return codes, scales, layer.weight_scale_2.data.max().float().reshape(1)
