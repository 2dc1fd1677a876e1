"""A layer's keys and values are written by the kernel that norms its heads, or behind it, and never by neither.

The kernel itself: ``tests/kernels/test_head_norms.py``.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.config import CUDAGraphMode
from vllm.v1.attention.backends import triton_attn

import vllm_gemma4_spec
from tests.support.stock import modules_around, without
from vllm_gemma4_spec.kernels import head_norms as kernel
from vllm_gemma4_spec.performance import cache_write, head_norms, heads_into_cache
from vllm_gemma4_spec.performance.patches import HEADS_INTO_CACHE

Q_HEADS, KV_HEADS, SIZE, TOKENS = 4, 2, 64, 3
NAME = "model.layers.0.self_attn.attn"


@pytest.fixture(autouse=True)
def patched(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm_gemma4_spec.apply()
    monkeypatch.setattr(heads_into_cache, "LAYERS", heads_into_cache.Layers())
    monkeypatch.setattr(kernel, "destination", kernel.nowhere)


class Some:
    def __init__(self, **of: Any) -> None:
        vars(self).update(of)


def layer(
    cache: Tensor | None = None, shared: bool = False, ours: bool = True, impl: Any = None, name: str = NAME
) -> Any:
    """What is read of a ``Gemma4Attention``, as the patched ``__init__`` leaves it."""
    from vllm.model_executor.models.gemma4 import Gemma4Attention

    made = Some(
        q_norm=SimpleNamespace(weight=torch.ones(SIZE, dtype=torch.bfloat16)),
        num_kv_heads=KV_HEADS,
        head_dim=SIZE,
        is_kv_shared_layer=shared,
        attn=SimpleNamespace(
            impl=impl or triton_attn.TritonAttentionImpl(Q_HEADS, SIZE, 1.0, KV_HEADS, None, None, "auto"),
            layer_name=name,
            kv_cache=empty() if cache is None else cache,
            _k_scale=None,
            _v_scale=None,
        ),
    )
    if ours:
        setattr(made, head_norms.OURS, True)
    if heads_into_cache.__name__ in modules_around(Gemma4Attention.__init__):
        built: list[Any] = []
        heads_into_cache.attention_init(lambda *args: built.append(args))(made, "config")
        assert built == [(made, "config")]
    return made


def empty(dtype: torch.dtype = torch.bfloat16, heads: int = KV_HEADS) -> Tensor:
    return torch.zeros(5, 2, 16, heads, SIZE, dtype=dtype)


@contextmanager
def step(layer: Any, mode: CUDAGraphMode = CUDAGraphMode.NONE, **changed: Any) -> Iterator[Tensor]:
    """A forward pass; gives its slots."""
    from vllm.forward_context import ForwardContext, override_forward_context

    slots = torch.tensor([7, 40, -1])
    given: dict[str, Any] = {
        "no_compile_layers": {NAME: layer.attn},
        "attn_metadata": {NAME: None},
        "slot_mapping": {NAME: slots},
        "cudagraph_runtime_mode": mode,
    }
    with override_forward_context(ForwardContext(**given | changed)):
        yield slots


class Pass:
    """What a layer does between its ``qkv_proj`` and attention, and who writes the cache in it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, layer: Any) -> None:
        self.layer, self.into, self.behind = layer, [], []
        monkeypatch.setattr(kernel, "norm_heads", self._norm)
        monkeypatch.setattr(triton_attn, "triton_reshape_and_cache_flash", lambda *args: self.behind.append(args))

    def _norm(self, qkv: Tensor, *args: Any) -> Tensor:
        """In place of Triton's kernel."""
        out, into = torch.empty(qkv.numel(), dtype=qkv.dtype), args[-1]
        if into is not None:
            self.into.append((into.cache, into.slots))
            into.wrote(out[len(qkv) * Q_HEADS * SIZE :].data_ptr())
        return out

    def __call__(self, rows: int = TOKENS, copied: bool = False) -> None:
        from vllm.model_executor.layers.attention.attention import unified_kv_cache_update

        weight = self.layer.q_norm.weight
        qkv = torch.zeros(rows, (Q_HEADS + 2 * KV_HEADS) * SIZE, dtype=torch.bfloat16)
        positions = torch.arange(rows)
        out = kernel.operator(qkv, positions, torch.zeros(9, SIZE), weight, weight, Q_HEADS, KV_HEADS, 1e-6)
        key, value = out[rows * Q_HEADS * SIZE :].view(2, rows, KV_HEADS, SIZE).unbind()
        unified_kv_cache_update(key.clone() if copied else key, value, NAME)


def test_the_kernel_of_the_heads_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Pass(monkeypatch, layer())
    for times, mode in enumerate((CUDAGraphMode.NONE, CUDAGraphMode.FULL), 1):
        with step(one.layer, mode) as slots:
            one()
        assert len(one.into) == times
        cache, of = one.into[-1]
        assert cache is one.layer.attn.kv_cache
        assert of is slots
    assert one.behind == []


def test_stock_writes_the_cache_behind_the_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    with without(HEADS_INTO_CACHE):
        one = Pass(monkeypatch, layer())
        with step(one.layer):
            one()
    assert one.into == []
    assert len(one.behind) == 1


def test_it_comes_before_the_early_write() -> None:
    around = modules_around(triton_attn.TritonAttentionImpl.do_kv_cache_update)
    assert around.index(heads_into_cache.__name__) < around.index(cache_write.__name__)


class Own(triton_attn.TritonAttentionImpl):
    """An implementation that keeps something else."""

    def do_kv_cache_update(self, *args: Any) -> None:
        super().do_kv_cache_update(*args)


