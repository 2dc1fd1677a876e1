"""KV cache groups and capacity, computed by vLLM's own functions from specs derived from the configs."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from vllm_gemma4_spec.ops.output import Output
from vllm_gemma4_spec.ops.plan.model import Model, PlanError
from vllm_gemma4_spec.patching.version import require_supported

DRAFT_PREFIX = "draft_model."  # of a draft model's layers in vLLM


class Group(Output):
    """One KV cache group; its layers have equal specs."""

    number: int
    owner: str
    """target, drafter, or both: vLLM puts layers with equal specs together, whosever they are"""
    kind: str
    """sliding or full"""
    window: int
    """tokens; 0: full attention"""
    block_size: int
    """tokens"""
    page_bytes: int
    """one block of one layer"""
    target_layers: list[int]
    drafter_layers: list[int]

    @property
    def size(self) -> int:
        return len(self.target_layers) + len(self.drafter_layers)


@dataclass(frozen=True)
class Cache:
    """Groups and what they cost.

    Attributes:
        groups: in vLLM's order, the target's first.
        bytes_per_token: growth per token once all windows are full, padding of blocks included.
        request_bytes: what vLLM reserves at most for one request of ``context`` tokens.
        blocks: of the pool that the memory given holds.
        requests: of ``context`` tokens that fit at once, as vLLM reports it at start-up.
        longest_prompt: tokens of the longest prompt that the pool holds, alone, up to the target's own maximum.
    """

    groups: tuple[Group, ...]
    bytes_per_token: float
    request_bytes: int
    blocks: int
    requests: float
    longest_prompt: int


def specs(model: Model, prefix: str, block_size: int, dtype: Any) -> dict[str, Any]:
    """Layer name -> spec, as vLLM's ``Attention.get_kv_cache_spec`` answers; layers that reuse KV have none."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    out: dict[str, Any] = {}
    for i in range(model.first_shared):
        heads, size = model.attention(i)
        common = {"block_size": block_size, "num_kv_heads": heads, "head_size": size, "dtype": dtype}
        name = f"{prefix}.layers.{i}.self_attn.attn"
        if model.is_full(i):
            out[name] = FullAttentionSpec(**common)
        else:
            out[name] = SlidingWindowSpec(**common, sliding_window=int(model.text.sliding_window))
    return out


def _vllm_config(context: int, batched_tokens: int) -> Any:
    """The fields that vLLM's KV cache functions read (checked in tests against groups seen in the engine)."""
    return SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=context),
        cache_config=SimpleNamespace(num_gpu_blocks_override=None),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=1),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False, max_num_batched_tokens=batched_tokens),
    )


def plan_cache(
    target: Model,
    drafter: Model | None,
    memory_bytes: int,
    context: int,
    kv_dtype: str = "bf16",
    block_size: int = 16,
    batched_tokens: int = 8192,
    drafts: int = 0,
) -> Cache:
    """Group the layers of both models and fill ``memory_bytes`` with blocks; ``drafts`` a step at most.

    Raises:
        VersionError: vLLM 0.19.1 is not installed here.
        PlanError: the layers' page sizes cannot be unified.
    """
    require_supported()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its INFO lines go to stdout
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"
    import torch
    from vllm.v1.core import kv_cache_utils

    from vllm_gemma4_spec.scheduling.capacity import Step, longest_request

    dtype = {"bf16": torch.bfloat16, "fp8": torch.uint8, "float32": torch.float32}[kv_dtype]
    layers = specs(target, "model", block_size, dtype)
    if drafter is not None:
        layers |= specs(drafter, f"{DRAFT_PREFIX}model", block_size, dtype)
    config = _vllm_config(context, batched_tokens)
    try:
        found = kv_cache_utils.get_kv_cache_groups(config, layers)
    except NotImplementedError as error:
        raise PlanError(f"vLLM cannot put these layers into one cache: {error}") from None
    groups = tuple(_group(n, g) for n, g in enumerate(found))
    size = max(g.size for g in groups)
    grows = sum(g.page_bytes * size / g.block_size for g in groups if not g.window)
    cache = kv_cache_utils.get_kv_cache_config_from_groups(config, found, max(0, memory_bytes))
    longest = longest_request(
        [g.kv_cache_spec for g in found],
        cache.num_blocks,
        Step(batched_tokens, lookahead=drafts, margin=drafts),
        int(target.text.max_position_embeddings),
    )
    return Cache(
        groups,
        grows,
        int(kv_cache_utils._max_memory_usage_bytes_from_groups(config, found)),
        cache.num_blocks,
        kv_cache_utils.get_max_concurrency_for_kv_cache_config(config, cache),
        max(0, longest - 1),  # an answer has a token
    )


def _group(number: int, group: Any) -> Group:
    spec = group.kv_cache_spec
    members: dict[bool, list[int]] = {False: [], True: []}
    for name in group.layer_names:
        members[name.startswith(DRAFT_PREFIX)].append(int(name.split(".layers.")[1].split(".")[0]))
    window = int(getattr(spec, "sliding_window", None) or 0)
    return Group(
        number=number,
        owner="both" if all(members.values()) else "drafter" if members[True] else "target",
        kind="sliding" if window else "full",
        window=window,
        block_size=spec.block_size,
        page_bytes=spec.page_size_bytes,
        target_layers=members[False],
        drafter_layers=members[True],
    )
