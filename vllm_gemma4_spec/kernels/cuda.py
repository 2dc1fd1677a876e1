"""Compile a CUDA kernel with the NVRTC that PyTorch ships, and launch it with programmatic dependent launch."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID
_MAX_DYNAMIC_SHARED_SIZE = 8  # CUfunction_attribute


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


def compiled(source: str, architecture: str) -> bytes:
    """Machine code of CUDA C++ that includes nothing, for instance for ``sm_90``.

    ``torch.cuda._compile_kernel`` does the same and more, but wants a CUDA toolkit for its headers.

    Raises:
        OSError: NVRTC cannot be loaded.
        RuntimeError: it refuses the source or does not know the architecture; says why.
    """
    nvrtc = torch.cuda._utils._get_gpu_rtc_library()  # the one that PyTorch brings
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
    try:
        options = (ctypes.c_char_p * 1)(f"--gpu-architecture={architecture}".encode())
        failed = nvrtc.nvrtcCompileProgram(program, 1, options)
        what = "ProgramLog" if failed else "CUBIN"
        getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        content = ctypes.create_string_buffer(size.value)
        getattr(nvrtc, f"nvrtcGet{what}")(program, content)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    if failed:
        raise RuntimeError(f"NVRTC, for {architecture}: {content.value.decode().strip() or f'error {failed}'}")
    return content.raw


def architecture(capability: int) -> str:
    """What to compile for, so that a card of this compute capability (90, 121, …) runs it.

    A card newer than NVRTC runs code for an earlier one of its own major version.

    Raises:
        OSError: NVRTC cannot be loaded.
        RuntimeError: it knows no card of that major version.
    """
    nvrtc, number = torch.cuda._utils._get_gpu_rtc_library(), ctypes.c_int()
    nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(number))
    known = (ctypes.c_int * number.value)()
    nvrtc.nvrtcGetSupportedArchs(known)
    fitting = [a for a in known if a // 10 == capability // 10 and a <= capability]
    if not fitting:
        raise RuntimeError(f"NVRTC knows no architecture for compute capability {capability / 10}")
    return f"sm_{max(fitting)}"


class Kernel:
    """One ``extern "C"`` kernel, compiled for the current device.

    Args:
        source: CUDA C++ that needs no headers.
        name: the kernel's.

    Raises:
        OSError, RuntimeError: see :func:`compiled`; or the driver refuses the code.
    """

    def __init__(self, source: str, name: str) -> None:
        torch.cuda.init()
        major, minor = torch.cuda.get_device_capability()
        # From Hopper on a grid may start before the one before it has ended; the kernel says what it waits for.
        self._overlaps = major >= 9
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        code = compiled(source, architecture(10 * major + minor))
        _checked("cuModuleLoadData", ctypes.byref(self._module), code)
        _checked("cuModuleGetFunction", ctypes.byref(self._function), self._module, name.encode())

    def allow_shared(self, size: int) -> None:
        """Raise the limit of dynamic shared memory to ``size`` bytes; above 48 KiB a launch needs it.

        Raises:
            RuntimeError: the card has less.
        """
        _checked("cuFuncSetAttribute", self._function, _MAX_DYNAMIC_SHARED_SIZE, size)

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
        _checked("cuLaunchKernelEx", ctypes.byref(config), self._function, pointers, None)


def _checked(call: str, *args: Any) -> None:
    error = getattr(_driver(), call)(*args)
    if error:
        raise RuntimeError(f"{call}: CUDA driver error {error}")