@pytest.mark.parametrize(
    ("of", "changed"),
    [
        pytest.param({}, {"cudagraph_runtime_mode": CUDAGraphMode.PIECEWISE}, id="a piecewise graph"),
        pytest.param({}, {"slot_mapping": {NAME: torch.arange(TOKENS + 1)}}, id="slots without a row"),
        pytest.param({"ours": False}, {}, id="heads of vLLM's"),
        pytest.param({"shared": True}, {}, id="another layer's keys"),
        pytest.param({"impl": Own(Q_HEADS, SIZE, 1.0, KV_HEADS, None, None, "auto")}, {}, id="another implementation"),
        pytest.param({"cache": empty(torch.uint8)}, {}, id="bytes"),
        pytest.param({"cache": empty(torch.float16)}, {}, id="another dtype"),
        pytest.param({"cache": empty(heads=1)}, {}, id="other heads"),
        pytest.param({"cache": torch.zeros(5, 2, 16, SIZE, KV_HEADS).bfloat16().mT}, {}, id="rows that lie apart"),
    ],
)
def test_the_rest_is_written_behind(monkeypatch: pytest.MonkeyPatch, of: Any, changed: Any) -> None:
    one = Pass(monkeypatch, layer(**of))
    with step(one.layer, **changed):
        one()
    assert one.into == []
    assert len(one.behind) == 1


def test_a_cache_that_is_not_there_or_of_another_form() -> None:
    qkv, slots = torch.zeros(TOKENS, 8 * SIZE, dtype=torch.bfloat16), torch.arange(TOKENS)
    assert heads_into_cache.fits(qkv, layer(), empty(), slots)
    for cache in (torch.tensor([]), torch.zeros(5, 3, 16, KV_HEADS, SIZE), torch.zeros(5, 2, KV_HEADS, SIZE)):
        assert not heads_into_cache.fits(qkv, layer(), cache.bfloat16(), slots)


@pytest.mark.parametrize("slots", [{}, {"another": torch.arange(TOKENS)}])
def test_a_run_without_slots_writes_nothing(monkeypatch: pytest.MonkeyPatch, slots: Any) -> None:
    """As vLLM, where it tries a model out."""
    one = Pass(monkeypatch, layer())
    with step(one.layer, slot_mapping=slots):
        one()
    assert one.into == one.behind == []


def test_what_has_no_layers_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two halves of a batch at once, another engine's pass, and none at all."""
    one = Pass(monkeypatch, layer())
    weight, qkv = one.layer.q_norm.weight, torch.zeros(TOKENS, 8 * SIZE, dtype=torch.bfloat16)
    assert heads_into_cache.destination(weight, qkv) is None
    for changed in ({"slot_mapping": [{}, {}]}, {"no_compile_layers": {NAME: "another"}}, {"no_compile_layers": {}}):
        with step(one.layer, **changed):
            assert heads_into_cache.destination(weight, qkv) is None
    with step(one.layer):
        assert heads_into_cache.destination(weight, qkv) is not None


def test_keys_that_were_copied_on_the_way_are_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Pass(monkeypatch, layer())
    with step(one.layer):
        one(copied=True)
    assert (len(one.into), len(one.behind)) == (1, 1)
    with step(one.layer, CUDAGraphMode.PIECEWISE):
        one()
    assert (len(one.into), len(one.behind)) == (1, 2)


def test_a_write_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys at the same address in the next pass are others."""
    one = Pass(monkeypatch, layer())
    with step(one.layer) as slots:
        setattr(one.layer.attn.impl, heads_into_cache.WROTE, slots.data_ptr())
        for written in (0, 1):
            one.layer.attn.impl.do_kv_cache_update(one.layer.attn, slots, slots, empty(), slots)
            assert len(one.behind) == written


def test_weights_that_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where they are loaded again; what takes their old place is no layer, until one comes back there."""
    one = Pass(monkeypatch, layer())
    old, new = one.layer.q_norm.weight, one.layer.q_norm.weight.clone()
    for weight, other in ((old, new), (new, old), (old, new)):
        one.layer.q_norm.weight = weight
        with step(one.layer):
            one()
        assert heads_into_cache.LAYERS.of(other) is None
    assert len(one.into) == 3


def test_layers_at_one_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose weights vLLM brings from the host in turn, into the same memory: nobody knows which one it is."""
    from vllm.model_executor.offloader.base import NoopOffloader, set_offloader
    from vllm.model_executor.offloader.prefetch import PrefetchOffloader

    one, another = Pass(monkeypatch, layer()), layer(name="another")
    another.q_norm.weight = one.layer.q_norm.weight
    with step(one.layer):
        one()
    assert (len(one.into), len(one.behind)) == (0, 1)
    monkeypatch.setattr(heads_into_cache, "LAYERS", heads_into_cache.Layers())
    set_offloader(object.__new__(PrefetchOffloader))
    try:
        alone = Pass(monkeypatch, layer())
    finally:
        set_offloader(NoopOffloader())
    with step(alone.layer):
        alone()
    assert (len(alone.into), len(alone.behind)) == (0, 1)


def test_a_layer_is_looked_for_once() -> None:
    one = layer()
    assert heads_into_cache.LAYERS.of(one.q_norm.weight) is one
    heads_into_cache.LAYERS._all.clear()
    assert heads_into_cache.LAYERS.of(one.q_norm.weight) is one


def test_a_layer_that_is_gone() -> None:
    gone = layer()
    weight = gone.q_norm.weight
    del gone
    gc.collect()
    assert heads_into_cache.LAYERS.of(weight) is None
