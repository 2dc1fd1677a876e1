"""An E4B's per-layer inputs are gathered by one operator under tensor parallelism, and by vLLM's layer elsewhere.

What it is worth takes two GPUs; two ranks on a CPU run it in :mod:`tests.performance.gather_by_ranks`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx
from vllm import platforms
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.lora import LoRAConfig
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    get_tp_group,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.model_executor.models.gemma4 import Gemma4ForCausalLM

import vllm_gemma4_spec
from tests.support import engine as _engine  # sets the environment
from tests.support import fresh, tiny_models
from tests.support.configs import LLAMA_JSON, on_two_ranks
from tests.support.stock import without
from vllm_gemma4_spec.performance import per_layer_gather
from vllm_gemma4_spec.performance.patches import PER_LAYER_GATHER
from vllm_gemma4_spec.performance.per_layer_gather import MARK

assert _engine
ON_CUDA = per_layer_gather._on_cuda
OURS, STOCK = "vllm.gemma4_spec_gather_columns", "vllm.all_gather"


@pytest.fixture(autouse=True)
def linked(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVIDIA's cards, which read each other's memory."""
    vllm_gemma4_spec.apply()
    monkeypatch.setattr(per_layer_gather, "_on_cuda", lambda: True)
    monkeypatch.setattr(type(platforms.current_platform), "use_custom_allreduce", lambda *_: True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("models")
    configs = {"31B": tiny_models.target_config(), "E4B": tiny_models.drafter_config()}
    folders = {name: tiny_models.save(config, made / name) for name, config in configs.items()}
    llama = folders["llama"] = made / "llama"
    llama.mkdir()
    (llama / "config.json").write_text(json.dumps(LLAMA_JSON))
    return folders


@pytest.fixture
def two_ranks(tmp_path: Path) -> Iterator[None]:
    """One of them, and the other has the same columns."""
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{tmp_path}/store", 0, "gloo")
        initialize_model_parallel(1)
    group = get_tp_group()
    group.world_size, group.use_custom_op_call = 2, True
    group._all_gather_out_place = lambda x, dim: torch.cat([x, x], dim)  # type: ignore[method-assign]
    yield
    group.world_size = 1
    cleanup_dist_env_and_memory()


def built(config: Any) -> Any:
    torch.set_default_dtype(torch.bfloat16)
    try:
        with set_current_vllm_config(config), torch.device("cpu"):
            model = Gemma4ForCausalLM(vllm_config=config).model
    finally:
        torch.set_default_dtype(torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def gathers(model: Any) -> list[str]:
    """How the per-layer inputs are gathered, in the one graph that is traced of them."""
    names: list[str] = []

    def backend(graph: fx.GraphModule, _: Any) -> Any:
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    model.per_layer_model_projection.cpu_linear = torch.nn.functional.linear  # set once weights are loaded
    hidden = torch.randn(5, model.config.hidden_size).bfloat16()
    torch._dynamo.reset()
    with torch.no_grad():
        want = model.project_per_layer_inputs(hidden, None)
        found = torch.compile(model.self_decoder.project_per_layer_inputs, fullgraph=True, backend=backend)(
            hidden, None
        )
    assert torch.equal(found, want)
    return [name for name in names if "gather" in name]


@pytest.mark.usefixtures("two_ranks")
def test_one_operator_gathers_per_layer_inputs(folders: dict[str, Path]) -> None:
    assert gathers(built(on_two_ranks(folders["E4B"]))) == [OURS]


@pytest.mark.usefixtures("two_ranks")
def test_stock_gathers_per_layer_inputs_by_an_all_gather(folders: dict[str, Path]) -> None:
    with without(PER_LAYER_GATHER):
        assert gathers(built(on_two_ranks(folders["E4B"]))) == [STOCK]


@pytest.mark.usefixtures("two_ranks")
def test_without_a_mark_the_layer_gathers(folders: dict[str, Path]) -> None:
    assert gathers(built(on_two_ranks(folders["E4B"], disable_custom_all_reduce=True))) == [STOCK]


@pytest.mark.usefixtures("two_ranks")
def test_a_whole_drafter_has_nothing_to_gather(folders: dict[str, Path]) -> None:
    get_tp_group().world_size = 1
    layer = built(on_two_ranks(folders["E4B"])).per_layer_model_projection
    assert layer.gather_output
    assert not layer._forward_hooks


@pytest.mark.usefixtures("two_ranks")
def test_a_model_without_per_layer_inputs(folders: dict[str, Path]) -> None:
    config = on_two_ranks(folders["31B"], folders["E4B"])
    assert MARK in config.additional_config
    assert built(config).per_layer_model_projection is None


def test_two_ranks_have_the_bits_of_an_all_gather(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folders["E4B"] / "config.json").read_text())
    code = "import os; from tests.performance import gather_by_ranks; gather_by_ranks.main(os.environ['E4B'])"
    done = fresh.run_after_vllm(code, E4B=str(tmp_path))
    assert (done.returncode, done.stdout.count("equal")) == (0, 2), done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.parametrize("pair", [("E4B", None), ("31B", "E4B"), ("E4B", "E4B")])
def test_the_mark_is_in_the_key_of_compiled_graphs(folders: dict[str, Path], pair: tuple[str, str | None]) -> None:
    """In the target's too: the drafter's graphs lie in a folder named after that key."""
    target, drafter = pair
    models = folders[target], None if drafter is None else folders[drafter]
    marked = on_two_ranks(*models)
    with without(PER_LAYER_GATHER):
        stock = on_two_ranks(*models)
    assert MARK in marked.additional_config
    assert MARK not in stock.additional_config
    assert marked.compute_hash() != stock.compute_hash()


@pytest.mark.parametrize(
    ("model", "own"),
    [
        ("E4B", {"tensor_parallel_size": 1, "distributed_executor_backend": None}),
        ("E4B", {"disable_custom_all_reduce": True}),
        ("31B", {}),
        ("llama", {}),
    ],
)
def test_others_have_no_mark(folders: dict[str, Path], model: str, own: dict[str, Any]) -> None:
    assert MARK not in on_two_ranks(folders[model], **own).additional_config


def test_lora_has_no_mark(folders: dict[str, Path]) -> None:
    """Its layer in the projection's place would ask whether that gathers."""
    config = on_two_ranks(folders["E4B"], enable_lora=True)
    assert isinstance(config.lora_config, LoRAConfig)
    assert MARK not in config.additional_config


@pytest.mark.parametrize("cuda", [True, False])
def test_the_platform_is_vllms(monkeypatch: pytest.MonkeyPatch, cuda: bool) -> None:
    monkeypatch.setattr(platforms, "current_platform", SimpleNamespace(is_cuda=lambda: cuda))
    assert ON_CUDA() is cuda


def test_no_mark_off_cuda(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(per_layer_gather, "_on_cuda", lambda: False)
    assert MARK not in on_two_ranks(folders["E4B"]).additional_config
