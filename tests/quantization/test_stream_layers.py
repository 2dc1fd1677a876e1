"""Which layers give the activation behind them themselves, and that everything around them knows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.configs import LLAMA, vllm_config
from vllm_gemma4_spec import scope
from vllm_gemma4_spec.kernels import stream_gemm
from vllm_gemma4_spec.quantization import compile_key, nan_scales, small_batch_layers, stream_layers

ALONE, FUSED = 0b0111, 0b1111  # forms that take their batches without and with the activation


class Gemma4MLP(torch.nn.Module):
    """As vLLM's, loaded, its gate and up projection streaming."""

    def __init__(self, n: int = 1024, **other: Any) -> None:
        super().__init__()
        layer: Any = torch.nn.Module()
        layer.prefix = "model.layers.0.mlp.gate_up_proj"
        layer.output_size_per_partition, layer.input_size_per_partition = n, 64
        layer.weight = SimpleNamespace(is_cuda=True, device=torch.device("cuda"))
        layer.rows_codes = layer.svdquant_lora_a = layer.pre_quant_scale = None
        layer.streamed, layer.stream_wanted = ALONE, True
        layer.stream_scaled = layer.stream_branch = layer.stream_gelu = False
        layer.modelopt_checked, layer.modelopt_additional = True, scope.current_config().additional_config
        for name, value in other.items():
            setattr(layer, name, value)
        self.gate_up_proj, self.act_fn, self.down_proj = layer, torch.nn.ReLU(), torch.nn.Module()


class Gemma4VisionMLP(Gemma4MLP):
    pass


