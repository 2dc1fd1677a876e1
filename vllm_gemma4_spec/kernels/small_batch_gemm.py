"""Small-batch NVFP4 GEMMs: ``nvfp4_rows.cu`` beside Marlin, as one operator.

Marlin is laid out for larger batches: on an H200 an E4B drafter's six GEMMs of one row take it 77 us a
layer, of which reading the weights is 12. The kernel here takes over where it is faster (:func:`choose`), for up to
:data:`MOST_ROWS` rows; Marlin, with its own copy of the weights, or the kernel that streams Marlin's keeps the rest.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from vllm_gemma4_spec.kernels import chosen_rows, cuda, stream_gemm
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
    roll: bool = False  # the next weights come into registers whose weights have been used
    fit: int = 0  # blocks of four warps that a multiprocessor's registers are to hold; 0: no matter
    whole: bool = False  # x of 64 inputs at once
    registers: int = 0  # of a thread: what the compiler plans with, mostly to the full; 0: as it likes

    @property
    def rows(self) -> int:
        return 8 * self.tiles

    @property
    def most_warps(self) -> int:  # what the kernel's registers allow
        return 4 if self.fit else 8 if self.tiles * self.pair > 4 else 16

    def chunks(self, rows: int) -> int:
        return -(-rows // self.rows)

    def __str__(self) -> str:
        return f"{self.rows}x{16 * self.pair}" + "w" * self.whole + f"r{self.registers}" * (self.registers > 0)


_WIDE, _40, _32 = Form(1, 2, roll=True), Form(5, 2, roll=True, fit=3), Form(4, 2, roll=True, fit=3)
_LARGE = 2**25  # weights of a GEMM
# What is tried for batches of up to so many rows (and more than the number before) where few_rows() does not say: what
# was fastest for some GEMM of E4B alone on an H200 (benchmarks/NOTES.md). Where nothing can be measured the first is
# taken, up to most_rows().
CANDIDATES: dict[int, tuple[Form, ...]] = {
    8: (Form(1, whole=True), _WIDE),
    16: (Form(2), Form(2, 2), _WIDE, Form(1)),
    24: (Form(3), Form(3, 2), _WIDE, Form(1), _32),
    32: (Form(2, 2), _32, _WIDE, Form(2)),
    40: (Form(2, 2), _40, _WIDE, Form(3, 2), Form(5)),
    48: (Form(2, 2), Form(3, 2), _WIDE),
    64: (Form(2, 2), _32, _WIDE),
    80: (Form(2, 2), _40, _WIDE, Form(5)),
    96: (Form(2, 2), _32, Form(3, 2)),
    112: (Form(2, 2), _32),
    128: (Form(2, 2), _32),
}


def few_rows(n: int, k: int, gelu: bool, rows: int) -> Form:
    """The form for up to 16 rows on Hopper: what E4B drafted fastest with on two H200s, and what a chain of its whole
    layers is fastest with where those have no such GEMM (``benchmarks/NOTES.md``, change 136).

    A GEMM alone does not tell: by the registers that a thread may have the compiler orders its loads, and the next
    kernel's blocks, whose weights are then on their way, find room beside it or not.
    """
    if rows <= 8:
        return Form(1, whole=True, registers=88 if gelu else 72)
    if gelu:
        return Form(2, registers=96) if n * k >= _LARGE else Form(2, 2)
    return Form(2, registers=88 if n >= k else 72)


@functools.cache
def _hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def candidates(n: int, k: int, gelu: bool, scaled: bool, rows: int) -> tuple[Form, ...]:
    """Forms that are tried for a batch; where nothing can be measured the first is taken.

    Args:
        scaled: by ``pre_quant_scale``, for which the registers of :func:`few_rows` do not suffice.
    """
    if rows <= 16 and _hopper() and not scaled:
        return (few_rows(n, k, gelu, rows),)
    return next(forms for most, forms in CANDIDATES.items() if rows <= most)


def _tried(n: int, k: int, gelu: bool, scaled: bool) -> dict[int, tuple[Form, ...]]:
    """:func:`candidates` of every number of rows in :data:`CANDIDATES`."""
    return {rows: candidates(n, k, gelu, scaled, rows) for rows in CANDIDATES}


def all_forms() -> list[tuple[Form, bool]]:
    """Of every shape and card, and whether with ``gelu``."""
    shapes = [(n, k, gelu) for n, k in ((20480, 2560), (10240, 2560), (2560, 10240)) for gelu in (False, True)]
    found = {(few_rows(*shape, rows), shape[2]) for shape in shapes for rows in (8, 16)}
    found |= {(form, gelu) for forms in CANDIDATES.values() for form in forms for gelu in (False, True)}
    return sorted(found, key=str)


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
    return 16 if n * k >= _LARGE else 32


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
    # 128 registers: 16 warps of a multiprocessor at once, in blocks of four, whose warps may have unequal shares.
    wide = form.tiles * form.pair == 4 and not form.fit
    fitting = [s for s in (10, 8, 5, 4, 2) if (blocks % s == 0 or (wide and s == 4 < blocks)) and s * group <= most]
    split = next((s for s in fitting if outputs * chunks * s <= (16 if wide else 24) * multiprocessors), 1)
    slots = group
    while split * slots * 2 <= 4 and outputs % (slots * 2) == 0:
        slots *= 2
    return Launch(split * slots, split, 1)


def macros(form: Form, gelu: int, scaled: bool) -> dict[str, int]:
    """What the kernel is compiled with.

    Args:
        gelu: 1: ``gelu(first half) * second half`` of the outputs; 2: ``gelu(outputs) * by``.
    """
    return {
        "MT": form.tiles,
        "NT": form.pair,
        "ROLL": int(form.roll),
        "FIT": form.fit,
        "REGISTERS": form.registers,
        "GELU": int(gelu),
        "SCALED": int(scaled),
        "WHOLE": int(form.whole),
    }


def source(form: Form, gelu: int, scaled: bool) -> str:
    """The kernel's CUDA C++."""
    return cuda.source("nvfp4_rows.cu", macros(form, gelu, scaled), cuda.source("rows_device.cu"))


