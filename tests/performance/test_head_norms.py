"""One operator between a Gemma 4 layer's qkv_proj and attention; its kernel: ``tests/kernels/test_head_norms.py``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import vllm_gemma4_spec
from tests.support import engine as _engine  # sets the environment
from tests.support import tiny_models
from tests.support.configs import LLAMA_JSON
from tests.support.head_cases import exactly
from tests.support.stock import without
from vllm_gemma4_spec import scope
from vllm_gemma4_spec.kernels import head_norms as kernel
from vllm_gemma4_spec.performance import compile_settings, head_norms
from vllm_gemma4_spec.performance.patches import HEAD_NORMS

assert _engine

Q_HEADS, KV_HEADS, SIZE, HIDDEN = 4, 2, 64, 32


@pytest.fixture(autouse=True)
def patched() -> Iterator[None]:
    from vllm.config import VllmConfig, set_current_vllm_config

    vllm_gemma4_spec.apply()
    with set_current_vllm_config(VllmConfig()):
        yield


def attention_layer(shared: bool = False, dtype: torch.dtype = torch.bfloat16) -> Any:
    """What ``Gemma4Attention.forward`` reads of a layer, with vLLM's own norms and rotary embedding."""
    from vllm.model_executor.layers.layernorm import RMSNorm
    from vllm.model_executor.layers.rotary_embedding.gemma4_rope import Gemma4RotaryEmbedding

    torch.manual_seed(0)
    projections = [
        torch.randn(n, k, dtype=dtype) for n, k in (((Q_HEADS + 2 * KV_HEADS) * SIZE, HIDDEN), (3, Q_HEADS * SIZE))
    ]
    seen: list[tuple[Tensor, ...]] = []

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append((q, k, v))
        return q + k.repeat(1, 2) + v.repeat(1, 2)

    norms = {name: RMSNorm(SIZE, eps=1e-6, dtype=dtype) for name in ("q_norm", "k_norm")}
    for norm in norms.values():
        norm.weight.data.normal_()
    return SimpleNamespace(
        qkv_proj=lambda x: (x @ projections[0].T, None),
        o_proj=lambda x: (x @ projections[1].T, None),
        attn=attention,
        seen=seen,
        rotary_emb=Gemma4RotaryEmbedding(SIZE, SIZE // 2, 128, 10_000.0, True, dtype),
        v_norm=RMSNorm(SIZE, eps=1e-6, has_weight=False),
        num_heads=Q_HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=SIZE,
        q_size=Q_HEADS * SIZE,
        kv_size=KV_HEADS * SIZE,
        is_kv_shared_layer=shared,
        **norms,
    )


def operator_in_pytorch(monkeypatch: pytest.MonkeyPatch, compiles: bool = True) -> list[dict[str, Any]]:
    """What the operator is called with from now on."""
    calls: list[dict[str, Any]] = []
    names = ("qkv", "positions", "cos_sin", "q_weight", "k_weight", "q_heads", "kv_heads", "eps")

    def operator(*args: Any) -> Tensor:
        of = dict(zip(names, args, strict=True))
        calls.append(of)
        wide = (of["q_heads"] + 2 * of["kv_heads"]) * len(of["q_weight"])
        return exactly({**of, "qkv": of["qkv"][:, :wide]}).to(of["qkv"].dtype)

    monkeypatch.setattr(torch.ops.vllm, kernel.OPERATOR, operator, raising=False)
    monkeypatch.setattr(kernel, "available", lambda *_: compiles)
    return calls


def run(
    monkeypatch: pytest.MonkeyPatch, layer: Any, marked: bool = True, compiles: bool = True
) -> list[dict[str, Any]]:
    """What the operator is called with while the layer, built and run by vLLM's patched methods, sees three tokens."""
    from vllm.model_executor.models.gemma4 import Gemma4Attention

    calls = operator_in_pytorch(monkeypatch, compiles)
    built: list[str] = []
    monkeypatch.setattr(kernel, "register_operator", lambda: built.append("operator"))
    config = SimpleNamespace(additional_config={head_norms.MARK: True} if marked else {})
    monkeypatch.setattr(scope, "current_config", lambda: config)
    head_norms.attention_init(lambda *_: built.append("layer"))(layer)
    assert built == (["layer", "operator"] if hasattr(layer, head_norms.OURS) else ["layer"])
    hidden = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(1)).to(layer.q_norm.weight.dtype)
    layer.found = Gemma4Attention.forward(layer, torch.tensor([5, 0, 99]), hidden)
    return calls