@pytest.fixture(autouse=True)
def config(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The current one."""
    made = vllm_config(additional_config={}, lora_config=None)
    monkeypatch.setattr(scope, "current_config", lambda: made)
    monkeypatch.setattr(stream_gemm, "gelu_available", lambda: True)
    monkeypatch.setattr(stream_gemm, "reserve", lambda *_, **__: None)
    monkeypatch.setattr(stream_gemm, "faster", lambda _, gelu=False: FUSED if gelu else ALONE)
    monkeypatch.setattr(nan_scales, "report", lambda _: None)
    return made


def load(model: torch.nn.Module) -> None:
    """As vLLM does when all weights are there."""
    nan_scales.reported(lambda *_: None)(model, None, None)


def fused(mlp: Any) -> bool:
    flags = {isinstance(mlp.act_fn, torch.nn.Identity), mlp.gate_up_proj.stream_gelu}
    assert len(flags) == 1  # never both activations, never none
    return flags.pop()


def test_a_targets_gate_and_up_give_the_activation(config: Any) -> None:
    model: Any = torch.nn.Module()
    model.layers = torch.nn.ModuleList([Gemma4MLP(), Gemma4MLP()])
    load(model)
    assert all(fused(mlp) and mlp.gate_up_proj.streamed == FUSED for mlp in model.layers)
    assert list(config.additional_config) == [compile_key._KEY]


@pytest.mark.parametrize(
    ("kind", "other"),
    [
        (Gemma4MLP, {"streamed": 0}),
        (Gemma4MLP, {"n": 4224}),  # 26B-A4B's dense MLP
        (Gemma4MLP, {"svdquant_lora_a": torch.ones(1)}),
        (Gemma4MLP, {"stream_scaled": True}),
        (Gemma4MLP, {"rows_codes": torch.ones(1)}),
        (Gemma4MLP, {"weight": SimpleNamespace(is_cuda=False, device=torch.device("cpu"))}),
        (Gemma4VisionMLP, {}),
    ],
    ids=["Marlin's", "narrow", "branch", "scaled inside", "copied", "offloaded", "tower"],
)
def test_others_keep_theirs(config: Any, kind: Any, other: dict[str, Any]) -> None:
    mlp = kind(**other)
    load(mlp)
    assert not fused(mlp)
    assert mlp.gate_up_proj.streamed in (0, ALONE)
    assert config.additional_config == {}


def test_a_scale_that_is_multiplied_before_changes_nothing() -> None:
    mlp = Gemma4MLP(pre_quant_scale=torch.ones(64))
    load(mlp)
    assert fused(mlp)


def test_the_activation_multiplies_by_the_next_layers_scale() -> None:
    """NVFP4_AWQ: torch.compile makes one kernel of both, which would stay for the scale alone."""
    mlp = Gemma4MLP()
    mlp.down_proj.pre_quant_scale = torch.ones(512)
    load(mlp)
    assert not fused(mlp)


def test_an_adapter_adds_before_the_activation(config: Any) -> None:
    config.lora_config = SimpleNamespace(max_loras=1)
    mlp = Gemma4MLP()
    load(mlp)
    assert not fused(mlp)


def test_another_models_layers_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    mlp = Gemma4MLP()
    monkeypatch.setattr(scope, "current_config", lambda: vllm_config(LLAMA, LLAMA))
    load(mlp)
    assert not fused(mlp)


def test_weights_of_another_format_are_left_alone() -> None:
    mlp = Gemma4MLP()
    del mlp.gate_up_proj.modelopt_checked
    load(mlp)
    assert not fused(mlp)


def test_a_drafters_graph_has_a_key_of_its_own(config: Any) -> None:
    mlp = Gemma4MLP(modelopt_additional={})  # vLLM copies a config whose parts it replaces
    load(mlp)
    assert list(mlp.gate_up_proj.modelopt_additional) == [compile_key._KEY]
    assert config.additional_config == {}


def test_a_drafters_layers_wait_for_their_own_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[tuple[bool, bool]] = []
    monkeypatch.setattr(small_batch_layers, "choose", lambda layer: chosen.append((layer.rows_gelu, layer.stream_gelu)))
    mlp = Gemma4MLP(rows_codes=torch.ones(1), rows_gelu=False)
    with small_batch_layers._drafter():
        load(mlp)
    assert not fused(mlp)
    small_batch_layers._fuse_activation(mlp)
    assert fused(mlp)
    assert chosen == [(True, True)]  # measured against larger batches as they run then


@pytest.mark.parametrize(("with_it", "taken"), [(0b0111, True), (0b1111, True), (0b0011, False), (0, False)])
def test_no_batch_streams_no_more(monkeypatch: pytest.MonkeyPatch, with_it: int, taken: bool) -> None:
    monkeypatch.setattr(stream_gemm, "faster", lambda _, gelu: with_it)
    mlp = Gemma4MLP()
    load(mlp)
    assert fused(mlp) is taken
    assert mlp.gate_up_proj.streamed == (with_it if taken else ALONE)


def test_a_kernel_that_does_not_compile_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_gemm, "gelu_available", lambda: False)
    mlp = Gemma4MLP()
    load(mlp)
    assert not fused(mlp)


def test_weights_that_are_loaded_again_keep_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    mlp = Gemma4MLP()
    layer = mlp.gate_up_proj
    load(mlp)
    layer.streamed = 0  # as its method sets it first
    stream_layers.prepare(layer)
    assert layer.streamed == FUSED
    assert fused(mlp)
    monkeypatch.setattr(stream_layers, "_branch", lambda _: False)
    other = Gemma4MLP().gate_up_proj
    stream_layers.prepare(other)
    assert other.streamed == ALONE


def test_a_fused_graph_has_a_key_of_its_own() -> None:
    keys = set()
    for words in ((), ("a",), ("a", "b"), ("b", "a")):
        additional: dict[str, Any] = {}
        for word in words:
            compile_key.add(additional, word)
        keys.add(str(additional))
    assert len(keys) == 4
    compile_key.add(None, "a")


def test_the_operator_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    operators = SimpleNamespace(gemma4_spec_stream_linear=lambda *values: given.append(values))
    monkeypatch.setattr(torch.ops, "vllm", operators)
    mlp = Gemma4MLP(weight_scale=1, weight_global_scale=1, workspace=1, svdquant_lora_b=None)
    for gelu in (False, True):
        mlp.gate_up_proj.stream_gelu = gelu
        stream_layers.linear(mlp.gate_up_proj, torch.ones(1, 64))
    assert [values[-1] for values in given] == [False, True]
