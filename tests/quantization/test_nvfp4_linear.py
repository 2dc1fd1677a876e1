"""The linear method alone, in vLLM's own layers: what is absent, what disagrees, what is NaN."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.support import engine as _engine
from vllm_gemma4_spec.checkpoints import nvfp4
from vllm_gemma4_spec.errors import CheckpointError

assert _engine

K = 64
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One rank, as a worker sets it up."""
    import vllm_gemma4_spec

    vllm_gemma4_spec.apply()
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import cleanup_dist_env_and_memory, init_distributed_environment, initialize_model_parallel

    with set_current_vllm_config(VllmConfig()):
        where = f"file://{tmp_path_factory.mktemp('world') / 'store'}"
        init_distributed_environment(1, 0, where, 0, "gloo")
        initialize_model_parallel(1, 1)
        yield
        cleanup_dist_env_and_memory()


def tensors(rows: int, seed: int = 0, lead: float = 1.0) -> Tensors:
    """An NVFP4 linear [rows, K] with a pre_quant_scale; ``lead`` scales weight_scale_2."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, K, generator=generator)
    scale_2 = torch.tensor(lead * 4.5 / 2688)
    scale = nvfp4.block_scale(weight, scale_2)
    return {
        "weight": nvfp4.encode(weight, scale, scale_2),
        "weight_scale": scale,
        "weight_scale_2": scale_2,
        "input_scale": torch.tensor(0.01),
        "pre_quant_scale": torch.rand(K, generator=torch.Generator().manual_seed(9)).add(0.5).bfloat16(),
    }


def plain(parts: Tensors) -> torch.Tensor:
    return nvfp4.dequantize(parts["weight"], parts["weight_scale"], parts["weight_scale_2"])


def make(kind: str, algorithm: str = "NVFP4_AWQ") -> Any:
    from vllm.model_executor.layers import linear

    from vllm_gemma4_spec.quantization import Nvfp4Config

    config = Nvfp4Config.from_config({"quant_algo": algorithm, "quant_method": "modelopt", "ignore": []})
    if kind == "qkv":
        return linear.QKVParallelLinear(K, 32, 2, 1, bias=False, quant_config=config, prefix="layers.0.qkv_proj")
    if kind == "merged":
        return linear.MergedColumnParallelLinear(
            K, [32, 48], bias=False, quant_config=config, prefix="layers.0.gate_up"
        )
    layer = {
        "column": linear.ColumnParallelLinear,
        "row": linear.RowParallelLinear,
        "replicated": linear.ReplicatedLinear,
    }[kind]
    return layer(K, 48, bias=False, quant_config=config, prefix=f"layers.0.{kind}")


MEMBERS: dict[str, dict[Any, int]] = {
    "qkv": {"q": 64, "k": 32, "v": 32},
    "merged": {0: 32, 1: 48},
    "column": {None: 48},
    "row": {None: 48},
    "replicated": {None: 48},
}


def load(layer: Any, parts: Tensors, shard: Any = None) -> None:
    for name, value in parts.items():
        param = getattr(layer, name)
        param.weight_loader(param, value, *([] if shard is None else [shard]))


def loaded(
    kind: str, change: Callable[[Any, Tensors], None] = lambda shard, parts: None, **made: Any
) -> tuple[Any, Any]:
    """A finished layer, and the weights [N, K] of its members as they were given."""
    layer = make(kind, **made)
    given = {}
    for seed, (shard, rows) in enumerate(MEMBERS[kind].items()):
        parts = tensors(rows, seed)
        change(shard, parts)
        given[shard] = parts
        load(layer, parts, shard)
    layer.quant_method.process_weights_after_loading(layer)
    return layer, given


def check(layer: Any, wanted: torch.Tensor, rows: slice = slice(None)) -> None:
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(layer.quant_method.apply(layer, x)[:, rows], x @ wanted.T, atol=2e-5, rtol=1e-5)


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("kind", MEMBERS)
def test_pre_quant_scale_multiplies(kind: str) -> None:
    layer, given = loaded(kind)
    scale = next(iter(given.values()))["pre_quant_scale"].float()
    check(layer, torch.cat([plain(parts) for parts in given.values()]) * scale)


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("kind", MEMBERS)
def test_an_absent_scale_is_no_parameter(kind: str) -> None:
    layer, given = loaded(kind, lambda shard, parts: parts.pop("pre_quant_scale"))
    assert layer.pre_quant_scale is None
    assert "pre_quant_scale" not in dict(layer.named_parameters())
    check(layer, torch.cat([plain(parts) for parts in given.values()]))


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("kind", ["merged", "qkv", "row"])
def test_low_rank_branch_of_any_rank(kind: str) -> None:
    """A is one for the fused group, B is stacked; the branch takes the scaled, unquantized activation."""
    a = torch.randn(5, K, generator=torch.Generator().manual_seed(8)).bfloat16()

    def add(shard: Any, parts: Tensors) -> None:
        rows = parts["weight"].shape[0]
        b = torch.randn(rows, 5, generator=torch.Generator().manual_seed(rows)).bfloat16()
        parts |= {"svdquant_lora_a": a, "svdquant_lora_b": b}

    layer, given = loaded(kind, add, algorithm="NVFP4_SVD")
    whole = [plain(p) + p["svdquant_lora_b"].float() @ a.float() for p in given.values()]
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(3))
    wanted = torch.cat(whole) * next(iter(given.values()))["pre_quant_scale"].float()
    torch.testing.assert_close(layer.quant_method.apply(layer, x), x @ wanted.T, atol=1e-4, rtol=1e-5)


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("poison", [float("inf"), float("nan"), 1e30])
def test_members_the_checkpoint_lacks_have_no_say(poison: float) -> None:
    """E4B layers that reuse KV: q alone, on memory that was never written."""
    layer = make("qkv")
    for name in ("weight_scale_2", "input_scale"):
        getattr(layer, name).data.fill_(poison)
    layer.weight.data.fill_(0x77)
    layer.weight_scale.data.view(torch.uint8).fill_(0x7F)
    parts = tensors(64)
    load(layer, parts, "q")
    layer.quant_method.process_weights_after_loading(layer)
    check(layer, plain(parts) * parts["pre_quant_scale"].float(), slice(0, 64))
    x = torch.ones(1, K)
    assert (layer.quant_method.apply(layer, x)[:, 64:] == 0).all()
    assert not hasattr(layer, "modelopt_nan")


@pytest.mark.usefixtures("world")
def test_nan_scales_are_repaired_by_the_rule() -> None:
    """Codes intact: 448 with the NaN's sign; all sixteen are 7: zero. Nothing else changes."""

    def break_three(shard: Any, parts: Tensors) -> None:
        codes = parts["weight_scale"].view(torch.uint8)
        codes[0, 1], codes[7, 3], codes[9, 0] = 0x7F, 0xFF, 0x7F
        parts["weight"][9, :8] = 0x77

    layer, given = loaded("row", break_three, algorithm="NVFP4")
    parts = given[None]
    scale = parts["weight_scale"].float()
    scale[0, 1], scale[7, 3], scale[9, 0] = 448.0, -448.0, 0.0
    wanted = nvfp4.dequantize(parts["weight"], scale.to(torch.float8_e4m3fn), parts["weight_scale_2"])
    check(layer, wanted * parts["pre_quant_scale"].float())
    assert layer.modelopt_nan == {"layers.0.row": (3, 1)}