@pytest.mark.parametrize("shared", [False, True])
def test_one_operator_norms_heads(monkeypatch: pytest.MonkeyPatch, shared: bool) -> None:
    """Attention gets what vLLM's functions give it, but for their roundings; raw keys where another layer's count."""
    ours, stock = attention_layer(shared), attention_layer(shared)
    assert len(run(monkeypatch, ours)) == 1
    assert run(monkeypatch, stock, marked=False) == []
    for mine, theirs in zip(ours.seen[0], stock.seen[0], strict=True):
        assert mine.shape == theirs.shape
        torch.testing.assert_close(mine, theirs, rtol=0.02, atol=0.05)
    if shared:
        assert torch.equal(torch.cat(ours.seen[0][1:]), torch.cat(stock.seen[0][1:]))
    torch.testing.assert_close(ours.found, stock.found, rtol=0.05, atol=1.0)


def test_stock_norms_heads_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with without(HEAD_NORMS):
        assert len(run(monkeypatch, attention_layer())) == 0


@pytest.mark.parametrize("shared", [False, True])
def test_the_compiler_sees_one_operator(shared: bool) -> None:
    """Of any number of tokens, without a break in the graph."""
    from vllm.model_executor.models.gemma4 import Gemma4Attention

    kernel.register_operator()
    layer, graphs = torch.nn.Module(), []
    for name, value in vars(attention_layer(shared)).items():
        setattr(layer, name, value)
    layer.attn = lambda q, k, v: q + k.repeat(1, 2) + v.repeat(1, 2)
    setattr(layer, head_norms.OURS, True)

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph.graph)
        return lambda *_: (torch.zeros(5, 3),)

    compiled = torch.compile(
        lambda positions, hidden: Gemma4Attention.forward(layer, positions, hidden), backend=backend, fullgraph=True
    )
    hidden = torch.zeros(5, HIDDEN, dtype=torch.bfloat16)
    for given in (positions := torch.arange(5), hidden):
        torch._dynamo.mark_dynamic(given, 0)
    with torch.inference_mode():
        compiled(positions, hidden)
    (graph,) = graphs
    called = [str(node.target) for node in graph.nodes if node.op.startswith("call")]
    assert sum(kernel.OPERATOR in name for name in called) == 1
    assert not any("rsqrt" in name or "mean" in name for name in called)


def test_a_card_that_it_does_not_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here: none at all."""
    said: list[str] = []
    monkeypatch.setattr(kernel.logger, "info", lambda text, *values: said.append(text % values))
    kernel.available.cache_clear()
    assert not kernel.available(4, 2, 64)
    assert not kernel.available(4, 2, 64)
    assert len(said) == 1
    assert said[0].startswith("Heads of 64 stay vLLM's")


def test_a_layer_without_it_has_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph of a start on which the kernel did not compile is not that of one on which it did."""
    run(monkeypatch, attention_layer())
    marked = scope.current_config().additional_config[head_norms.MARK]
    run(monkeypatch, attention_layer(), compiles=False)
    assert scope.current_config().additional_config[head_norms.MARK] not in (marked, None)
    layer = attention_layer()
    interleaved(layer)
    run(monkeypatch, layer)
    assert scope.current_config().additional_config[head_norms.MARK] == "True, not (4, 2, 64)"


def half_turned(layer: Any) -> None:
    layer.rotary_emb.rotary_dim //= 2


