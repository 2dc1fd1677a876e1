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

REPAIRED = torch.__version__.startswith("2.10.")  # vLLM 0.19.1's
only_repaired = pytest.mark.skipif(not REPAIRED, reason="a later Inductor")
only_later = pytest.mark.skipif(REPAIRED, reason="an Inductor before 2.11")
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
    for name in {**compile_settings._WRAPPERS, **compile_settings._LATER_WRAPPERS}:
        for owner in (c for c in codegen.TritonKernel.__mro__ if name in vars(c)):
            monkeypatch.setattr(owner, name, vars(owner)[name])
    enabled = staticmethod(lambda: config.triton.enable_pdl)  # looks at a graph's device, too
    monkeypatch.setattr(codegen.TritonKernel, "_enable_pdl_codegen", enabled, raising=False)


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


@pytest.mark.parametrize("function", [norm, activation])
def test_the_next_kernel_starts_before_this_one_waits(function: Callable[..., Any]) -> None:
    found = order(written(function))
    assert found[:3] == [LAUNCH, WAIT, "tl.load"]
    assert found.count(LAUNCH) == found.count(WAIT) == 1


def test_a_kernel_that_loads_nothing_waits_before_it_stores() -> None:
    assert order(written(constant))[-2:] == [WAIT, "tl.store"]


def test_another_models_kernels_are_inductors() -> None:
    written(norm)  # the wrappers stay in the process
    assert order(written(norm, **{"triton.enable_pdl": False}))[0] == "tl.load"
    assert order(written(constant, None)) == ([] if REPAIRED else [WAIT]) + ["tl.store"]


@only_repaired
def test_stock_ends_the_compilation() -> None:
    """Another model's stays stock, too, that asks for dependent launch after one of ours."""
    for _ in range(2):
        with pytest.raises(AssertionError, match="must have shape"):
            written(activation, None)
        written(norm)  # the wrappers stay in the process


@only_later
@pytest.mark.parametrize("function", [norm, activation])
def test_another_models_kernels_stay_a_later_inductors(function: Callable[..., Any]) -> None:
    before = order(written(function, None))
    written(function)  # the wrappers stay in the process
    assert order(written(function, None)) == before == [WAIT, *["tl.load"] * 2, LAUNCH, *before[4:]]


class Lines:
    def __init__(self) -> None:
        self._lines: list[str] = []

    def writeline(self, line: str) -> None:
        self._lines.append(line)


def later() -> Any:
    """A Triton kernel that waits and lets the next one start where Inductor 2.11's does."""

    class Later:
        GDC_WAIT, GDC_LAUNCH = WAIT, LAUNCH
        inside_reduction, range_trees = False, ()
        body = Lines()
        enabled = True

        def _enable_pdl_codegen(self) -> bool:
            return self.enabled

        def _handle_pdl_before_access(self, buffer: Any, *names: str, consider_reads: bool = False) -> None:
            if self._enable_pdl_codegen() and "written just before" in names:
                if self.inside_reduction and self.range_trees[-1].is_loop:
                    buffer = self.body
                buffer.writeline(self.GDC_WAIT)

        def _handle_pdl_after_load(self, buffer: Any, result: Any) -> None:
            if self._enable_pdl_codegen():
                buffer.writeline(self.GDC_WAIT)
                buffer.writeline(self.GDC_LAUNCH)

        def _filter_pdl(self, code: Any) -> None:
            last = max(i for i, line in enumerate(code._lines) if line == self.GDC_LAUNCH)
            first = code._lines.index(self.GDC_WAIT)
            dropped = {self.GDC_WAIT: first, self.GDC_LAUNCH: last}
            code._lines = [line for i, line in enumerate(code._lines) if dropped.get(line, i) == i]

        def code(self) -> list[str]:
            lines = Lines()
            for name in ("written long before", "written just before"):
                self._handle_pdl_before_access(lines, name)
                lines.writeline("load")
                self._handle_pdl_after_load(lines, None)
            self._handle_pdl_before_access(lines, "result", consider_reads=True)
            lines.writeline("store")
            self._filter_pdl(lines)
            return lines._lines

    return Later


def test_a_later_inductors_kernel_waits_before_whatever_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = later()
    before = kernel().code()
    compile_settings.launch_early(kernel)
    compile_settings.launch_early(kernel)
    assert kernel().code() == before == ["load", WAIT, "load", LAUNCH, "store"]  # not a model of ours
    monkeypatch.setattr(compile_settings, "_ours", lambda: True)
    assert kernel().code() == [LAUNCH, WAIT, "load", "load", "store"]


def test_a_later_inductors_loop_waits_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, loads = later(), Lines()
    compile_settings.launch_early(kernel)
    monkeypatch.setattr(compile_settings, "_ours", lambda: True)
    kernel.inside_reduction, kernel.range_trees = True, (type("Tree", (), {"is_loop": True}),)
    kernel()._handle_pdl_before_access(loads, "written long before")
    assert (kernel.body._lines, loads._lines) == ([LAUNCH, WAIT], [])


class Unknown:
    """A Triton kernel of an Inductor that nobody tried: the names, and nothing behind them."""

    def _handle_pdl_before_load(self, buffer: Any) -> None: ...
    def _handle_pdl_before_access(self, buffer: Any, name: str) -> None: ...
    def _handle_pdl_after_load(self, buffer: Any, result: Any) -> None: ...
    def _filter_pdl(self, code: Any) -> None: ...
    def codegen_body(self) -> None: ...


class Older:
    """One without dependent launch."""

    def codegen_body(self) -> None: ...


@pytest.mark.parametrize("kernel", [Unknown, Older])
def test_an_unknown_inductor_is_left_alone(kernel: type[Any]) -> None:
    before = dict(vars(kernel))
    compile_settings.launch_early(kernel)
    assert dict(vars(kernel)) == before
