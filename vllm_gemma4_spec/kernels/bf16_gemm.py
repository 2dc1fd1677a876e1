"""GEMMs of a few rows with bfloat16 weights: ``bf16_rows.cu`` beside cuBLAS, as one operator.

Google's assistants come in bfloat16. cuBLAS waits for the kernel ahead before it asks for a weight, and adds up parts
in a second kernel: 6 to 14 us for each GEMM of 31B's assistant on an H200. The kernel here reads the weight where
PyTorch has it, and has asked for it when the kernel ahead ends. Which of the two takes a batch is measured once
(:func:`choose`).
"""

from __future__ import annotations

import functools
import itertools
import logging
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_gemma4_spec.kernels import chosen_rows, cuda, stream_gemm

logger = logging.getLogger("vllm.plugins.gemma4_spec")

OPERATOR = "gemma4_spec_bf16_linear"
OURS = "bf16_rows"
ROWS, COLUMNS = 16, 256  # outputs of a tile; what K is a multiple of
# Tiles of 8 outputs would give few of them to all multiprocessors: 5.8 us alone for 8.3, but slower in a chain, where
# the next GEMM's weights come to those that idle, except at one row of a whole assistant (benchmarks/NOTES.md, 138).
WIDE = 4096  # outputs from which a warp takes two tiles: x is read half as often, and still every block has work


@dataclass(frozen=True)
class Form:
    """How the kernel is compiled; see ``bf16_rows.cu``."""

    tiles: int  # of 8 rows
    pair: int = 1  # tiles of 16 outputs of a warp
    ahead: int = 4  # chunks of x that are loaded at once
    warps: int = 16  # of a block, which has a multiprocessor to itself

    @property
    def chunks(self) -> int:
        """Of 32 inputs, whose weights are in 64 of a thread's 128 registers."""
        return 8 // self.pair


# By number of rows, for N below WIDE, for others, and with gelu.
FORMS = {
    8: (Form(1, ahead=8), Form(1, 2), Form(1, 2)),
    16: (Form(2), Form(2, 2), Form(2, 2, ahead=2)),
}
MOST_ROWS = max(FORMS)


def form_for(n: int, rows: int, gelu: bool) -> Form:
    forms = next(forms for most, forms in FORMS.items() if rows <= most)
    return forms[2 if gelu else int(n >= WIDE)]


@functools.cache
def split_for(n: int, k: int, form: Form, multiprocessors: int) -> int:
    """Warps of a block that share a warp's outputs: as many as have work, as long as all blocks run at once."""
    outputs, most, split = n // ROWS // form.pair, form.warps * multiprocessors, 1
    while split < form.warps and split * 2 * 32 * form.chunks <= k and outputs * split * 2 <= most:
        split *= 2
    return split


def macros(form: Form, gelu: bool) -> dict[str, int]:
    return {
        "MT": form.tiles,
        "NT": form.pair,
        "GELU": int(gelu),
        "CHUNKS": form.chunks,
        "AHEAD": form.ahead,
        "WARPS": form.warps,
    }


def source(form: Form, gelu: bool) -> str:
    """The kernel's CUDA C++."""
    return cuda.source("bf16_rows.cu", macros(form, gelu), cuda.source("rows_device.cu"))


def shared_bytes(form: Form) -> int:
    """Each thread's sums."""
    return form.warps * form.pair * form.tiles * 512


@functools.cache
def _kernel(form: Form, gelu: bool) -> Any:
    made = cuda.Kernel(source(form, gelu), "bf16_rows")
    made.allow_shared(shared_bytes(form))
    return made


