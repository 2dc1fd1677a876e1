"""An all-reduce and the norms behind it, in the graphs that vLLM compiles of Gemma 4's own layers for two ranks.

What the kernel is worth takes two GPUs: ``benchmarks/all_reduce.py``.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.fx_passes.post_grad import post_grad_passes
from vllm import platforms
from vllm.compilation.backends import VllmBackend
from vllm.compilation.passes import fusion, pass_manager
from vllm.compilation.passes.inductor_pass import pass_context
from vllm.compilation.passes.pass_manager import PostGradPassManager
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.compilation import PassConfig
from vllm.config.utils import Range
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    get_tp_group,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.model_executor.layers.linear import LinearBase, RowParallelLinear
from vllm.model_executor.models.gemma4 import Gemma4DecoderLayer
from vllm.utils import torch_utils

from tests.support import engine as _engine  # sets the environment
from tests.support import tiny_models
from tests.support.configs import LLAMA_JSON, on_two_ranks
from tests.support.stock import without
from vllm_gemma4_spec.performance.fused_all_reduce import MARK
from vllm_gemma4_spec.performance.patches import FUSED_ALL_REDUCE

assert _engine
pytestmark = pytest.mark.usefixtures("inductor", "hopper", "linked")


@pytest.fixture
def linked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cards that read each other's memory."""
    monkeypatch.setattr(type(platforms.current_platform), "use_custom_allreduce", lambda *_: True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("models")
    configs = {"31B": tiny_models.target_config(), "E4B": tiny_models.drafter_config()}
    return {name: tiny_models.save(config, made / name) for name, config in configs.items()}


@pytest.fixture
def second_rank(tmp_path: Path) -> Iterator[Callable[[], None]]:
    """Gives the group of this one process a second rank, after the layers are made; both have the same parts."""
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{tmp_path}/store", 0, "gloo")
        initialize_model_parallel(1)
    group = get_tp_group()

    def join() -> None:
        group.world_size, group.use_custom_op_call = 2, True
        group._all_reduce_out_place = lambda x: 2 * x  # type: ignore[method-assign]

    yield join
    group.world_size = 1
    cleanup_dist_env_and_memory()


class Core(torch.nn.Module):
    """In the place of attention, at which vLLM cuts the graph."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q + k.repeat(1, q.shape[1] // k.shape[1]) + v.repeat(1, q.shape[1] // v.shape[1])


def layers_of(config: Any, count: int) -> torch.nn.ModuleList:
    hf = config.model_config.hf_text_config
    torch.manual_seed(0)
    with set_current_vllm_config(config), torch.device("cpu"):
        previous = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            layers = [
                Gemma4DecoderLayer(hf, config.cache_config, None, f"model.layers.{i}.self_attn") for i in range(count)
            ]
        finally:
            torch.set_default_dtype(previous)
    for layer in layers:
        layer.self_attn.attn = Core()
        layer.layer_scalar.fill_(0.75)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        for module in layer.modules():
            if isinstance(module, RowParallelLinear):
                module.tp_size = 2
            if isinstance(module, LinearBase):  # what the CPU platform does once weights are loaded
                module.cpu_linear = torch.nn.functional.linear
    return torch.nn.ModuleList(layers)


class Compiled:
    """What vLLM's passes make of two layers, for two ranks."""

    def __init__(self, config: Any, second_rank: Callable[[], None]) -> None:
        layers = layers_of(config, 2)
        second_rank()
        VllmBackend(config)  # vLLM has one before it configures passes
        manager, graphs = PostGradPassManager(), []
        manager.configure(config)

        def passes(graph: fx.Graph) -> None:
            with pass_context(Range(1, 100)):
                manager(graph)
            graphs.append(graph)

        def without_kernels(made: fx.GraphModule, inputs: Any, **_: Any) -> Any:
            """Inductor up to the last pass; what it would write kernels of is run as it stands."""
            with inductor_config.patch(post_grad_custom_post_pass=passes):
                post_grad_passes(made, is_inference=True)
            return make_boxed_func(made.forward)

        hf = config.model_config.hf_text_config
        x = torch.randn(5, hf.hidden_size, dtype=torch.bfloat16)
        width = hf.hidden_size_per_layer_input
        ple = torch.randn(5, width, dtype=torch.bfloat16) if width else None
        positions = torch.arange(5)

        def model(x: Tensor) -> Tensor:
            for layer in layers:
                x, _ = layer(positions, x, None, per_layer_input=ple)
            return x

        torch._dynamo.reset()
        with torch.no_grad(), set_current_vllm_config(config):
            self.eager = model(x)
            backend = functools.partial(compile_fx, inner_compile=without_kernels)
            self.compiled = torch.compile(model, dynamic=False, fullgraph=True, backend=backend)(x)
        self.names = names = [str(node.target) for node in graphs[0].nodes if node.op == "call_function"]
        self.all_reduces = names.count("vllm.all_reduce.default")
        self.fused = names.count("vllm.gemma4_spec_all_reduce_norm.default")
        self.norms = names.count("aten.rsqrt.default")


@pytest.mark.parametrize("model", ["31B", "E4B"])
def test_an_all_reduce_takes_the_norms_behind_it(
    model: str, folders: dict[str, Path], second_rank: Callable[[], None]
) -> None:
    made = Compiled(on_two_ranks(folders[model]), second_rank)
    assert (made.all_reduces, made.fused) == (0, 4), "all_reduce"
    torch.testing.assert_close(made.compiled, made.eager, atol=0.1, rtol=0.05)


def test_stock_leaves_two_norms_behind_an_all_reduce(folders: dict[str, Path], second_rank: Callable[[], None]) -> None:
    with without(FUSED_ALL_REDUCE):
        made = Compiled(on_two_ranks(folders["31B"]), second_rank)
    assert (made.all_reduces, made.fused) == (4, 0)


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """vLLM's fusion as it is where FlashInfer is installed, whose kernel PyTorch stands for."""

    def fused(**given: Any) -> None:
        total = 2 * given["input"] + given["residual_in"]
        values = total.float()
        normed = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + given["rms_eps"])
        given["norm_out"].copy_(normed.to(total.dtype) * given["rms_gamma"])
        given["residual_out"].copy_(total)

    package, comm = (types.ModuleType(name) for name in ("flashinfer", "flashinfer.comm"))
    package.__spec__ = importlib.machinery.ModuleSpec("flashinfer", None, is_package=True)
    pattern = SimpleNamespace(kARResidualRMSNorm=1, kARResidualRMSNormFP8Quant=2, kARResidualRMSNormFP4Quant=3)
    layout = SimpleNamespace(SWIZZLED_128x4=0)
    own = {"AllReduceFusionPattern": pattern, "QuantizationSFLayout": layout, "allreduce_fusion": fused}
    vars(comm).update(own, create_allreduce_fusion_workspace=None)
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    monkeypatch.setitem(sys.modules, "flashinfer.comm", comm)
    package.comm = comm  # type: ignore[attr-defined]
    with torch.library._scoped_library("vllm", "FRAGMENT") as library:
        monkeypatch.setattr(torch_utils, "vllm_lib", library)  # its operator goes again
        name = "vllm.compilation.passes.fusion.with_flashinfer"
        spec = importlib.util.spec_from_file_location(name, Path(fusion.__file__).with_name("allreduce_rms_fusion.py"))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        workspace = SimpleNamespace(backend="trtllm")
        for made in ("get_fi_ar_workspace", "get_fi_ar_quant_workspace"):
            monkeypatch.setattr(module, made, lambda **_: workspace)
        monkeypatch.setattr(pass_manager, "AllReduceFusionPass", module.AllReduceFusionPass, raising=False)
        monkeypatch.setattr(PassConfig, "flashinfer_max_size", lambda *_: 2**26)
        # What follows in vLLM names operators of its CUDA build.
        monkeypatch.setattr(pass_manager.FixFunctionalizationPass, "__call__", lambda *_: None)
        yield


