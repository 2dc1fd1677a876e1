"""The cache write of a batch with few tokens, by a kernel that is launched early."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

from vllm_gemma4_spec import scope
from vllm_gemma4_spec.kernels import cuda

logger = logging.getLogger("vllm.plugins.gemma4_spec")

# Attribute of a layer's implementation in scope; its method is given tensors and no config.
IN_SCOPE = "_gemma4_spec_early_write"
_TOKENS = 320  # most tokens of a batch: 64 requests with k = 4; of more the launch is little


_suits = functools.cache(cuda.starts_early)


def holds(cache: torch.Tensor, kv_heads: int, size: int) -> bool:
    """Whether it is ``[blocks, 2, block_size, kv_heads, size]``, and rows of ``size`` lie together."""
    return cache.ndim == 5 and cache.shape[1] == 2 and cache.shape[3:] == (kv_heads, size) and cache.stride(4) == 1


def fits(key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> bool:
    """Whether the kernel takes a batch; of shapes and dtypes alone.

    Args:
        key: ``[tokens, kv_heads, size]``.
        cache: ``[blocks, 2, block_size, kv_heads, size]``.
        slots: of each token; its length is what vLLM's kernel goes by, too.
    """
    if key.ndim != 3 or key.shape != value.shape or not holds(cache, *key.shape[1:]):
        return False
    size = key.shape[2]
    return (
        0 < len(slots) <= _TOKENS
        and len(slots) <= len(key)  # the kernel reads a padded token's rows
        and key.dtype == value.dtype == cache.dtype
        and key.element_size() == 2
        and size >= 64
        and size & (size - 1) == 0
        and key.stride(2) == value.stride(2) == 1
    )


class FewTokens:
    """The kernel, until it does not compile."""

    def __init__(self) -> None:
        self.works: bool | None = None  # not tried yet

    def __call__(self, key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> bool:
        """Whether it has written."""
        from vllm_gemma4_spec.kernels.cache_write import write

        if self.works is False:
            return False
        into_k, into_v = cache.unbind(1)
        try:
            write(key, value, into_k, into_v, slots)
        except Exception as error:  # of Triton's compiler, which raises anything
            if self.works:
                raise
            logger.info("The KV cache is written by vLLM's own kernel: %s", f"{error}".partition("\n")[0])
            self.works = False
            return False
        self.works = True
        return True


few_tokens = FewTokens()


def impl_init(original: Callable[..., None]) -> Callable[..., None]:
    """``TritonAttentionImpl.__init__``: marks a decoder's layer of an engine in scope.

    Patch: ``cache-write``. Evidence: ``tests/performance/test_cache_write.py::test_stock_waits_for_all_before``.
    Related upstream change: none found.
    """

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        from vllm.v1.attention.backend import AttentionType

        if self.attn_type == AttentionType.DECODER and scope.gemma4_engine(scope.current_config()):
            setattr(self, IN_SCOPE, True)

    return __init__


def do_kv_cache_update(original: Callable[..., None]) -> Callable[..., None]:
    """``TritonAttentionImpl.do_kv_cache_update``: few tokens of a 16-bit cache by a kernel launched early.

    Patch: ``cache-write``. Evidence: ``tests/performance/test_cache_write.py::test_stock_waits_for_all_before``.
    Related upstream change: none found.
    """

    @functools.wraps(original)
    def wrapper(
        self: Any,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        taken = (
            getattr(self, IN_SCOPE, False)
            and _suits(kv_cache.device)
            and fits(key, value, kv_cache, slot_mapping)
            and few_tokens(key, value, kv_cache, slot_mapping)
        )
        if not taken:
            original(self, layer, key, value, kv_cache, slot_mapping)

    return wrapper
