"""Where a kernel of torch.compile lets the next one start, seen in the Triton code that Inductor writes for a model."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import config
from torch._inductor.codegen import triton as codegen
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _triton

from vllm_gemma4_spec.performance import compile_settings
from vllm_gemma4_spec.performance.compile_settings import LaunchChoices

REPAIRED = torch.__version__.startswith("2.10.")  # vLLM 0.19.1's; a later Inductor keeps its own dependent launch
only_repaired = pytest.mark.skipif(not REPAIRED, reason="this Inductor's own dependent launch stays")
LAUNCH, WAIT = "gdc_launch_dependents", "gdc_wait"


def norm(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    v = x.float()
    v = v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (v * weight.float()).to(x.dtype), x + weight


def activation(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x) * weight


def constant(x: Tensor, weight: Tensor) -> Tensor:
    return torch.arange(64, dtype=x.dtype)


@pytest.fixture(autouse=True)
def _hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that Inductor takes for a Hopper, and its own classes again afterwards."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(_triton, "triton_hash_with_backend", lambda: "")
    monkeypatch.setattr(compile_settings, "_takes_pdl", lambda: True)
    for name in compile_settings._WRAPPERS:
        for owner in (c for c in codegen.TritonKernel.__mro__ if name in vars(c)):
            monkeypatch.setattr(owner, name, vars(owner)[name])


def written(function: Callable[..., Any], choices: Any = LaunchChoices, **settings: Any) -> str:
    inputs = torch.randn(4, 512).bfloat16(), torch.randn(512).bfloat16()
    own = {"cpu_backend": "triton", "triton.enable_pdl": True, "inductor_choices_class": choices, **settings}
    with config.patch(own):
        graph = make_fx(function, decomposition_table=select_decomp_table(), tracing_mode="fake")(*inputs)
        lowered = GraphLowering(graph)
        with (
            V.set_graph_handler(lowered),
            V.set_debug_handler(DebugContext()),
            V.set_choices_handler(_handler(choices)),
        ):
            lowered.run(*(n.meta["val"] for n in graph.graph.nodes if n.op == "placeholder"))
            return str(lowered.codegen()[0].value)


def _handler(choices: Any) -> Any:
    from torch._inductor.choices import InductorChoices

    return (choices or InductorChoices)()


def order(code: str) -> list[str]:
    return re.findall(rf"{LAUNCH}|{WAIT}|tl\.load|tl\.store", code)


@only_repaired
@pytest.mark.parametrize("function", [norm, activation])
def test_the_next_kernel_starts_before_this_one_waits(function: Callable[..., Any]) -> None:
    found = order(written(function))
    assert found[:3] == [LAUNCH, WAIT, "tl.load"]
    assert found.count(LAUNCH) == found.count(WAIT) == 1


@only_repaired
def test_a_kernel_that_loads_nothing_waits_before_it_stores() -> None:
    assert order(written(constant)) == [WAIT, "tl.store"]


def test_another_models_kernels_are_inductors() -> None:
    written(norm)  # the wrappers stay in the process
    assert order(written(norm, **{"triton.enable_pdl": False}))[0] == "tl.load"
    assert order(written(constant, None)) == ["tl.store"]


@only_repaired
def test_stock_ends_the_compilation() -> None:
    """Another model's stays stock, too, that asks for dependent launch after one of ours."""
    for _ in range(2):
        with pytest.raises(AssertionError, match="must have shape"):
            written(activation, None)
        written(norm)  # the wrappers stay in the process


@pytest.mark.skipif(REPAIRED, reason="this Inductor is repaired")
@pytest.mark.parametrize("function", [norm, activation, constant])
def test_another_inductor_is_left_alone(function: Callable[..., Any]) -> None:
    assert written(function) == written(function, None)
    for name in compile_settings._WRAPPERS:
        assert not hasattr(getattr(codegen.TritonKernel, name, None), "__wrapped__")


class Unknown:
    """A Triton kernel of an Inductor that nobody tried: the names, and nothing behind them."""

    def _handle_pdl_before_load(self, buffer: Any) -> None: ...
    def _handle_pdl_after_load(self, buffer: Any, result: Any) -> None: ...
    def codegen_body(self) -> None: ...


class Older:
    """One without dependent launch."""

    def codegen_body(self) -> None: ...


@pytest.mark.parametrize("kernel", [Unknown, Older])
def test_an_unknown_inductor_is_left_alone(kernel: type[Any]) -> None:
    before = dict(vars(kernel))
    compile_settings.launch_early(kernel)
    assert dict(vars(kernel)) == before