def gemm(x: Tensor, weight: Tensor, gelu: bool = False, form: Form | None = None, split: int | None = None) -> Tensor:
    """``x @ weight.T`` for at most :data:`MOST_ROWS` rows, on the current stream.

    Args:
        x: ``[rows, K]`` bfloat16, contiguous.
        weight: ``[N, K]`` bfloat16, contiguous; K a multiple of 256, N of 32.
        gelu: give ``gelu_tanh(first half) * second half`` of the outputs.
        form, split: None for what suits.

    Returns:
        ``[rows, N]`` bfloat16, or ``[rows, N / 2]`` with ``gelu``.
    """
    (rows, k), n = x.shape, weight.shape[0]
    form = form or form_for(n, rows, gelu)
    split = split or split_for(n, k, form, cuda.multiprocessors(x.device.index))
    y = torch.empty(rows, n // 2 if gelu else n, dtype=x.dtype, device=x.device)
    _kernel(form, gelu)(
        grid=(-(-(n // ROWS // form.pair) * split // form.warps), 1, 1),
        block=32 * form.warps,
        args=[weight, x, y, rows, n, k, split],
        shared_bytes=shared_bytes(form),
    )
    return y


def _other(x: Tensor, weight: Tensor, gelu: bool) -> Tensor:
    y = F.linear(x, weight)
    return stream_gemm.activated(y) if gelu else y


def linear(x: Tensor, weight: Tensor, gelu: bool) -> Tensor:
    """One linear layer, ``[..., K]`` to ``[..., N]`` (``[..., N / 2]`` with ``gelu``), by what suits the rows."""
    flat = x.reshape(-1, x.shape[-1])
    if flat.shape[0] <= chosen.get((*weight.shape, gelu), 0):
        y = gemm(flat.contiguous(), weight, gelu)
    else:
        y = _other(flat, weight, gelu)
    return y.view(*x.shape[:-1], y.shape[-1])


def _output_shape(x: Tensor, weight: Tensor, gelu: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0] // 2 if gelu else weight.shape[0])


@functools.cache
def register_operator() -> None:
    """``torch.ops.vllm.gemma4_spec_bf16_linear``: opaque to torch.compile, which sees its shape only."""
    from vllm.utils.torch_utils import direct_register_custom_op

    direct_register_custom_op(OPERATOR, linear, fake_impl=_output_shape)


def _all() -> list[tuple[Form, bool]]:
    return [(form, i == 2) for forms in FORMS.values() for i, form in enumerate(forms)]


@functools.cache
def available() -> bool:
    """Whether the kernel runs on the current card; where it should and does not, the log says once why."""
    if torch.version.hip is not None or not cuda.starts_early(torch.device("cuda")):
        return False
    try:
        cuda.compile_together((source(*what), False) for what in _all())
        for what in _all():
            _kernel(*what)
        stream_gemm._scaled_rows()
    except (ImportError, RuntimeError) as error:
        logger.info("bfloat16 GEMMs of few rows stay cuBLAS's: %s", str(error).partition("\n")[0])
        return False
    return True


def suits(weight: Tensor) -> bool:
    """Whether the kernel can take this weight: shape, dtype, memory and device."""
    return (
        cuda.nvidia(weight)
        and weight.dtype == torch.bfloat16
        and weight.dim() == 2
        and weight.is_contiguous()
        and weight.data_ptr() % 16 == 0
        and weight.shape[0] % (2 * ROWS) == 0
        and weight.shape[1] % COLUMNS == 0
        and available()
    )


chosen: dict[tuple[int, int, bool], int] = {}  # N, K, gelu -> rows up to which the kernel takes batches


def choose(weight: Tensor, gelu: bool) -> None:
    """Find out which batches of such a weight the kernel takes, none if it cannot be measured."""
    n, k = weight.shape
    shape = f"{n}x{k}{chosen_rows.BFLOAT16}" + ", gelu" * gelu
    try:
        found = chosen_rows.fastest(shape, _maker(), lambda: _times(weight, gelu))
    except RuntimeError as error:  # no memory for it
        logger.info("%s stays cuBLAS's: %s", chosen_rows.named(shape), str(error).partition("\n")[0])
        return
    taken = itertools.takewhile(lambda rows: found[rows] == OURS, sorted(found))
    chosen[n, k, gelu] = max(taken, default=0)


def _times(weight: Tensor, gelu: bool) -> chosen_rows.Kernels:
    """Of both between two small kernels, beside which ours may start and end; weights come from memory."""
    us, (n, k) = chosen_rows.clock(weight.device, calls=7), weight.shape
    before, after = (torch.ones(size, device=weight.device, dtype=weight.dtype) for size in (k, n // 2 if gelu else n))
    found: chosen_rows.Kernels = {}
    for rows in FORMS:
        x = torch.randn(rows, k, device=weight.device, dtype=weight.dtype)

        def call(kernel: Any, x: Tensor = x) -> Tensor:
            return stream_gemm.scaled_rows(kernel(stream_gemm.scaled_rows(x, before), weight, gelu), after)

        found[rows] = {name: us(functools.partial(call, k)) for name, k in ((chosen_rows.OTHER, _other), (OURS, gemm))}
    return found


@functools.cache
def _maker() -> str:
    return chosen_rows.made_by(*(source(*what) for what in _all()))
