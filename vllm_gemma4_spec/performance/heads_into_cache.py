"""The kernel that norms a layer's heads writes its keys and values into the cache, too.

Its operator is not told which layer it serves, so that torch.compile's pieces stay the same for all layers: the address
of the layer's ``q_norm`` weight says so. In a piecewise CUDA graph it cannot know where a step's tokens go: there the
cache is written as before. So it is where anything else is not as expected.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vllm_gemma4_spec.performance import cache_write, head_norms

if TYPE_CHECKING:
    from vllm_gemma4_spec.kernels.head_norms import Into

WROTE = "_gemma4_spec_wrote"  # attribute of a layer's implementation: the address of the keys that are in the cache


class Layers:
    """``Gemma4Attention`` layers by the address of their ``q_norm`` weight, which may move."""

    def __init__(self) -> None:
        self._all: weakref.WeakSet[Any] = weakref.WeakSet()
        self._at: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    def add(self, layer: Any) -> None:
        self._all.add(layer)

    def of(self, q_weight: Tensor) -> Any:
        """The layer, or None; an address that several have is nobody's."""
        address = q_weight.data_ptr()
        layer = self._at.get(address)
        if layer is None or layer.q_norm.weight.data_ptr() != address:
            found = [one for one in self._all if one.q_norm.weight.data_ptr() == address]
            if len(found) != 1:
                return None
            (layer,) = found
            self._at[address] = layer
        return layer


LAYERS = Layers()


def destination(q_weight: Tensor, qkv: Tensor) -> Into | None:
    """Where the keys and values of this step's tokens go, as the layer is told later; None: it is to write them."""
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import get_forward_context, is_forward_context_available

    from vllm_gemma4_spec.kernels.head_norms import Into

    layer = LAYERS.of(q_weight)
    if layer is None or not is_forward_context_available():
        return None
    context, attention = get_forward_context(), layer.attn
    if (
        context.cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE
        or not isinstance(context.slot_mapping, dict)
        or context.no_compile_layers.get(attention.layer_name) is not attention
    ):
        return None
    slots, cache = context.slot_mapping.get(attention.layer_name), attention.kv_cache
    if slots is None or not fits(qkv, layer, cache, slots):
        return None
    return Into(cache, slots, functools.partial(setattr, attention.impl, WROTE))


def fits(qkv: Tensor, layer: Any, cache: Tensor, slots: Tensor) -> bool:
    """Whether the kernel takes a batch; of shapes and dtypes alone.

    Args:
        qkv: ``[tokens, ...]``.
        cache: ``[blocks, 2, block_size, kv_heads, size]``.
        slots: of each token, or of the first ones.
    """
    return (
        cache_write.holds(cache, layer.num_kv_heads, layer.head_dim)
        and cache.dtype == qkv.dtype
        and len(slots) <= len(qkv)
    )


def attention_init(original: Callable[..., None]) -> Callable[..., None]:
    """``Gemma4Attention.__init__``: a layer with the kernel, with keys and values of its own in vLLM's Triton cache.

    Patch: ``heads-into-cache``. Evidence:
    ``tests/performance/test_heads_into_cache.py::test_stock_writes_the_cache_behind_the_heads``. Related upstream
    change: none found.
    """

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        from vllm.model_executor.offloader.base import NoopOffloader, get_offloader
        from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl

        impl = self.attn.impl
        if (
            getattr(self, head_norms.OURS, False)
            and not self.is_kv_shared_layer
            and isinstance(impl, TritonAttentionImpl)
            and type(impl).do_kv_cache_update is TritonAttentionImpl.do_kv_cache_update
            and isinstance(get_offloader(), NoopOffloader)  # layers that are fetched in turn have one address
        ):
            from vllm_gemma4_spec.kernels import head_norms as kernel

            LAYERS.add(self)
            kernel.destination = destination

    return __init__


def do_kv_cache_update(original: Callable[..., None]) -> Callable[..., None]:
    """``TritonAttentionImpl.do_kv_cache_update``: nothing, where these very keys are in the cache.

    Patch: ``heads-into-cache``. Evidence:
    ``tests/performance/test_heads_into_cache.py::test_stock_writes_the_cache_behind_the_heads``. Related upstream
    change: none found.
    """

    @functools.wraps(original)
    def wrapper(self: Any, layer: Any, key: Tensor, *args: Any, **kwargs: Any) -> None:
        wrote = self.__dict__.pop(WROTE, None)
        if wrote is None or wrote != key.data_ptr():
            original(self, layer, key, *args, **kwargs)

    return wrapper