@functools.cache
def _kernel(form: Form, gelu: int, scaled: bool) -> Any:
    return cuda.Kernel(source(form, gelu, scaled), "nvfp4_rows")


@functools.cache
def _launch(n: int, k: int, form: Form, chunks: int, gelu: bool, device: int) -> Launch:
    return plan(n, k, form, chunks, gelu, cuda.multiprocessors(device))


SCRATCH = Scratch()


def form_for(n: int, k: int, gelu: bool, scaled: bool, rows: int) -> Form | None:
    """The form that takes a batch, as :func:`choose` found; None: it is left to the other kernels."""
    known = _chosen.get((n, k, gelu, scaled))
    if known is None:
        return candidates(n, k, gelu, scaled, rows)[0] if rows <= most_rows(n, k) else None
    return next((form for most, form in known.items() if rows <= most), None)


def gemm(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    global_scale: Tensor,
    gelu: bool = False,
    pre_quant_scale: Tensor | None = None,
    form: Form | None = None,
    how: Launch | None = None,
    by: Tensor | None = None,
) -> Tensor:
    """``(x * pre_quant_scale) @ W.T`` for at most :data:`MOST_ROWS` rows, on the current stream.

    Args:
        x: ``[rows, K]`` bfloat16, contiguous.
        codes, scales: of :func:`~vllm_gemma4_spec.kernels.packing.pack`.
        global_scale: ``[1]`` float32, ModelOpt's ``weight_scale_2``.
        gelu: give ``gelu_tanh(first half) * second half`` of the outputs.
        pre_quant_scale: ``[K]`` bfloat16, or None for ones.
        form, how: None for what suits such a batch.
        by: ``[rows, N]`` bfloat16, whose rows may be apart: give ``gelu_tanh(outputs) * by``.

    Returns:
        ``[rows, N]`` bfloat16, or ``[rows, N / 2]`` with ``gelu``.
    """
    rows, k = x.shape
    n = codes.shape[0] * ROWS
    form = form or candidates(n, k, gelu, pre_quant_scale is not None, rows)[0]
    chunks = form.chunks(rows)
    y = torch.empty(rows, n // 2 if gelu else n, dtype=x.dtype, device=x.device)
    how = how or _launch(n, k, form, chunks, gelu, x.device.index)
    partial, arrivals = SCRATCH.on(x.device)
    pre, factor = (x if given is None else given for given in (pre_quant_scale, by))  # not read where there is none
    blocks = n // ROWS // form.pair // (how.warps // how.split)
    _kernel(form, int(gelu) if by is None else 2, pre_quant_scale is not None)(
        grid=(chunks * blocks, how.parts, 1),
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
            chunks,
            factor,
            factor.stride(0),
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
    stream_gelu: bool = False,
) -> Tensor:
    """One linear layer, by the kernel that suits the number of rows; see :func:`gemm`.

    Args:
        streamed: of batches that :func:`gemm` does not take, those that stream; see ``stream_gemm.faster``.
        stream_gelu: those, too, give the activation by themselves.
    """
    flat = x.reshape(-1, x.shape[-1])
    form = form_for(n, flat.shape[-1], gelu, pre_quant_scale is not None, flat.shape[0])
    if form is not None:
        y = gemm(flat.contiguous(), codes, scales, global_scale, gelu, pre_quant_scale, form)
    else:
        weights = (marlin_weight, marlin_scale, marlin_global_scale, workspace)
        y = _other(flat, pre_quant_scale, weights, n, streamed, gelu, stream_gelu)
    return y.view(*x.shape[:-1], y.shape[-1])


def _other(
    x: Tensor,
    pre_quant_scale: Tensor | None,
    weights: tuple[Tensor, Tensor, Tensor, Tensor],
    n: int,
    streamed: int,
    gelu: bool,
    stream_gelu: bool,
) -> Tensor:
    y = stream_gemm.linear(x, pre_quant_scale, *weights, n, streamed, gelu=stream_gelu)
    return stream_gemm.activated(y) if gelu and not stream_gelu else y


def _output_shape(x: Tensor, *parameters: Any) -> Tensor:
    n, gelu = parameters[9:11]
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
        _kernel(candidates(ROWS, COLUMNS, False, False, 1)[0], False, False)
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


_chosen: dict[tuple[int, int, bool, bool], dict[int, Form | None]] = {}  # N, K, gelu, scaled -> as CANDIDATES


def choose(layer: Module, gelu: bool = False) -> None:
    """Find out which batches of a layer the kernel takes, in which form, and :func:`reserve` what they need.

    Marlin must have reordered ``layer.weight``.

    Args:
        gelu: the kernel is to give ``gelu(gate) * up``.
    """
    n, k, device = layer.output_size_per_partition, layer.input_size_per_partition, layer.weight.device
    scaled = bool(layer.rows_scaled)
    shape = f"{n}x{k}, few rows" + ", gelu" * gelu + ", scaled" * scaled
    try:
        maker = _maker(n, k, gelu, scaled, layer.streamed, layer.stream_gelu)
        found = chosen_rows.fastest(shape, maker, lambda: _times(layer, gelu))
    except RuntimeError as error:  # no memory for it, or a form does not compile here
        logger.info("NVFP4 GEMM %s was not measured: %s", shape, str(error).partition("\n")[0])
    else:
        named = {str(form): form for forms in _tried(n, k, gelu, scaled).values() for form in forms}
        _chosen[n, k, gelu, scaled] = {rows: named.get(found[rows]) for rows in sorted(found)}
    try:
        reserve(n, k, device, gelu, scaled)
    except RuntimeError as error:
        logger.info("NVFP4 GEMM %s stays on Marlin: %s", shape, str(error).partition("\n")[0])
        _chosen[n, k, gelu, scaled] = {}


def reserve(n: int, k: int, device: torch.device, gelu: bool = False, scaled: bool = False) -> None:
    """Compile the forms that GEMMs of this shape take, and make room for their partial sums.

    No module can be loaded, and no scratch replaced, once a CUDA graph is being captured.
    """
    used = {rows: form for rows in CANDIDATES if (form := form_for(n, k, gelu, scaled, rows)) is not None}
    _compile((form, gelu, scaled) for form in used.values())
    _make_room(n, k, used, gelu, device)


def _times(layer: Module, gelu: bool) -> chosen_rows.Kernels:
    """Of every candidate, and of what runs without; each time the weights come from memory and not the L2."""
    n, k, device = layer.output_size_per_partition, layer.input_size_per_partition, layer.weight.device
    tried = _tried(n, k, gelu, bool(layer.rows_scaled))
    _compile((form, gelu, False) for forms in tried.values() for form in forms)
    marlin = (layer.weight, layer.weight_scale, layer.weight_global_scale, layer.workspace)
    rows_of = (layer.rows_codes, layer.rows_scales, layer.rows_global_scale)
    us = chosen_rows.clock(device)
    found: chosen_rows.Kernels = {}
    for rows, forms in tried.items():
        x = torch.randn(rows, k, device=device, dtype=torch.bfloat16)
        other = functools.partial(_other, x, None, marlin, n, layer.streamed, gelu, layer.stream_gelu)
        here = found[rows] = {chosen_rows.OTHER: us(other)}
        # Of forms that are as fast alone the one with fewer chunks: others read the weights once more each.
        for form in sorted(forms, key=lambda form: form.chunks(rows)):
            _make_room(n, k, {rows: form}, gelu, device)
            here[str(form)] = us(functools.partial(gemm, x, *rows_of, gelu, None, form))
    return found


@functools.cache
def _maker(n: int, k: int, gelu: bool, scaled: bool, streamed: int, stream_gelu: bool = False) -> str:
    """Times depend on the forms that are tried, and on what takes the other batches: streaming or Marlin."""
    tried = repr(_tried(n, k, gelu, scaled))
    return chosen_rows.made_by(source(Form(1), False, False), tried, stream_gemm._maker(stream_gelu), str(streamed))


_ready: set[tuple[Form, bool, bool]] = set()


def _compile(wanted: Iterable[tuple[Form, bool, bool]]) -> None:
    missing = set(wanted) - _ready
    if not missing:
        return
    cuda.compile_together((source(*what), False) for what in missing)
    for what in missing:
        _kernel(*what)
    _ready.update(missing)


def _make_room(n: int, k: int, used: Mapping[int, Form], gelu: bool, device: torch.device) -> None:
    floats = counters = 1
    for rows, form in used.items():
        for chunks in range(1, form.chunks(rows) + 1):  # fewer may be cut into parts where more are not
            how = _launch(n, k, form, chunks, gelu, device.index)
            if how.parts > 1:
                floats = max(floats, chunks * how.parts * n * form.rows)
                counters = max(counters, chunks * n // ROWS)
    SCRATCH.reserve(device, floats, counters)


def prepare(layer: Module) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and global scale of a layer that has just been loaded.

    To be called before Marlin reorders ``layer.weight`` in place; :func:`choose` after it.
    """
    codes, scales = pack(layer.weight.data, layer.weight_scale.data)
    global_scale = layer.weight_scale_2.data.max().float().reshape(1)
    register_operator()
    torch.cuda.synchronize(codes.device)  # a GEMM reads them while the kernel ahead of it, which may write them, runs
    return codes, scales, global_scale
