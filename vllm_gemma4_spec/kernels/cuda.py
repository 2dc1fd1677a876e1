"""Compile a CUDA kernel with NVRTC and launch it with programmatic dependent launch, through cuda-bindings.

PyTorch's builds for CUDA bring both. Whoever compiles here must expect ImportError, where a build brings no
cuda-bindings, and RuntimeError.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def _checked(result: tuple[Any, ...], what: str) -> Any:
    """What a call of cuda-bindings gives beside its status: nothing, a value or several.

    Raises:
        RuntimeError: the status is an error.
    """
    status, *values = result
    if status.value:
        raise RuntimeError(f"{what}: {status.name}")
    return values[0] if len(values) == 1 else values


def source(file: str, macros: Mapping[str, Any] | None = None, before: str = "") -> str:
    """CUDA C++ of a file of this package, behind its macros and what else is to stand before it."""
    defined = "".join(f"#define {name} {value}\n" for name, value in (macros or {}).items())
    return defined + before + resources.files(__package__).joinpath(file).read_text()


def nvidia(where: torch.device | Tensor) -> bool:
    """Whether that is, or lies on, a GPU of NVIDIA's: PyTorch calls AMD's ``cuda``, too."""
    gpu = where.is_cuda if isinstance(where, Tensor) else where.type == "cuda"
    return gpu and torch.version.hip is None


@functools.cache
def beside_others() -> bool:
    """Whether kernels of other processes may run beside ours: under CUDA MPS, whose daemon has a pipe of this name."""
    return Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"), "control").exists()


def starts_early(device: torch.device) -> bool:
    """A card on which this package launches small kernels before the one ahead has ended: Hopper, Blackwell."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)


@functools.cache
def compiled(source: str, architecture: str) -> bytes:
    """Machine code of CUDA C++ that includes nothing, for instance for ``sm_90``.

    ``torch.cuda._compile_kernel`` does the same and more, but wants a CUDA toolkit for its headers.

    Raises:
        ImportError: there is no cuda-bindings.
        RuntimeError: NVRTC cannot be loaded, refuses the source or does not know the architecture; says why.
    """
    from cuda.bindings import nvrtc

    program = _checked(nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, None, None), "NVRTC")
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, 1, [f"--gpu-architecture={architecture}".encode()])
        if status.value:
            log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program), "NVRTC")
            _checked(nvrtc.nvrtcGetProgramLog(program, log), "NVRTC")
            said = log.decode(errors="replace").strip("\0 \n")
            raise RuntimeError(f"NVRTC, for {architecture}: {said or status.name}")
        code = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program), "NVRTC")
        _checked(nvrtc.nvrtcGetCUBIN(program, code), "NVRTC")
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return code


def architecture(capability: int) -> str:
    """What to compile for, so that a card of this compute capability (90, 121, …) runs it.

    A card newer than NVRTC runs code for an earlier one of its own major version.

    Raises:
        ImportError: there is no cuda-bindings.
        RuntimeError: NVRTC cannot be loaded, or knows no card of that major version.
    """
    from cuda.bindings import nvrtc

    known = _checked(nvrtc.nvrtcGetSupportedArchs(), "NVRTC")
    fitting = [a for a in known if a // 10 == capability // 10 and a <= capability]
    if not fitting:
        raise RuntimeError(f"NVRTC knows no architecture for compute capability {capability / 10}")
    return f"sm_{max(fitting)}"


def matrix_map(address: int, rows: int, columns: int, item: int, box_rows: int, box_columns: int) -> Any:
    """A ``CUtensorMap`` of a dense matrix, for copies of ``[box_rows, box_columns]`` into shared memory.

    Args:
        item: bytes of an element, 1, 2 or 8; 2 is bfloat16, whose boxes have rows of 128 bytes and come swizzled. The
            rows of a box have a multiple of 16 bytes, and so have the matrix's.

    Raises:
        RuntimeError: the driver refuses it.
    """
    from cuda.bindings import driver

    types, words, swizzles = driver.CUtensorMapDataType, driver.cuuint64_t, driver.CUtensorMapSwizzle
    return _checked(
        driver.cuTensorMapEncodeTiled(
            {
                1: types.CU_TENSOR_MAP_DATA_TYPE_UINT8,
                2: types.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                8: types.CU_TENSOR_MAP_DATA_TYPE_UINT64,
            }[item],
            2,
            address,
            [words(columns), words(rows)],
            [words(columns * item)],
            [driver.cuuint32_t(box_columns), driver.cuuint32_t(box_rows)],
            [driver.cuuint32_t(1)] * 2,
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzles.CU_TENSOR_MAP_SWIZZLE_128B if item == 2 else swizzles.CU_TENSOR_MAP_SWIZZLE_NONE,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        ),
        "cuTensorMapEncodeTiled",
    )


weight_map = functools.cache(matrix_map)  # of what stays where it is
# Of activations, which the allocator puts in the same places step by step.
recent_map = functools.lru_cache(1024)(matrix_map)


def this_card() -> str:
    """:func:`architecture` of the current device; raises what it does."""
    torch.cuda.init()
    major, minor = torch.cuda.get_device_capability()
    return architecture(10 * major + minor)


def compile_together(wanted: Iterable[tuple[str, bool]]) -> None:
    """:func:`compiled` of several sources for the current device, as NVRTC takes seconds for some.

    Args:
        wanted: each source, and whether it is for this very architecture, as :class:`Kernel` takes it.
    """
    card = this_card()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda what: compiled(what[0], card + "a" * what[1]), wanted))


