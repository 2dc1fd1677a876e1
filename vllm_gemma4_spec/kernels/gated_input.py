"""A layer's per-layer input of a few rows: gate, activation, product and projection as one operator.

Three kernels otherwise, each of which waits for the one before: 5 to 9 us a layer of E4B on an H200, for weights that
are read in 0.4. As one kernel, ``nvfp4_gated.cu``, or the activation in the gate's GEMM, as measured when the first
layer is loaded. :func:`fuse` puts the operator into the graph of a draft model before it is compiled.
"""

from __future__ import annotations

import functools
import logging
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.nn import Module

from vllm_gemma4_spec.kernels import chosen_rows, cuda, small_batch_gemm
from vllm_gemma4_spec.kernels.packing import COLUMNS
from vllm_gemma4_spec.kernels.small_batch_gemm import Form

logger = logging.getLogger("vllm.plugins.gemma4_spec")

OPERATOR = "gemma4_spec_per_layer_input"
WIDE = 256  # values of a token that are gated
MOST_K = 12 * COLUMNS  # two warps for each 256 inputs
ONE, TWO = "one kernel", "two kernels"
_BLOCKS = 8  # of a cluster
_IN_A_ROW = 8
_FORM = Form(1)  # what a cluster, or a warp of the gate's GEMM, takes at once


def suits(k: Any, wide: Any) -> bool:
    """Whether the kernel takes a hidden state of ``k`` values, ``wide`` of which are gated."""
    return wide == WIDE and k % COLUMNS == 0 and k <= MOST_K


def source(form: Form) -> str:
    """The kernel's CUDA C++."""
    return cuda.source("nvfp4_gated.cu", before="#define GATED\n" + small_batch_gemm.source(form, False, False))


@functools.cache
def _kernel(form: Form) -> Any:
    return cuda.Kernel(source(form), "nvfp4_gated")


@functools.cache
def available() -> bool:
    """Whether the kernel runs here; if not, the log says once why, and three kernels stay."""
    if torch.cuda.get_device_capability() < (9, 0):  # no clusters
        return False
    try:
        _kernel(_FORM)
        small_batch_gemm._kernel(_FORM, 2, False)
    except (ImportError, RuntimeError) as error:
        logger.info("Per-layer inputs stay three kernels: %s", str(error).partition("\n")[0])
        return False
    return True


def shared_bytes(k: int, form: Form) -> int:
    """Sums of a block's warps, and the gated values of its rows."""
    return k // COLUMNS * form.tiles * 1024 + form.rows * 2 * (WIDE + 8)


def gated(
    x: Tensor,
    by: Tensor,
    gate: tuple[Tensor, Tensor, Tensor],
    projection: tuple[Tensor, Tensor, Tensor],
    form: Form | None = None,
) -> Tensor:
    """``(gelu_tanh(x @ gate.T) * by) @ projection.T`` for a few rows, on the current stream.

    Args:
        x: ``[rows, K]`` bfloat16, contiguous.
        by: ``[rows, 256]`` bfloat16; rows may be apart.
        gate, projection: codes, scales and global scale as :func:`small_batch_gemm.gemm` takes them.
        form: None for what suits.
    """
    rows, k = x.shape
    form = form or _FORM
    y = torch.empty_like(x)
    _kernel(form)(
        grid=(form.chunks(rows), 1, _BLOCKS),
        block=k // COLUMNS * 64 // form.pair,
        args=[*gate, *projection, x, by, y, rows, k, by.stride(0)],
        shared_bytes=shared_bytes(k, form),
        cluster=_BLOCKS,
    )
    return y


def per_layer_input(
    x: Tensor,
    by: Tensor,
    gate_codes: Tensor,
    gate_scales: Tensor,
    gate_global_scale: Tensor,
    gate_marlin_weight: Tensor,
    gate_marlin_scale: Tensor,
    gate_marlin_global_scale: Tensor,
    gate_workspace: Tensor,
    gate_streamed: int,
    gate_n: int,
    codes: Tensor,
    scales: Tensor,
    global_scale: Tensor,
    marlin_weight: Tensor,
    marlin_scale: Tensor,
    marlin_global_scale: Tensor,
    workspace: Tensor,
    streamed: int,
    n: int,
) -> Tensor:
    """``(gelu_tanh(x @ gate.T) * by) @ projection.T`` by what suits the number of rows.

    Args:
        x, by: of :func:`gated`.
        gate_codes, ...: of both layers, what :func:`small_batch_gemm.linear` takes.
    """
    kernel = kernel_for(n, len(x)) if by.stride(1) == 1 and available() else chosen_rows.OTHER
    first, last = (gate_codes, gate_scales, gate_global_scale), (codes, scales, global_scale)
    if kernel == ONE:
        return gated(x.contiguous(), by, first, last)
    if kernel == TWO:
        values = small_batch_gemm.gemm(x.contiguous(), *first, form=_FORM, by=by)
    else:
        marlin = (gate_marlin_weight, gate_marlin_scale, gate_marlin_global_scale, gate_workspace)
        gate = small_batch_gemm.linear(x, None, *first, *marlin, gate_streamed, gate_n, False)
        values = F.gelu(gate, approximate="tanh") * by
    marlin = (marlin_weight, marlin_scale, marlin_global_scale, workspace)
    return small_batch_gemm.linear(values, None, *last, *marlin, streamed, n, False)


_chosen: dict[int, dict[int, str]] = {}  # K -> kernel by the largest number of rows that it is for


