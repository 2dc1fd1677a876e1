"""Few tokens are written into the cache by a kernel that is launched early, with vLLM's bits; the rest by vLLM's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import vllm_gemma4_spec
from tests.support.configs import GEMMA4, LLAMA, vllm_config
from tests.support.fresh import interpreted
from tests.support.stock import without
from vllm_gemma4_spec import scope
from vllm_gemma4_spec.kernels import cache_write as kernel
from vllm_gemma4_spec.performance import cache_write
from vllm_gemma4_spec.performance.cache_write import IN_SCOPE
from vllm_gemma4_spec.performance.patches import CACHE_WRITE


def test_the_cache_holds_what_vllms_kernel_writes(tmp_path: Path) -> None:
    interpreted("tests.kernels.cache_write_by_triton", tmp_path / "results.pt")
    for case in torch.load(tmp_path / "results.pt"):
        assert torch.equal(case["ours"], case["theirs"])
        changed = (case["ours"] != case["before"]).flatten(3).any(-1)
        assert changed.sum().item() == 2 * case["written"]


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the kernel is launched with, on something like a GPU."""
    vllm_gemma4_spec.apply()
    seen: list[Any] = []
    monkeypatch.setattr(kernel, "write", lambda *args: seen.append(args))
    monkeypatch.setattr(cache_write, "_suits", lambda _: True)
    monkeypatch.setattr(cache_write, "few_tokens", cache_write.FewTokens())
    return seen


def rows(tokens: int = 4, heads: int = 2, size: int = 256, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(tokens, heads, size, dtype=dtype, device="meta")


def batch(key: torch.Tensor | None = None, **changed: Any) -> dict[str, Any]:
    """Arguments of ``do_kv_cache_update`` for four tokens of E4B."""
    key = rows() if key is None else key
    slots = torch.empty(len(key), dtype=torch.int64, device="meta")
    cache = torch.empty(9, 2, 16, *key.shape[1:], dtype=key.dtype, device="meta")
    return {"key": key, "value": key, "kv_cache": cache, "slot_mapping": slots} | changed


def of_vllm(given: dict[str, Any], impl: Any) -> bool:
    """Whether vLLM's own method writes."""
    ran: list[tuple[Any, ...]] = []
    cache_write.do_kv_cache_update(lambda *args: ran.append(args))(impl, "layer", **given)
    if ran:
        assert all(a is b for a, b in zip(ran[0], (impl, "layer", *given.values()), strict=True))
    return bool(ran)


IN = SimpleNamespace(**{IN_SCOPE: True})


def test_few_tokens_are_written_early(writes: list[Any]) -> None:
    given = batch()
    assert not of_vllm(given, IN)
    ((key, value, into_k, into_v, slots),) = writes
    assert (key, value, slots) == (given["key"], given["value"], given["slot_mapping"])
    assert into_k.shape == into_v.shape == (9, 16, 2, 256)
    assert not of_vllm(batch(rows(4, 4, 512)), IN)
    assert not of_vllm(batch(rows(320, 16)), IN)
    assert not of_vllm(batch(slot_mapping=given["slot_mapping"][:3]), IN)  # a graph's padding has no slots


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(batch(rows(321)), id="a prompt"),
        pytest.param(batch(rows(0)), id="nothing"),
        pytest.param(batch(slot_mapping=torch.empty(5, dtype=torch.int64, device="meta")), id="slots without a row"),
        pytest.param(batch(kv_cache=batch()["kv_cache"].to(torch.float8_e4m3fn)), id="fp8"),
        pytest.param(batch(kv_cache=batch()["kv_cache"].view(torch.uint8)), id="bytes"),
        pytest.param(batch(rows(dtype=torch.float32)), id="32 bits"),
        pytest.param(batch(value=rows(dtype=torch.float16)), id="value of another dtype"),
        pytest.param(batch(value=rows(size=128)), id="value of another size"),
        pytest.param(batch(rows(size=80)), id="size no power of two"),
        pytest.param(batch(rows(size=32)), id="small"),
        pytest.param(batch(kv_cache=batch(rows(heads=4))["kv_cache"]), id="another layer's cache"),
        pytest.param(batch(kv_cache=torch.empty(9, 16, 2, 256, device="meta")), id="another form of cache"),
        pytest.param(batch(rows(), value=rows(4, 256, 2).transpose(1, 2)), id="rows that lie apart"),
        pytest.param(batch(rows().flatten(1), kv_cache=batch()["kv_cache"], value=rows()), id="without heads"),
    ],
)
def test_the_rest_is_left_to_vllm(writes: list[Any], given: dict[str, Any]) -> None:
    assert of_vllm(given, IN)
    assert not writes


def test_another_card_or_engine_is_left_to_vllm(writes: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert of_vllm(batch(), SimpleNamespace())
    monkeypatch.setattr(cache_write, "_suits", lambda _: False)
    assert of_vllm(batch(), IN)
    assert not writes


@pytest.mark.parametrize(("device", "major", "suits"), [("cuda", 9, True), ("cuda", 8, False), ("cpu", 9, False)])
def test_cards(monkeypatch: pytest.MonkeyPatch, device: str, major: int, suits: bool) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (major, 0))
    assert cache_write._suits.__wrapped__(torch.device(device)) is suits


def layer(monkeypatch: pytest.MonkeyPatch, target: Any = GEMMA4, drafter: Any = LLAMA, kind: str = "decoder") -> Any:
    from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl

    monkeypatch.setattr(scope, "current_config", lambda: vllm_config(target, drafter))
    return TritonAttentionImpl(8, 256, 1.0, 2, None, 512, "auto", attn_type=kind)


def wrote(impl: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Whose kernel vLLM's class launches for a batch."""
    from vllm.v1.attention.backends import triton_attn

    seen: list[str] = []
    monkeypatch.setattr(kernel, "write", lambda *_: seen.append("early"))
    monkeypatch.setattr(triton_attn, "triton_reshape_and_cache_flash", lambda *_: seen.append("stock"))
    impl.do_kv_cache_update(SimpleNamespace(_k_scale=None, _v_scale=None), **batch())
    return seen


def test_a_layer_in_scope_writes_early(writes: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert wrote(layer(monkeypatch), monkeypatch) == ["early"]
    assert wrote(layer(monkeypatch, LLAMA, GEMMA4), monkeypatch) == ["early"]


def test_another_models_layer_is_left_as_it_is(writes: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert wrote(layer(monkeypatch, LLAMA), monkeypatch) == ["stock"]
    assert wrote(layer(monkeypatch, kind="encoder"), monkeypatch) == []


def test_stock_waits_for_all_before(writes: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with without(CACHE_WRITE):
        assert wrote(layer(monkeypatch), monkeypatch) == ["stock"]


def test_a_kernel_that_does_not_compile_is_one_line(
    writes: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("PassManager::run failed\nand more")

    works = kernel.write
    monkeypatch.setattr(kernel, "write", fails)
    with caplog.at_level("INFO", logger="vllm.plugins.gemma4_spec"):
        assert of_vllm(batch(), IN)
        assert of_vllm(batch(), IN)
    assert caplog.messages == ["The KV cache is written by vLLM's own kernel: PassManager::run failed"]
    monkeypatch.setattr(cache_write, "few_tokens", cache_write.FewTokens())
    monkeypatch.setattr(kernel, "write", works)
    assert not of_vllm(batch(), IN)
    monkeypatch.setattr(kernel, "write", fails)
    with pytest.raises(RuntimeError):  # it had worked: that is no compiler's error
        of_vllm(batch(), IN)
