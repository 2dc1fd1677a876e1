"""Which layers take the small-batch kernel, and where pre_quant_scale is multiplied."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.configs import LLAMA, vllm_config
from vllm_gemma4_spec import scope
from vllm_gemma4_spec.kernels import small_batch_gemm
from vllm_gemma4_spec.quantization import small_batch_layers

SETTING = "VLLM_GEMMA4_SPEC_SCALE_IN_PRODUCT"


def loaded(name: str, scale: bool = True, low_rank: bool = False) -> Any:
    """A linear layer whose weights have been loaded, with what ``prepare`` reads and writes."""
    layer = torch.nn.Module()
    layer.prefix = f"model.layers.0.self_attn.{name}"
    layer.register_parameter("pre_quant_scale", None)
    if scale:
        layer.pre_quant_scale = torch.nn.Parameter(torch.full((4,), 3.0))
    layer.weight = torch.nn.Parameter(torch.ones(1))
    layer.svdquant_lora_a = torch.ones(2, 4) if low_rank else None
    layer.register_parameter("rows_codes", None)
    layer.rows_scaled = False
    return layer


@pytest.fixture(autouse=True)
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Layers that got a second copy: whether their GEMM multiplies by the scale."""
    found: list[bool] = []
    parts = (torch.ones(1),) * 3
    monkeypatch.setattr(small_batch_gemm, "suits", lambda _: True)
    monkeypatch.setattr(small_batch_gemm, "prepare", lambda layer: found.append(layer.rows_scaled) or parts)
    return found


@pytest.mark.parametrize(
    ("name", "scale", "low_rank", "scaled"),
    [
        ("o_proj", True, False, True),
        ("o_proj", False, False, False),
        ("o_proj", True, True, False),  # the low-rank branch reads the scaled input, too
        ("down_proj", True, False, False),  # torch.compile fuses it with the activation
    ],
)
def test_a_drafters_layers_all_take_it(
    prepared: list[bool], name: str, scale: bool, low_rank: bool, scaled: bool
) -> None:
    with small_batch_layers._drafter():
        small_batch_layers.prepare(loaded(name, scale, low_rank))
    assert prepared == [scaled]


@pytest.mark.parametrize(("value", "name", "copies"), [("0", "o_proj", 0), ("1", "o_proj", 1), ("1", "down_proj", 0)])
def test_a_targets_on_request(
    prepared: list[bool], monkeypatch: pytest.MonkeyPatch, value: str, name: str, copies: int
) -> None:
    monkeypatch.setattr(scope, "current_config", vllm_config)
    monkeypatch.setenv(SETTING, value)
    small_batch_layers.prepare(loaded(name))
    assert prepared == [True] * copies


@pytest.mark.parametrize("value", ["1", "auto"])
def test_a_targets_layers_add_up_alike_in_all_batches_if_told_to(
    prepared: list[bool], monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    """Of a drafter nobody asks it: drafts change no answer."""
    monkeypatch.setattr(scope, "current_config", vllm_config)
    monkeypatch.setenv(SETTING, value)
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    small_batch_layers.prepare(loaded("o_proj"))
    assert prepared == []
    with small_batch_layers._drafter():
        small_batch_layers.prepare(loaded("o_proj"))
    assert prepared == [True]


def test_another_models_layers_keep_their_kernel(prepared: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scope, "current_config", lambda: vllm_config(LLAMA, LLAMA))
    monkeypatch.setenv(SETTING, "1")
    small_batch_layers.prepare(loaded("o_proj"))
    assert prepared == []


def test_weights_that_are_loaded_again_are_treated_as_the_first_were(
    prepared: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is current then: the drafter's layers are not being loaded any more, the config may be unknown."""
    layer = loaded("down_proj")
    with small_batch_layers._drafter():
        small_batch_layers.prepare(layer)
    layer.rows_gelu = True  # fused since
    small_batch_layers.prepare(layer)
    assert prepared == [False, False]
    assert layer.rows_gelu


@pytest.mark.parametrize(
    ("device", "gib", "name", "copies"),
    [("cuda", 80, "o_proj", 1), ("cuda", 48, "o_proj", 0), ("cuda", 80, "down_proj", 0), ("cpu", 80, "o_proj", 0)],
)
def test_a_targets_where_the_card_has_room(
    prepared: list[bool], monkeypatch: pytest.MonkeyPatch, device: str, gib: int, name: str, copies: int
) -> None:
    monkeypatch.setattr(scope, "current_config", vllm_config)
    monkeypatch.delenv(SETTING, raising=False)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=gib * 2**30 - 2**28)
    )
    layer = loaded(name)
    del layer.weight
    layer.weight = SimpleNamespace(device=torch.device(device))
    small_batch_layers.prepare(layer)
    assert prepared == [True] * copies


@pytest.mark.parametrize("scaled", [False, True])
def test_the_scale_is_multiplied_once(monkeypatch: pytest.MonkeyPatch, scaled: bool) -> None:
    from vllm_gemma4_spec.quantization.linear import Nvfp4LinearMethod

    layer = loaded("o_proj")
    layer.rows_codes, layer.rows_scaled = torch.nn.Parameter(torch.ones(1)), scaled
    layer.stream_scaled, layer.stream_branch, layer.streamed = False, False, 0
    layer.stream_gelu = False
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(small_batch_layers, "linear", lambda _, x: seen.append(x) or x)
    method = SimpleNamespace(backend=None)
    Nvfp4LinearMethod.apply(method, layer, torch.ones(2, 4))  # type: ignore[arg-type]
    assert torch.equal(seen[0], torch.full((2, 4), 1.0 if scaled else 3.0))


@pytest.mark.parametrize("copied", [True, False])
def test_an_activation_is_fused_where_the_kernel_has_it(monkeypatch: pytest.MonkeyPatch, copied: bool) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(small_batch_gemm, "choose", lambda _, gelu: asked.append(gelu))
    layer = loaded("gate_up_proj")
    layer.rows_gelu = False
    if copied:
        with small_batch_layers._drafter():
            small_batch_layers.prepare(layer)
    small_batch_layers.choose(layer)
    mlp = torch.nn.Module()
    mlp.gate_up_proj, mlp.act_fn = layer, torch.nn.ReLU()
    small_batch_layers._fuse_activation(mlp)
    assert isinstance(mlp.act_fn, torch.nn.Identity) is copied
    assert asked == [False, True] * copied  # measured anew: the others need an activation beside them


def test_more_rows_go_to_marlin_with_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.quantization.utils import marlin_utils_fp4

    given: list[torch.Tensor] = []
    monkeypatch.setattr(
        marlin_utils_fp4, "apply_fp4_marlin_linear", lambda x, *_: given.append(x) or torch.zeros(len(x), 8)
    )
    x, nothing = torch.ones(129, 4), torch.ones(1)
    y = small_batch_gemm.linear(x, torch.full((4,), 3.0), *[nothing] * 7, 0, 8, False)
    assert y.shape == (129, 8)
    assert torch.equal(given[0], torch.full((129, 4), 3.0))
    assert small_batch_gemm._output_shape(x, None, *[nothing] * 7, 0, 8, False).shape == (129, 8)
    assert small_batch_gemm._output_shape(x, None, *[nothing] * 7, 0, 8, True).shape == (129, 4)