@pytest.mark.usefixtures("world")
def test_one_summary_line_and_the_strict_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_gemma4_spec.quantization import nan_scales

    def break_one(shard: Any, parts: Tensors) -> None:
        parts["weight_scale"].view(torch.uint8)[0, 0] = 0x7F

    def model() -> torch.nn.ModuleList:
        return torch.nn.ModuleList([loaded("row", break_one)[0], loaded("column")[0]])

    lines: list[str] = []
    monkeypatch.setattr(nan_scales.logger, "warning", lambda text, *values: lines.append(text % values))
    once = model()
    nan_scales.reported(lambda model: None)(once)
    nan_scales.report(once)  # weights were loaded again, and nothing was repaired
    assert len(lines) == 1
    assert "1 NaN block scales in 1 NVFP4 layers (layers.0.row): 1 set to 448" in lines[0]
    monkeypatch.setenv("VLLM_GEMMA4_SPEC_NAN_SCALES", "strict")
    with pytest.raises(CheckpointError, match=r"1 NaN block scales in 1 NVFP4 layers \(layers.0.row\); .*repair"):
        nan_scales.reported(lambda model: None)(model())


def replaced(name: str, value: Callable[[torch.Tensor], torch.Tensor], only: Any = ...) -> Callable[..., None]:
    def change(shard: Any, parts: Tensors) -> None:
        if only is ... or shard == only:
            parts[name] = value(parts[name])

    return change


def dropped(name: str, only: Any) -> Callable[..., None]:
    return lambda shard, parts: parts.pop(name) if shard == only else None


