"""Gemma 4's expert activation on a CPU, quantized or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import Module
from torch.nn import functional as F
from vllm.model_executor.layers.fused_moe.activation import MoEActivation


def gelu_and_mul(x: Tensor) -> Tensor:
    """[T, 2I] -> [T, I], Gemma 4's gelu_pytorch_tanh, as transformers computes its experts."""
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def with_gelu(original: dict[Any, Any]) -> dict[Any, Any]:
    """``_CPU_MOE_ACT_FN`` with the activation of Gemma 4's experts.

    Patch: ``cpu-moe-gelu``. Evidence: ``tests/patching/test_stock.py::test_experts_on_a_cpu_do_not_know_gelu``. Related
    upstream change: none found.
    """
    return {**original, MoEActivation.GELU: gelu_and_mul}


def native_activations_only(original: Callable[..., tuple[bool, str]]) -> Callable[..., tuple[bool, str]]:
    """``CPUFusedMOE.check_grouped_gemm`` that leaves GELU to the path in torch: the C++ kernel lacks it.

    Patch: ``cpu-moe-gelu``. Evidence: ``tests/patching/test_stock.py::test_experts_on_a_cpu_do_not_know_gelu``. Related
    upstream change: none found.
    """

    def check_grouped_gemm(self: Any, layer: Module) -> tuple[bool, str]:
        return (False, "none") if layer.activation == MoEActivation.GELU else original(self, layer)

    return check_grouped_gemm
