"""A layer's per-layer input as one kernel: on a CPU, a thread per CUDA thread, and its place in a traced graph."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from tests.kernels.test_small_batch_gemm import GLOBAL_SCALE, dequantized, weight
from tests.support import engine as _engine  # sets the environment
from tests.support.configs import GEMMA4, LLAMA
from vllm_gemma4_spec.kernels import chosen_rows, gated_input, packing, small_batch_gemm
from vllm_gemma4_spec.kernels.small_batch_gemm import Form
from vllm_gemma4_spec.quantization import small_batch_layers

assert _engine
HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("tokens", "k", "form", "apart"),
    [(5, 512, Form(1), 3 * 256), (17, 256, Form(2, 2), 256)],
)
def test_the_kernel_gates_and_projects(tokens: int, k: int, form: Form, apart: int, tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to build the kernel for the CPU with")
    sources = resources.files("vllm_gemma4_spec.kernels")
    macros = [f"-D{name}={value}" for name, value in small_batch_gemm.macros(form, False, False).items()]
    for name in ("rows_device", "nvfp4_rows", "nvfp4_gated"):
        macros.append(f'-D{name.upper()}_SOURCE="{sources / name}.cu"')
    flags = ["-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-pthread"]
    library = tmp_path / "gated.so"
    subprocess.run([compiler, *flags, *macros, str(HERE / "on_host.cpp"), "-o", str(library)], check=True)
    torch.manual_seed(tokens)
    (gate, gate_scale), (up, up_scale) = weight(256, k), weight(k, 256)
    x = torch.randn(tokens, k).bfloat16()
    by = torch.randn(tokens, apart).bfloat16()[:, apart - 256 :]
    y, scale = torch.full((tokens, k), torch.nan, dtype=torch.bfloat16), torch.tensor([GLOBAL_SCALE])
    given = (*packing.pack(gate, gate_scale), scale, *packing.pack(up, up_scale), scale, x, by, y)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in given]
    ctypes.CDLL(str(library)).run_gated(*pointers, tokens, k, apart)
    values = (x.double() @ dequantized(gate, gate_scale).T * GLOBAL_SCALE).bfloat16().float()
    values = (F.gelu(values, approximate="tanh") * by.float()).bfloat16()
    wanted = values.double() @ dequantized(up, up_scale).T * GLOBAL_SCALE
    error = (y.double() - wanted).norm() / wanted.norm()
    assert error < 4e-3, f"{error:.1e}"


def layer(n: int, k: int, **other: Any) -> Any:
    """A linear layer as small_batch_layers.linear reads it; its codes are a dense weight here."""
    empty = torch.empty(0)
    values = {
        "pre_quant_scale": None,
        "rows_scaled": False,
        "rows_codes": torch.randn(n, k),
        "rows_scales": empty,
        "rows_global_scale": empty,
        "weight": empty,
        "weight_scale": empty,
        "weight_global_scale": empty,
        "workspace": empty,
        "streamed": 0,
        "output_size_per_partition": n,
        "rows_gelu": False,
        "stream_gelu": False,
    }
    return SimpleNamespace(**values | other)


@pytest.fixture
def _operators(monkeypatch: pytest.MonkeyPatch) -> None:
    small_batch_gemm.register_operator()
    gated_input.register_operator()

    def gemm(x: Tensor, codes: Tensor, *_: Any) -> Tensor:
        return x @ codes.T

    monkeypatch.setattr(small_batch_gemm, "gemm", gemm)
    monkeypatch.setattr(small_batch_gemm, "form_for", lambda *_: Form(1))
    monkeypatch.setattr(gated_input, "available", lambda: False)  # the operator's way for larger batches


def traced(function: Any, *inputs: Tensor) -> fx.GraphModule:
    found: list[fx.GraphModule] = []

    def backend(graph: fx.GraphModule, _: Any) -> Any:
        found.append(graph)
        return graph.forward

    torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*inputs)
    return found[0]


def decoder_layer(gate: Any, up: Any, swapped: bool = False) -> Any:
    """What Gemma4DecoderLayer.forward does with a per-layer input."""

    def forward(hidden: Tensor, per_layer: Tensor) -> Tensor:
        value = F.gelu(small_batch_layers.linear(gate, hidden), approximate="tanh")
        by = per_layer[:, 3, :]
        return hidden + small_batch_layers.linear(up, by * value if swapped else value * by)

    return forward


@pytest.mark.usefixtures("_operators")
@pytest.mark.parametrize("swapped", [False, True])
def test_a_traced_layer_has_one_operator_then(swapped: bool) -> None:
    torch._dynamo.reset()
    forward = decoder_layer(layer(256, 512), layer(512, 256), swapped)
    inputs = torch.randn(3, 512), torch.randn(3, 5, 256)
    graph = traced(forward, *inputs)
    before = [n.target for n in graph.graph.nodes if n.op == "call_function"]
    assert gated_input.fuse(graph.graph) == 1
    graph.graph.lint()
    graph.recompile()
    after = [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
    assert len(after) == len(before) - 3
    assert [name for name in after if "gemma4_spec" in name] == [f"vllm.{gated_input.OPERATOR}"]
    assert gated_input.fuse(graph.graph) == 0


@pytest.mark.usefixtures("_operators")
def test_the_fused_graph_gives_what_the_layer_gave() -> None:
    torch._dynamo.reset()
    forward = decoder_layer(layer(256, 512), layer(512, 256))
    fused: list[int] = []

    def backend(graph: fx.GraphModule, _: Any) -> Any:
        fused.append(gated_input.fuse(graph.graph))
        graph.recompile()
        return graph.forward

    inputs = torch.randn(3, 512), torch.randn(3, 5, 256)
    wanted = forward(*inputs)
    torch.testing.assert_close(torch.compile(forward, backend=backend, fullgraph=True)(*inputs), wanted)
    assert fused == [1]


@pytest.mark.usefixtures("_operators")
@pytest.mark.parametrize(
    ("gate", "up"),
    [
        (layer(512, 512), layer(512, 512)),  # another width
        (layer(256, 384), layer(384, 256)),  # inputs that are no whole blocks
        (layer(256, 512, rows_scaled=True, pre_quant_scale=torch.ones(512)), layer(512, 256)),
        (layer(256, 512), layer(512, 256, rows_gelu=True)),
    ],
)
def test_what_the_kernel_does_not_take_stays(gate: Any, up: Any) -> None:
    k, wide = gate.rows_codes.shape[1], gate.output_size_per_partition

    def forward(hidden: Tensor, per_layer: Tensor) -> Tensor:
        value = F.gelu(small_batch_layers.linear(gate, hidden), approximate="tanh")
        return small_batch_layers.linear(up, value * per_layer)

    torch._dynamo.reset()
    assert gated_input.fuse(traced(forward, torch.randn(3, k), torch.randn(3, wide)).graph) == 0


@pytest.mark.usefixtures("_operators")
def test_a_value_that_something_else_reads_stays() -> None:
    gate, up = layer(256, 512), layer(512, 256)

    def forward(hidden: Tensor, per_layer: Tensor) -> tuple[Tensor, Tensor]:
        value = F.gelu(small_batch_layers.linear(gate, hidden), approximate="tanh") * per_layer
        return small_batch_layers.linear(up, value), value

    torch._dynamo.reset()
    assert gated_input.fuse(traced(forward, torch.randn(3, 512), torch.randn(3, 256)).graph) == 0


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A card whose times are given, by the kernels that ran and the rows; and the kernels of the last call."""
    found: dict[str, Any] = {"us": {}, "called": [], "makers": []}
    called: list[str] = found["called"]

    def gemm(x: Tensor, *_: Any, **given: Any) -> Tensor:
        called.append("gate and product")
        return given["by"]

    def linear(x: Tensor, *given: Any) -> Tensor:
        called.append("GEMM")
        return x.new_empty(len(x), given[-2])

    def one(x: Tensor, *_: Any) -> Tensor:
        called.append("one")
        return x

    def us(call: Any) -> float:
        called.clear()
        call()
        kernels, rows = tuple(called[: len(called) // gated_input._IN_A_ROW]), len(call.args[0])
        return float(found["us"].get((kernels, rows), 40.0))

    def fastest(shape: str, maker: str, measure: Any) -> dict[int, str]:
        return {rows: chosen_rows._fastest(times) for rows, times in reversed(measure().items())}

    monkeypatch.setattr(gated_input, "available", lambda: True)
    monkeypatch.setattr(gated_input, "gated", one)
    monkeypatch.setattr(gated_input, "_maker", lambda *streamed: found["makers"].append(streamed) or "")
    monkeypatch.setattr(gated_input, "_chosen", {})
    monkeypatch.setattr(small_batch_gemm, "gemm", gemm)
    monkeypatch.setattr(small_batch_gemm, "linear", linear)
    monkeypatch.setattr(chosen_rows, "clock", lambda _: us)
    monkeypatch.setattr(chosen_rows, "fastest", fastest)
    return found


ONE, TWO, THREE = ("one",), ("gate and product", "GEMM"), ("GEMM", "GEMM")


def kernels_of(card: dict[str, Any], rows: int, by: Tensor | None = None) -> tuple[str, ...]:
    card["called"].clear()
    x, weights = torch.zeros(rows, 512), [torch.empty(0)] * 7
    by = torch.zeros(rows, 2, 256)[:, 1] if by is None else by
    assert gated_input.per_layer_input(x, by, *weights, 0, 256, *weights, 0, 512).shape == (rows, 512)
    return tuple(card["called"])


def test_each_batch_gets_what_was_fastest(card: dict[str, Any]) -> None:
    card["us"] |= {(TWO, 8): 30.0, (ONE, 8): 30.5, (TWO, 16): 30.0, (ONE, 16): 20.0, (ONE, 128): 39.5}
    gated_input.choose(layer(256, 512), layer(512, 256))
    got = {rows: kernels_of(card, rows) for rows in (1, 8, 9, 16, 17, 128, 129)}
    assert got == dict.fromkeys(got, THREE) | {1: TWO, 8: TWO, 9: ONE, 16: ONE}
    assert kernels_of(card, 16, torch.zeros(256, 16).T) == THREE  # values that are apart


def test_times_are_kept_apart_by_what_streams(card: dict[str, Any]) -> None:
    gated_input.choose(layer(256, 512, streamed=3), layer(512, 256, streamed=5))
    assert card["makers"] == [(512, 3, 5)]


def test_makers_differ_by_what_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_batch_gemm, "_maker", lambda *of: str(of))
    assert len({gated_input._maker(2560, *streamed) for streamed in ((0, 0), (3, 0), (0, 3))}) == 3


def test_layers_of_one_size_are_measured_once(card: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    card["us"] |= {(ONE, 8): 5.0}
    gated_input.choose(layer(256, 512), layer(512, 256))
    card["us"].clear()
    gated_input.choose(layer(256, 512), layer(512, 256))
    gated_input.choose(layer(512, 384), layer(384, 512))  # which it is not for
    assert kernels_of(card, 8) == ONE
    assert list(gated_input._chosen) == [512]


def test_a_card_without_room_for_a_cluster_keeps_three_kernels(
    card: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Tensor:
        raise RuntimeError("cuLaunchKernelEx: CUDA_ERROR_INVALID_CLUSTER_SIZE")

    said: list[str] = []
    monkeypatch.setattr(gated_input, "gated", fails)
    monkeypatch.setattr(gated_input.logger, "info", lambda text, *values: said.append(text % values))
    gated_input.choose(layer(256, 512), layer(512, 256))
    assert [kernels_of(card, rows) for rows in (1, 128)] == [THREE, THREE]
    assert said == [
        "NVFP4 GEMM 512x256, per-layer input was not measured: cuLaunchKernelEx: CUDA_ERROR_INVALID_CLUSTER_SIZE"
    ]


@pytest.mark.parametrize(
    ("prefix", "model", "registered", "wanted"),
    [
        ("draft_model", GEMMA4, True, 1),
        ("", GEMMA4, True, 0),  # the target's graph
        ("draft_model", LLAMA, True, 0),
        ("draft_model", GEMMA4, False, 0),  # no layer took the kernel, or the card has no clusters
    ],
)
def test_a_drafters_graph_is_fused_before_it_is_compiled(
    monkeypatch: pytest.MonkeyPatch, prefix: str, model: Any, registered: bool, wanted: int
) -> None:
    gated_input.register_operator()
    if not registered:
        monkeypatch.setattr(gated_input, "OPERATOR", "unknown")
    fused: list[fx.Graph] = []

    def fuse(graph: fx.Graph) -> int:
        fused.append(graph)
        return 1

    monkeypatch.setattr(gated_input, "fuse", fuse)
    graph = fx.GraphModule(torch.nn.Module(), fx.Graph())
    backend = SimpleNamespace(prefix=prefix, vllm_config=SimpleNamespace(model_config=model))
    compiled = small_batch_layers.compiled(lambda _, graph, inputs: (graph, inputs))
    assert compiled(backend, graph, [1]) == (graph, [1])
    assert len(fused) == wanted


@pytest.mark.parametrize(("codes", "clusters", "wanted"), [(True, True, 1), (True, False, 0), (False, True, 0)])
def test_the_operator_exists_once_such_a_layer_is_loaded(
    monkeypatch: pytest.MonkeyPatch, codes: bool, clusters: bool, wanted: int
) -> None:
    registered: list[int] = []
    chosen: list[tuple[Any, Any]] = []
    monkeypatch.setattr(gated_input, "available", lambda: clusters)
    monkeypatch.setattr(gated_input, "register_operator", lambda: registered.append(1))
    monkeypatch.setattr(gated_input, "choose", lambda gate, projection: chosen.append((gate, projection)))
    one = SimpleNamespace(rows_codes=torch.empty(1) if codes else None)
    made: Any = SimpleNamespace(per_layer_input_gate=one, per_layer_projection=one)
    small_batch_layers._prepare_per_layer_input(made)
    none: Any = SimpleNamespace(per_layer_input_gate=None, per_layer_projection=None)
    small_batch_layers._prepare_per_layer_input(none)
    assert len(registered) == wanted
    assert chosen == [(one, one)] * wanted
