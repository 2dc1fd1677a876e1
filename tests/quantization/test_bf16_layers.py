"""Which of a drafter's bfloat16 layers take the kernel for few rows, and that a drafter with it drafts the same."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.mtp import pairs
from tests.support.engine import acceptance, engine, generate, random_prompts
from vllm_gemma4_spec.kernels import bf16_gemm, chosen_rows

K = 3


def by_torch(x: Tensor, weight: Tensor, gelu: bool) -> Tensor:
    y = F.linear(x, weight)
    if not gelu:
        return y
    gate, up = y.chunk(2, -1)
    return F.gelu(gate, approximate="tanh") * up


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """The kernel stands in on a CPU, for up to two rows of any weight: rows and gelu of every call."""
    called: list[tuple[int, bool]] = []

    def gemm(x: Tensor, weight: Tensor, gelu: bool) -> Tensor:
        called.append((len(x), gelu))
        return by_torch(x, weight, gelu)

    def choose(weight: Tensor, gelu: bool) -> None:
        bf16_gemm.chosen[(*weight.shape, gelu)] = 2

    # vLLM's own way on CPUs leaves a layer no weight.
    monkeypatch.setattr(
        "vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm",
        lambda layer, remove_weight: setattr(layer, "cpu_linear", F.linear),
    )
    monkeypatch.setattr(bf16_gemm, "chosen", {})
    monkeypatch.setattr(bf16_gemm, "suits", lambda weight: True)
    monkeypatch.setattr(bf16_gemm, "choose", choose)
    monkeypatch.setattr(bf16_gemm, "gemm", gemm)
    monkeypatch.setattr(bf16_gemm, "_other", by_torch)
    return called


def test_an_assistant_with_the_kernel_drafts_the_same(tmp_path: Path, rows: list[tuple[int, bool]]) -> None:
    """In the real engine; batches of three requests are left to cuBLAS, here to torch."""
    target, assistant = pairs.save_pair("31b", tmp_path)
    prompts, limits = random_prompts([5, 40, 17]), [20, 26, 32]
    config = {"model": str(assistant), "num_speculative_tokens": K}
    found = []
    for taken in (False, True):
        with pytest.MonkeyPatch.context() as patched:
            if not taken:
                patched.setattr(bf16_gemm, "suits", lambda weight: False)
            with engine(target, speculative_config=config, max_num_seqs=4) as llm:
                before = acceptance(llm)
                found.append((generate(llm, prompts, limits), acceptance(llm) - before))
                model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.drafter.model
                methods = {
                    n: type(m.quant_method).__name__ for n, m in model.named_modules() if hasattr(m, "quant_method")
                }
        if not taken:
            assert not rows
            assert "FewRows" not in methods.values()
    assert found[0] == found[1]
    assert {count for count, _ in rows} == {1, 2}
    assert {gelu for _, gelu in rows} == {False, True}
    assert {name for name, method in methods.items() if method != "FewRows"} == {"lm_head", "model.embed_tokens"}


def linear(n: int = 32, k: int = 256, bias: bool = False) -> Any:
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

    layer = LinearBase.__new__(LinearBase)
    nn.Module.__init__(layer)
    layer.weight = nn.Parameter(torch.randn(n, k), requires_grad=False)
    layer.bias = nn.Parameter(torch.zeros(n)) if bias else None
    layer.quant_method = UnquantizedLinearMethod()
    return layer


def test_what_is_taken(rows: list[tuple[int, bool]]) -> None:
    """Layers of the compiled language model as they are: no tower's, none quantized, none with a bias."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    from vllm_gemma4_spec.quantization import bf16_layers

    class Quantized(UnquantizedLinearMethod):
        pass

    class Gemma4MLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj, self.down_proj, self.act_fn = linear(), linear(), nn.GELU()

    model, language = nn.Module(), nn.Module()
    model.tower, model.language = linear(), language
    language.vllm_config = SimpleNamespace(additional_config={"kept": 1})  # type: ignore[assignment]
    language.mlp, language.o_proj, language.biased, language.quantized = (
        Gemma4MLP(),
        linear(),
        linear(bias=True),
        linear(),
    )
    language.quantized.quant_method = Quantized()
    bf16_layers.take(model)
    taken = {
        name: module.quant_method.gelu
        for name, module in model.named_modules()
        if isinstance(getattr(module, "quant_method", None), bf16_layers.FewRows)
    }
    assert taken == {"language.mlp.gate_up_proj": True, "language.mlp.down_proj": False, "language.o_proj": False}
    assert isinstance(language.mlp.act_fn, nn.Identity)
    assert language.vllm_config.additional_config == {"kept": 1, bf16_layers.MARK: 3}
    x = torch.randn(2, 256)
    gate_up = language.mlp.gate_up_proj
    assert torch.equal(gate_up.quant_method.apply(gate_up, x), by_torch(x, gate_up.weight, True))
    assert gate_up.quant_method.apply(gate_up, torch.randn(3, 1, 256)).shape == (3, 1, 16)
    assert rows == [(2, True)], "three rows are cuBLAS's"


