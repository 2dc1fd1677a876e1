"""A PyTorch function that is launched like the Triton kernel it stands in for, and where Triton is switched off.

vLLM 0.19.1 launches ``kernel[grid](*args, **kwargs)``. Without a GPU driver its ``triton`` is a placeholder
(``vllm.triton_utils.importing``) whose ``jit`` returns the bare function, which cannot be subscripted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

Grid = tuple[int, ...]


class CpuKernel:
    """Decorates the PyTorch form of a Triton kernel.

    The form's parameters are the launch grid, then the kernel's own in the kernel's order, without the suffix
    ``_ptr``: where Triton gets a pointer, the form gets the tensor. Outputs are written in place; what the
    kernel does not store to, the form leaves as it is.
    """

    def __init__(self, form: Callable[..., None]) -> None:
        self.form = form
        self.__doc__ = form.__doc__

    def __getitem__(self, grid: Grid) -> Callable[..., None]:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: Grid, *args: Any, **kwargs: Any) -> None:
        self.form(grid, *args, **{name.removesuffix("_ptr"): value for name, value in kwargs.items()})

    def on_cpu(self, original: Any) -> Any:
        """What a patch puts in ``original``'s place: this form on the CPU platform, ``original`` on all others."""
        return self if _platform_is_cpu() else original


def _platform_is_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def without_triton(has_triton: bool) -> bool:
    """The value of ``HAS_TRITON`` for a module that would launch a kernel on a CPU tensor.

    Patch: ``cpu-kernels``. Evidence: ``tests/patching/test_stock.py::test_triton_kernels_cannot_be_launched_on_a_cpu``.
    Related upstream change: none found by number; 0.20.0 drafts on a CPU.
    """
    return has_triton and not _platform_is_cpu()


def next_power_of_2(_: None) -> Any:
    """``triton.next_power_of_2`` for vLLM's placeholder, which lacks it; the proposer calls it on the host.

    Patch: ``cpu-kernels``. Evidence: ``tests/patching/test_stock.py::test_triton_kernels_cannot_be_launched_on_a_cpu``.
    Related upstream change: none found by number; 0.20.0 drafts on a CPU.
    """
    from vllm.utils.math_utils import next_power_of_2

    return staticmethod(next_power_of_2)
