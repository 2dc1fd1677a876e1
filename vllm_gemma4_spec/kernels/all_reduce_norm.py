"""All-reduce over two GPUs, norm, residual, scale and the next norm as one kernel, ``all_reduce_norm.cu``.

A Gemma 4 layer norms what it adds to the residual, so an all-reduce is followed by two norms, not by one: FlashInfer's
fused kernels have one. Larger batches are summed by vLLM's own all-reduce; the kernel then does the rest.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from vllm_gemma4_spec.kernels import cuda, ranks

logger = logging.getLogger("vllm.plugins.gemma4_spec")

RANKS = 2
MOST_ROWS = 256  # of an exchange; what a batch of one-shot sums costs grows with it
WIDEST = 8192  # values of a row: a block has 1,024 threads at most
_SLOTS = 3


def source(width: int, eps: float, exchange: bool, scale: bool, following: bool) -> str:
    """The kernel's CUDA C++."""
    macros = {
        "WIDTH": width,
        "ROWS": MOST_ROWS,
        "EPS": f"{eps!r}f",
        "EXCHANGE": int(exchange),
        "SCALE": int(scale),
        "NEXT": int(following),
    }
    return cuda.source("all_reduce_norm.cu", macros)


@functools.cache
def _kernels(width: int, eps: float, scale: bool, following: bool) -> tuple[cuda.Kernel, ...]:
    """Without and with an exchange, both by the first pass: none may be loaded while a CUDA graph is captured."""
    return tuple(cuda.Kernel(source(width, eps, e, scale, following), "all_reduce_norm") for e in (False, True))


class Exchange:
    """Memory of this rank and of the other for rows of one width: where each writes what the other is to add."""

    def __init__(self, width: int, mine: int, theirs: int) -> None:
        from cuda.bindings import driver

        words = _SLOTS * MOST_ROWS * width // 2
        self.mine, self.theirs = driver.CUdeviceptr(mine), driver.CUdeviceptr(theirs)
        self.slots = driver.CUdeviceptr(mine + words * 4)
        reset = cuda.Kernel(source(width, 0.0, True, False, False), "all_reduce_norm_reset")
        reset(grid=(-(-(words + MOST_ROWS) // 256), 1, 1), block=256, args=[self.mine, words])
        torch.cuda.synchronize()

    @staticmethod
    def size(width: int) -> int:
        return _SLOTS * MOST_ROWS * width * 2 + MOST_ROWS * 4


@functools.cache
def exchange(group_name: str, width: int) -> Exchange | None:
    """This rank's and the other's memory, on the first call of both; None where they cannot read each other's.

    Outside PyTorch's memory, so that sleep mode leaves it alone. It is made with vLLM's first pass, and kept.
    """
    from vllm.distributed.device_communicators.custom_all_reduce import CustomAllreduce

    group = ranks.group(group_name)
    if ranks.custom_all_reduce(group) is None:
        logger.warning(
            "All-reduces stay vLLM's: its custom all-reduce, which needs the same access, is off; it says why"
        )
        return None
    with torch.inference_mode(False):  # Gloo's collectives cannot be called in it
        addresses = CustomAllreduce.create_shared_buffer(Exchange.size(width), group=group.cpu_group)
        made = Exchange(width, addresses[group.rank_in_group], addresses[1 - group.rank_in_group])
        torch.distributed.barrier(group=group.cpu_group)  # neither writes before both are ready
    return made


def launch(
    x: Tensor,
    weight: Tensor,
    residual: Tensor,
    scale: Tensor | None,
    next_weight: Tensor | None,
    eps: float,
    memory: Exchange | None,
) -> tuple[Tensor, Tensor]:
    """``hidden`` and ``normed`` (without ``next_weight`` no value of it is written), on the current stream.

    Args:
        x, residual: ``[rows, width]`` bfloat16, contiguous.
        weight, next_weight: ``[width]`` bfloat16.
        scale: one bfloat16.
        memory: ``x`` is this rank's part of the sum, of at most :data:`MOST_ROWS` rows; None: ``x`` is the sum.
    """
    rows, width = x.shape
    hidden = torch.empty_like(x)
    normed = hidden if next_weight is None else torch.empty_like(x)
    unused = hidden
    _kernels(width, eps, scale is not None, next_weight is not None)[memory is not None](
        grid=(rows, 1, 1),
        block=-(-width // 256) * 32,
        args=[
            x,
            weight,
            residual,
            unused if scale is None else scale,
            unused if next_weight is None else next_weight,
            hidden,
            normed,
            *((unused, unused, unused) if memory is None else (memory.mine, memory.theirs, memory.slots)),
        ],
    )
    return hidden, normed


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    values = x.float()
    return values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps) * weight.float()


def reference(
    x: Tensor, weight: Tensor, residual: Tensor, scale: Tensor | None, next_weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """What :func:`launch` computes where ``x`` is the sum, by PyTorch: rounded where it is stored alone."""
    hidden = _norm(x, weight, eps) + residual.float()
    if scale is not None:
        hidden = hidden * scale.float()
    stored = hidden.to(x.dtype)
    return stored, stored if next_weight is None else _norm(hidden, next_weight, eps).to(x.dtype)


def _all_reduce_norm(
    x: Tensor,
    weight: Tensor,
    residual: Tensor,
    scale: Tensor | None,
    next_weight: Tensor | None,
    eps: float,
    group_name: str,
) -> list[Tensor]:
    rows, width = x.shape
    memory = exchange(group_name, width) if x.is_cuda else None  # made by vLLM's first pass, of whatever size
    if memory is None or rows > MOST_ROWS:
        x, memory = ranks.group(group_name)._all_reduce_out_place(x), None
    if not rows or not x.is_cuda:
        hidden, normed = reference(x, weight, residual, scale, next_weight, eps)
    else:
        hidden, normed = launch(x.contiguous(), weight, residual.contiguous(), scale, next_weight, eps, memory)
    return [hidden] if next_weight is None else [hidden, normed]


def _shapes(
    x: Tensor,
    weight: Tensor,
    residual: Tensor,
    scale: Tensor | None,
    next_weight: Tensor | None,
    eps: float,
    group_name: str,
) -> list[Tensor]:
    return [torch.empty_like(x) for _ in range(1 if next_weight is None else 2)]


def register() -> None:
    """``torch.ops.vllm.gemma4_spec_all_reduce_norm``, once."""
    if not hasattr(torch.ops.vllm, "gemma4_spec_all_reduce_norm"):
        from vllm.utils.torch_utils import direct_register_custom_op

        direct_register_custom_op("gemma4_spec_all_reduce_norm", _all_reduce_norm, fake_impl=_shapes)
