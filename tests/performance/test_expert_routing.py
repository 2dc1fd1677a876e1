"""Which function chooses the experts of a Gemma 4 layer. What the kernel gives: ``tests/kernels/test_routing.py``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import vllm_gemma4_spec
from tests.support import engine as _engine  # sets the environment
from tests.support.stock import without
from vllm_gemma4_spec.performance import expert_routing
from vllm_gemma4_spec.performance.expert_routing import OneKernel
from vllm_gemma4_spec.performance.patches import EXPERT_ROUTING

assert _engine


@pytest.fixture
def moe(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes vLLM's own class around experts that only keep their routing function."""
    from vllm.model_executor.models import gemma4

    class Experts(torch.nn.Module):
        def __init__(self, custom_routing_function: Any, **_: Any) -> None:
            super().__init__()
            self.router = SimpleNamespace(custom_routing_function=custom_routing_function)

    monkeypatch.setattr(gemma4, "FusedMoE", Experts)
    config = SimpleNamespace(hidden_size=8, num_experts=16, top_k_experts=2, moe_intermediate_size=4)
    return lambda: gemma4.Gemma4MoE(config)


def test_stock_chooses_with_pytorchs_functions(moe: Any) -> None:
    with without(EXPERT_ROUTING):
        assert moe().experts.router.custom_routing_function.__name__ == "routing_function"


def test_one_kernel_chooses_on_a_gpu(moe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_gemma4_spec.kernels import routing

    vllm_gemma4_spec.apply()
    layer = moe()
    chooses = layer.experts.router.custom_routing_function
    assert isinstance(chooses, OneKernel)
    assert chooses.scales is layer.per_expert_scale
    logits = torch.randn(3, 16)
    for mine, own in zip(chooses(None, logits, 2, True), chooses.own(None, logits, 2, True), strict=True):
        assert torch.equal(mine, own)  # on a CPU
    monkeypatch.setattr(routing, "route", lambda *given: given)
    on_gpu: Any = SimpleNamespace(is_cuda=True)
    assert chooses(on_gpu, on_gpu, 2, True) == (on_gpu, layer.per_expert_scale, 2)


def test_a_kernel_that_does_not_compile_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_gemma4_spec.kernels import routing

    def fails(*_: Any) -> None:
        raise RuntimeError("no such instruction\nat line 3")

    said: list[str] = []
    monkeypatch.setattr(expert_routing.logger, "info", lambda text, *values: said.append(text % values))
    monkeypatch.setattr(routing, "route", fails)
    on_gpu: Any = SimpleNamespace(is_cuda=True)
    chooses = OneKernel(lambda *_: ("own", "own"), on_gpu)  # type: ignore[arg-type,return-value]
    assert [chooses(on_gpu, on_gpu, 2, True) for _ in range(2)] == [("own", "own")] * 2
    assert said == ["Experts are chosen by vLLM's own function: no such instruction"]