def test_nothing_is_said_of_a_drafter_without_such_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_gemma4_spec.quantization import bf16_layers

    model = nn.Module()
    model.vllm_config, model.o_proj = SimpleNamespace(additional_config={}), linear()  # type: ignore[assignment]
    bf16_layers.take(model)  # a CPU's weights suit no kernel
    assert model.vllm_config.additional_config == {}
    assert type(model.o_proj.quant_method).__name__ == "UnquantizedLinearMethod"


@pytest.mark.parametrize(
    ("us", "most"),
    [
        ({8: (5.0, 9.0), 16: (8.0, 9.0)}, 16),
        ({8: (5.0, 9.0), 16: (9.0, 9.0)}, 8),
        ({8: (9.1, 9.0), 16: (9.1, 9.0)}, 0),
        ({8: (9.1, 9.0), 16: (5.0, 9.0)}, 0),  # batches are taken up to a number of rows
    ],
)
def test_the_faster_one_takes_a_batch(
    us: dict[int, tuple[float, float]], most: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    times = {n: {chosen_rows.OTHER: theirs, bf16_gemm.OURS: ours} for n, (ours, theirs) in us.items()}
    monkeypatch.setattr(bf16_gemm, "chosen", {})
    monkeypatch.setattr(bf16_gemm, "_times", lambda weight, gelu: times)
    monkeypatch.setattr(chosen_rows, "path", lambda: tmp_path / "rows.json")
    monkeypatch.setattr(chosen_rows, "card", lambda: "a card")
    bf16_gemm.choose(torch.empty(64, 256), gelu=False)
    assert bf16_gemm.chosen == {(64, 256, False): most}


def test_without_memory_to_measure_cublas_keeps_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(weight: Tensor, gelu: bool) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(bf16_gemm, "chosen", {})
    monkeypatch.setattr(bf16_gemm, "_times", fails)
    monkeypatch.setattr(chosen_rows, "path", lambda: tmp_path / "rows.json")
    monkeypatch.setattr(chosen_rows, "card", lambda: "a card")
    with caplog.at_level("INFO", "vllm.plugins.gemma4_spec"):
        bf16_gemm.choose(torch.empty(64, 256), gelu=True)
    assert bf16_gemm.chosen == {}
    assert [r.getMessage() for r in caplog.records] == [
        "GEMM 64x256, bfloat16, gelu stays cuBLAS's: CUDA out of memory."
    ]


def test_ranks_take_what_all_of_them_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """One measured otherwise, or could not measure: what each computes whole would differ, and so would its draft."""
    from vllm.distributed import parallel_state

    from vllm_gemma4_spec.quantization import bf16_layers

    others = {(32, 256, False): 8, (64, 256, False): 0}
    ours = {(32, 256, False): 16, (64, 256, False): 16, (96, 256, False): 16}

    def all_gather_object(found: list[Any], mine: Any, group: str) -> None:
        assert (mine, group) == (ours, "on CPUs")
        found[:] = [others, dict(mine)]

    monkeypatch.setattr(bf16_gemm, "chosen", dict(ours))
    monkeypatch.setattr(parallel_state, "model_parallel_is_initialized", lambda: True)
    monkeypatch.setattr("vllm.distributed.get_tp_group", lambda: SimpleNamespace(world_size=2, cpu_group="on CPUs"))
    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    bf16_layers._agree()
    assert bf16_gemm.chosen == {(32, 256, False): 8, (64, 256, False): 0, (96, 256, False): 0}


def test_batch_invariance_keeps_vllms_gemms(rows: list[tuple[int, bool]], monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_gemma4_spec.quantization import bf16_layers

    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    model = nn.Module()
    model.vllm_config, model.o_proj = SimpleNamespace(additional_config={}), linear()  # type: ignore[assignment]
    bf16_layers.take(model)
    assert type(model.o_proj.quant_method).__name__ == "UnquantizedLinearMethod"