def kernel_for(k: int, rows: int) -> str:
    """What takes a batch, as :func:`choose` found: one kernel, two, or those of larger batches."""
    return next((kernel for most, kernel in _chosen.get(k, {}).items() if rows <= most), chosen_rows.OTHER)


def choose(gate: Module, projection: Module) -> None:
    """Find out which batches of layers of this size take one kernel, and which two; before any CUDA graph."""
    k = projection.output_size_per_partition
    if k in _chosen or not suits(k, gate.output_size_per_partition):
        return
    shape = f"{k}x{WIDE}, per-layer input"
    try:
        _chosen[k] = {}
        maker = _maker(k, gate.streamed, projection.streamed)
        found = chosen_rows.fastest(shape, maker, lambda: _times(k, _weights(gate), _weights(projection)))
    except RuntimeError as error:  # no memory for it, or the card has no room for a cluster
        logger.info("NVFP4 GEMM %s was not measured: %s", shape, str(error).partition("\n")[0])
        found = {}
    _chosen[k] = {rows: found[rows] for rows in sorted(found)}


def _weights(layer: Module) -> tuple[Any, ...]:
    """Of a layer, what :func:`per_layer_input` takes."""
    return (
        layer.rows_codes,
        layer.rows_scales,
        layer.rows_global_scale,
        layer.weight,
        layer.weight_scale,
        layer.weight_global_scale,
        layer.workspace,
        layer.streamed,
        layer.output_size_per_partition,
    )


def _times(k: int, gate: tuple[Any, ...], projection: tuple[Any, ...]) -> chosen_rows.Kernels:
    """Of one of several in a row, as what counts is when the next kernel can go on."""
    device, known = gate[0].device, _chosen[k]
    us = chosen_rows.clock(device)

    def several(x: Tensor, by: Tensor) -> None:
        for _ in range(_IN_A_ROW):
            x = per_layer_input(x, by, *gate, *projection)

    found: chosen_rows.Kernels = {}
    for rows in small_batch_gemm.CANDIDATES:
        x = torch.randn(rows, k, device=device, dtype=torch.bfloat16)
        by = torch.randn(rows, WIDE, device=device, dtype=torch.bfloat16)
        here = found[rows] = {}
        for kernel in (chosen_rows.OTHER, TWO, ONE):
            known[small_batch_gemm.MOST_ROWS] = kernel
            here[kernel] = us(functools.partial(several, x, by)) / _IN_A_ROW
    return found


@functools.cache
def _maker(k: int, gate_streamed: int, streamed: int) -> str:
    gate = small_batch_gemm._maker(WIDE, k, False, False, gate_streamed)
    return chosen_rows.made_by(source(_FORM), gate, small_batch_gemm._maker(k, WIDE, False, False, streamed))


def _output_shape(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


@functools.cache
def register_operator() -> None:
    """``torch.ops.vllm.gemma4_spec_per_layer_input``: opaque to torch.compile, which sees its shape only."""
    from vllm.utils.torch_utils import direct_register_custom_op

    direct_register_custom_op(OPERATOR, per_layer_input, fake_impl=_output_shape)


_X, _PRE_QUANT_SCALE, _WEIGHTS, _N, _GELU = 0, 1, slice(2, 11), 10, 11  # of small_batch_gemm.linear's arguments


def _is_gemm(node: Any) -> bool:
    """Whether a node is a linear layer of the small-batch kernel, with neither scale nor activation."""
    gemm = torch.ops.vllm.gemma4_spec_nvfp4_gemm
    return bool(
        isinstance(node, fx.Node)
        and node.target in (gemm, gemm.default)
        and len(node.args) > _GELU
        and node.args[_PRE_QUANT_SCALE] is None
        and node.args[_GELU] is False
    )


def _is_gelu(node: Any) -> bool:
    return bool(
        isinstance(node, fx.Node)
        and node.target in (F.gelu, torch._C._nn.gelu)
        and node.kwargs == {"approximate": "tanh"}
        and len(node.args) == 1
    )


def _gated_by(product: Any) -> tuple[fx.Node, fx.Node, Any] | None:
    """Of ``gelu(gate(x)) * by``: the gate's node, the activation's and ``by``, if nothing else reads them."""
    if product.target not in (operator.mul, torch.mul) or len(product.args) != 2:
        return None
    for gelu, by in (product.args, product.args[::-1]):
        if _is_gelu(gelu) and _is_gemm(gelu.args[_X]):
            gate = gelu.args[_X]
            if all(len(node.users) == 1 for node in (gate, gelu, product)):
                return gate, gelu, by
    return None


def fuse(graph: fx.Graph) -> int:
    """Put the operator in place of ``projection(gelu(gate(x)) * by)``, as Dynamo traced it; how many times it did."""
    found = 0
    for projection in list(graph.nodes):
        parts = _gated_by(projection.args[_X]) if _is_gemm(projection) else None
        if parts is None or not suits(projection.args[_N], parts[0].args[_N]):
            continue
        gate, gelu, by = parts
        with graph.inserting_before(projection):
            fused = graph.call_function(
                getattr(torch.ops.vllm, OPERATOR),
                (gate.args[_X], by, *gate.args[_WEIGHTS], *projection.args[_WEIGHTS]),
            )
        fused.meta = dict(projection.meta)
        projection.replace_all_uses_with(fused)
        for node in (projection, projection.args[_X], gelu, gate):
            graph.erase_node(node)
        found += 1
    return found