def interleaved(layer: Any) -> None:
    layer.rotary_emb.is_neox_style = False


def own_epsilon(layer: Any) -> None:
    layer.k_norm.variance_epsilon = 1e-5


def weighted_values(layer: Any) -> None:
    layer.v_norm.has_weight = True


def odd_size(layer: Any) -> None:
    layer.head_dim = 96


def several_positions(layer: Any) -> None:
    from vllm.model_executor.layers.rotary_embedding.mrope import MRotaryEmbedding

    layer.rotary_emb = MRotaryEmbedding(SIZE, SIZE, 128, 10_000.0, True, torch.bfloat16, mrope_section=[16, 8, 8])


def of_another_kind(layer: Any) -> None:
    layer.rotary_emb = SimpleNamespace()


@pytest.mark.parametrize(
    "change",
    [half_turned, interleaved, own_epsilon, weighted_values, odd_size, several_positions, of_another_kind],
)
def test_a_layer_that_does_something_else_stays_vllms(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    layer = attention_layer()
    assert head_norms.suits(layer)
    change(layer)
    assert not head_norms.suits(layer)


def test_float32_stays_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, attention_layer(dtype=torch.float32)) == []


def test_a_kernel_that_does_not_compile_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, attention_layer(), compiles=False) == []


def finished(folder: Path, dtype: str = "bfloat16") -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=str(folder), dtype=dtype, skip_tokenizer_init=True, max_model_len=64).create_engine_config()


@pytest.mark.parametrize(
    ("dtype", "card", "marked"), [("bfloat16", True, True), ("float32", True, False), ("bfloat16", False, False)]
)
def test_the_mark_is_in_the_key_of_compiled_graphs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: str, card: bool, marked: bool
) -> None:
    tiny_models.save(tiny_models.target_config(), tmp_path)
    monkeypatch.setattr(compile_settings, "card_takes_pdl", lambda: card)
    mine = finished(tmp_path, dtype)
    with without(HEAD_NORMS):
        stock = finished(tmp_path, dtype)
    assert (head_norms.MARK in mine.additional_config) == marked
    assert head_norms.MARK not in stock.additional_config
    assert (mine.compute_hash() != stock.compute_hash()) == marked


def test_another_model_has_no_mark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compile_settings, "card_takes_pdl", lambda: True)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_JSON))
    assert head_norms.MARK not in finished(tmp_path).additional_config


@pytest.mark.parametrize("config", [tiny_models.target_config, tiny_models.drafter_config], ids=["31B", "E4B"])
def test_an_engine_answers_as_with_vllms_functions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: Any
) -> None:
    """In float32 and on a CPU, where the operator is PyTorch's: sliding and full layers, and those that share keys."""
    from vllm import SamplingParams

    calls = operator_in_pytorch(monkeypatch)
    monkeypatch.setattr(kernel, "register_operator", lambda: None)
    monkeypatch.setattr(head_norms, "suits", lambda _: True)
    tiny_models.save(config(), tmp_path)
    prompts = [{"prompt_token_ids": [(7 * i + j) % 400 + 3 for i in range(40)]} for j in range(3)]
    params = SamplingParams(max_tokens=8, temperature=0, logprobs=4, ignore_eos=True)
    found = []
    for marked in (False, True):
        monkeypatch.setattr(compile_settings, "marked", lambda *_, marked=marked: marked)
        with _engine.engine(tmp_path, max_logprobs=4) as llm:
            outputs = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
        assert bool(calls) == marked
        found.append([(o.token_ids, [lp.logprob for at in o.logprobs for lp in at.values()]) for o in outputs])
    for (tokens, logprobs), (ours, ours_too) in zip(*found, strict=True):
        assert tokens == ours
        assert logprobs == pytest.approx(ours_too, abs=1e-4)
    assert (0 in [of["kv_heads"] for of in calls]) == (config is tiny_models.drafter_config)