@pytest.mark.usefixtures("flashinfer")
def test_flashinfers_fusion_takes_one_norm_and_fills_a_residual(
    folders: dict[str, Path], second_rank: Callable[[], None]
) -> None:
    with without(FUSED_ALL_REDUCE):
        config = on_two_ranks(folders["31B"])
        config.compilation_config.pass_config.fuse_allreduce_rms = True
        made = Compiled(config, second_rank)
    assert (made.all_reduces, made.fused) == (0, 0)
    assert made.norms == 6 + 4  # three of each layer's attention, and those in front of attention and MLP
    assert made.names.count("aten.full.default") == 4
    torch.testing.assert_close(made.compiled, made.eager, atol=0.1, rtol=0.05)


@pytest.mark.usefixtures("flashinfer")
def test_flashinfers_fusion_gets_what_is_left(folders: dict[str, Path], second_rank: Callable[[], None]) -> None:
    config = on_two_ranks(folders["31B"])
    config.compilation_config.pass_config.fuse_allreduce_rms = True
    made = Compiled(config, second_rank)
    assert (made.all_reduces, made.fused) == (0, 4)
    assert "aten.full.default" not in made.names


def test_the_mark_is_in_the_key_of_compiled_graphs(folders: dict[str, Path]) -> None:
    marked = on_two_ranks(folders["31B"])
    with without(FUSED_ALL_REDUCE):
        stock = on_two_ranks(folders["31B"])
    assert MARK in marked.additional_config
    assert MARK not in stock.additional_config
    assert marked.compute_hash() != stock.compute_hash()


@pytest.mark.parametrize(
    "own", [{"tensor_parallel_size": 1, "distributed_executor_backend": None}, {"disable_custom_all_reduce": True}]
)
def test_others_have_no_mark(folders: dict[str, Path], own: dict[str, Any]) -> None:
    assert MARK not in on_two_ranks(folders["31B"], **own).additional_config


def test_another_model_has_no_mark(tmp_path: Path) -> None:
    model = tmp_path / "llama"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(LLAMA_JSON))
    assert MARK not in on_two_ranks(model).additional_config