@functools.cache
def multiprocessors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


class Kernel:
    """One ``extern "C"`` kernel, compiled for the current device.

    Args:
        source: CUDA C++ that needs no headers.
        name: the kernel's.
        this_only: compile for this very architecture (``sm_90a``), whose own instructions the source takes.

    Raises:
        ImportError, RuntimeError: see :func:`compiled`; or the driver refuses the code.
    """

    def __init__(self, source: str, name: str, this_only: bool = False) -> None:
        torch.cuda.synchronize()  # a process that has used no CUDA yet has no context to load code into
        code = compiled(source, this_card() + "a" * this_only)
        # From Hopper on a grid may start before the one before it has ended; the kernel says what it waits for.
        self._load(code, name, overlaps=torch.cuda.get_device_capability()[0] >= 9)

    def _load(self, code: bytes, name: str, overlaps: bool) -> None:
        from cuda.bindings import driver

        self._driver = driver
        # By stream and shape of a launch: made once, as that costs the host.
        self._configs: dict[tuple[Any, ...], Any] = {}
        self._types: tuple[Any, ...] | None = None
        self._attributes = []
        if overlaps:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            self._attributes.append(attribute)
        self._module = _checked(driver.cuModuleLoadData(code), "cuModuleLoadData")
        self._function = _checked(driver.cuModuleGetFunction(self._module, name.encode()), "cuModuleGetFunction")

    def allow_shared(self, size: int) -> None:
        """Raise the limit of dynamic shared memory to ``size`` bytes; above 48 KiB a launch needs it.

        Raises:
            RuntimeError: the card has less.
        """
        limit = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(self._driver.cuFuncSetAttribute(self._function, limit, size), "cuFuncSetAttribute")

    def __call__(
        self, grid: tuple[int, int, int], block: int, args: Sequence[Any], shared_bytes: int = 0, cluster: int = 1
    ) -> None:
        """Launch on the current stream; tensors are passed as pointers, whole numbers as C ints, others (of
        :func:`matrix_map`) by value; so many blocks along z are a cluster.

        A kernel's arguments are of the same kinds, in the same order, in every launch.
        """
        self._launch(torch.cuda.current_stream().cuda_stream, grid, block, args, shared_bytes, cluster)

    def _launch(
        self,
        stream: int,
        grid: tuple[int, int, int],
        block: int,
        args: Sequence[Any],
        shared_bytes: int,
        cluster: int = 1,
    ) -> None:
        config = self._configs.get(asked := (stream, grid, block, shared_bytes, cluster))
        if config is None:
            config = self._configs[asked] = self._config(*asked)
        if self._types is None:  # they never change, see __call__
            kinds = (
                ctypes.c_void_p if isinstance(a, Tensor) else ctypes.c_int if isinstance(a, int) else None for a in args
            )
            self._types = tuple(kinds)
        values = tuple([a.data_ptr() if isinstance(a, Tensor) else a for a in args])
        _checked(self._driver.cuLaunchKernelEx(config, self._function, (values, self._types), 0), "cuLaunchKernelEx")

    def _config(self, stream: int, grid: tuple[int, int, int], block: int, shared_bytes: int, cluster: int) -> Any:
        config = self._driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = block, 1, 1
        config.sharedMemBytes = shared_bytes
        config.hStream = stream
        attributes = self._attributes
        if cluster > 1:
            attribute = self._driver.CUlaunchAttribute()
            attribute.id = self._driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            size = attribute.value.clusterDim
            size.x, size.y, size.z = 1, 1, cluster
            attributes = [*attributes, attribute]
        config.attrs, config.numAttrs = attributes, len(attributes)
        return config
