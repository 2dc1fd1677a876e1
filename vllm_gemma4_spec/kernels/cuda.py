"""Compile a CUDA kernel with the NVRTC that PyTorch ships, and launch it with programmatic dependent launch."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: an id, padding to 8 bytes, a union of 64."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_int * 15))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


@functools.cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


class Kernel:
    """One ``extern "C"`` kernel, compiled for the current device.

    Args:
        source: CUDA C++ that needs no headers.
        name: the kernel's.

    Raises:
        RuntimeError, OSError: NVRTC is missing or refuses the source.
    """

    def __init__(self, source: str, name: str) -> None:
        self._loaded = torch.cuda._compile_kernel(source, name)
        # From Hopper on a grid may start before the one before it has ended; the kernel says what it waits for.
        self._overlaps = torch.cuda.get_device_capability()[0] >= 9

    def __call__(
        self, grid: tuple[int, int, int], block: int, args: Sequence[Tensor | int], shared_bytes: int = 0
    ) -> None:
        """Launch on the current stream; tensors are passed as pointers, whole numbers as C ints."""
        values = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_int(a) for a in args]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        attribute = _Attribute(id=_PROGRAMMATIC_STREAM_SERIALIZATION, value=1)
        config = _Config(
            grid=(ctypes.c_uint * 3)(*grid),
            block=(ctypes.c_uint * 3)(block, 1, 1),
            shared_bytes=shared_bytes,
            stream=torch.cuda.current_stream().cuda_stream,
            attributes=ctypes.pointer(attribute),
            num_attributes=int(self._overlaps),
        )
        error = _driver().cuLaunchKernelEx(ctypes.byref(config), self._loaded.func, pointers, None)
        if error:
            raise RuntimeError(f"CUDA driver error {error} when launching a kernel of {tuple(grid)} x {block} threads")
