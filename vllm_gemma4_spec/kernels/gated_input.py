"""A layer's per-layer input of a few rows as one kernel, ``nvfp4_gated.cu``: gate, activation, product, projection.

Three kernels otherwise, each of which waits for the one before: of 7 us a layer of E4B, the weights take 0.2.
"""

from __future__ import annotations

import functools
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from vllm_gemma4_spec.kernels import cuda, small_batch_gemm
from vllm_gemma4_spec.kernels.packing import COLUMNS
from vllm_gemma4_spec.kernels.small_batch_gemm import Form

WIDE = 256  # values of a token that are gated
_BLOCKS = 8  # of a cluster
MOST_K = 16 * COLUMNS  # a warp for each 256 inputs


def form_for(rows: int) -> Form:
    """Rows that a cluster takes at once."""
    return Form(1, 2) if rows <= 8 else Form(2, 2)


def suits(k: int, wide: int) -> bool:
    return wide == WIDE and k % COLUMNS == 0 and k <= MOST_K


def source(form: Form) -> str:
    text = resources.files(__package__).joinpath("nvfp4_gated.cu").read_text()
    return "#define GATED\n" + small_batch_gemm.source(form, False, False) + text


@functools.cache
def _kernel(form: Form) -> Any:
    return cuda.Kernel(source(form), "nvfp4_gated")


def shared_bytes(k: int, form: Form) -> int:
    return k // COLUMNS * form.tiles * 1024 + form.rows * 2 * (WIDE + 8)


def gated(
    x: Tensor,
    by: Tensor,
    gate: tuple[Tensor, Tensor, Tensor],
    projection: tuple[Tensor, Tensor, Tensor],
    form: Form | None = None,
) -> Tensor:
    """``(gelu_tanh(x @ gate.T) * by) @ projection.T`` on the current stream.

    Args:
        x: ``[rows, K]`` bfloat16, contiguous.
        by: ``[rows, 256]`` bfloat16; rows may be apart.
        gate, projection: codes, scales and global scale as :func:`small_batch_gemm.gemm` takes them.
        form: None for what suits such a batch.
    """
    rows, k = x.shape
    form = form or form_for(rows)
    y = torch.empty_like(x)
    _kernel(form)(
        grid=(form.chunks(rows), 1, _BLOCKS),
        block=k // COLUMNS * 32,
        args=[*gate, *projection, x, by, y, rows, k, by.stride(0)],
        shared_bytes=shared_bytes(k, form),
        cluster=_BLOCKS,
    )
    return y