BAD: dict[str, tuple[str, Callable[..., None], str]] = {
    "scale too short": (
        "row",
        replaced("pre_quant_scale", lambda s: s[:-1]),
        r"layers.0.row.pre_quant_scale: shape \[63\]",
    ),
    "scale of integers": (
        "row",
        replaced("pre_quant_scale", lambda s: s.int()),
        "layers.0.row.pre_quant_scale: torch.int32",
    ),
    "scale with NaN": ("row", replaced("pre_quant_scale", lambda s: s / 0 * 0), "pre_quant_scale: .* NaN or infinity"),
    "members disagree": (
        "qkv",
        replaced("pre_quant_scale", lambda s: s + 1, "k"),
        "pre_quant_scale: members 0 and 1 .* differ",
    ),
    "one member without": ("merged", dropped("pre_quant_scale", 1), r"pre_quant_scale: only members \[0\] of \[0, 1\]"),
    "global scale NaN": (
        "row",
        replaced("weight_scale_2", lambda s: s * float("nan")),
        "weight_scale_2: NaN or infinity",
    ),
    "input scale infinite": ("qkv", replaced("input_scale", lambda s: s / 0, "v"), "input_scale: NaN or infinity"),
    "global scales differ": (
        "merged",
        replaced("weight_scale_2", lambda s: s * 2, 1),
        "weight_scale_2: members 0 and 1",
    ),
    "no block scales": (
        "row",
        dropped("weight_scale", None),
        "layers.0.row.weight_scale: the checkpoint has no such tensor",
    ),
    "no weight of k": ("qkv", dropped("weight", "k"), "qkv_proj.weight: .* no such tensor of member 1"),
    "no input scale": ("column", dropped("input_scale", None), "input_scale: the checkpoint has no such tensor"),
}


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("case", BAD)
def test_bad_tensors(case: str) -> None:
    kind, change, message = BAD[case]
    with pytest.raises(CheckpointError, match=message) as caught:
        loaded(kind, change)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("world")
def test_one_low_rank_factor_without_the_other() -> None:
    def add(shard: Any, parts: Tensors) -> None:
        parts["svdquant_lora_a"] = torch.zeros(4, K).bfloat16()

    with pytest.raises(CheckpointError, match="one low-rank factor"):
        loaded("row", add, algorithm="NVFP4_SVD")


@pytest.mark.usefixtures("world")
def test_plain_nvfp4_members_may_differ() -> None:
    """Unlike a kernel with one global scale, emulation keeps each member's own."""
    layer, given = loaded("merged", replaced("weight_scale_2", lambda s: s * 2, 1), algorithm="NVFP4")
    scale = given[0]["pre_quant_scale"].float()
    check(layer, torch.cat([plain(parts) for parts in given.values()]) * scale)


@pytest.mark.usefixtures("world")
def test_the_multiplication_fuses_into_what_makes_the_activation() -> None:
    """torch.compile: gelu(gate) * up * pre_quant_scale is one kernel, as gelu(gate) * up alone is."""
    from torch._inductor.utils import run_and_get_code

    layer, _ = loaded("row")
    bare, _ = loaded("row", lambda shard, parts: parts.pop("pre_quant_scale"))

    def kernels(of: Any) -> int:
        def forward(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
            x = torch.nn.functional.gelu(gate, approximate="tanh") * up
            return of.quant_method.apply(of, x)

        torch._dynamo.reset()
        _, code = run_and_get_code(torch.compile(forward, fullgraph=True), torch.ones(2, K), torch.ones(2, K))
        return "".join(code).count("cpp_pybinding(")

    assert kernels(layer) == kernels(bare) > 0


@pytest.mark.usefixtures("world")
def test_the_compile_cache_knows_what_a_layer_has() -> None:
    """The same layer with and without its scale must not share a compiled graph."""
    from vllm.config import get_current_vllm_config

    config = get_current_vllm_config()

    def key(*change: Callable[..., None]) -> str:
        config.additional_config.clear()
        loaded("row", *change)
        return str(config.compute_hash())

    without = lambda shard, parts: parts.pop("pre_quant_scale")  # noqa: E731
    assert key() == key()
    assert key() != key(without)


@pytest.mark.usefixtures("world")
def test_weights_that_do_not_fit_stay_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from vllm_gemma4_spec.quantization import emulation

    memory = SimpleNamespace(total=100 << 30, available=20 << 30)
    monkeypatch.setattr(emulation.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    cpu = torch.device("cpu")
    assert emulation.fits(8 << 30, cpu)
    assert not emulation.fits(10 << 30, cpu)  # 20 - 10 - 1 of KV cache leaves less than a tenth of 100
    monkeypatch.setenv("VLLM_GEMMA4_SPEC_NVFP4_WEIGHTS", "dequantized")
    assert emulation.fits(10 << 30, cpu)


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("algorithm", ["NVFP4_AWQ", "NVFP4_SVD"])
def test_a_layer_is_freed_with_its_model(algorithm: str) -> None:
    """vLLM keeps what a reload needs by layer, in a table that forgets a layer once nothing else holds it."""
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

    layer = make("qkv", algorithm)
    record_metadata_for_reloading(layer)
    gone = weakref.ref(layer)
    del layer
    gc.collect()
    assert gone() is None
