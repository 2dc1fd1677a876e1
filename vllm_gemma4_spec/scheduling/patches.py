"""Patches for the scheduler: what is accepted finishes, and what waits says so."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_gemma4_spec.patching.patch import Edit, Group, Lazy, Patch

if TYPE_CHECKING:
    from vllm_gemma4_spec.scheduling import admission, waiting
else:  # a wrapper's module is imported only after the module of vLLM that it patches
    admission = Lazy("vllm_gemma4_spec.scheduling.admission")
    waiting = Lazy("vllm_gemma4_spec.scheduling.waiting")

_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_MANAGER = "vllm.v1.core.kv_cache_manager:KVCacheManager"
_SINGLE = "vllm.v1.core.single_type_kv_cache_manager"
_CORE = "vllm.v1.engine.core"
_UTILS = "vllm.v1.core.kv_cache_utils"

LONG_PROMPTS = Patch(
    name="long-prompts",
    group=Group.CORRECTNESS,
    why="A prompt is admitted only if blocks for its whole length are free in every KV cache group, although "
    "sliding-window groups give theirs back meanwhile: 31B + E4B with 20 GiB free never run a prompt of more than "
    "21,100 tokens, which waits for ever without a word. So does a request that outgrows its pool.",
    how="A sliding-window group is asked for what a request holds at once: its window, a step and its drafts. If the "
    "pool cannot hold one request of max_model_len tokens, max_model_len becomes what it can hold, for the engine "
    "core, its workers, the drafter and the front end, which refuses what is longer with status 400.",
    retire="vLLM 0.20.0 caps sliding-window groups (#40946), and a release whose front end learns what the pool holds.",
    scope="Engines with a Gemma 4 as target or drafter.",
    related="#40946, in 0.20.0 (#39734, #39914)",
    edits=(
        Edit(f"{_SCHEDULER}.__init__", admission.scheduler_init),
        Edit(f"{_MANAGER}.can_fit_full_sequence", admission.can_fit_full_sequence),
        Edit(
            f"{_SINGLE}:SlidingWindowManager.get_num_blocks_to_allocate",
            admission.get_num_blocks_to_allocate,
            source=f"{_SINGLE}:SingleTypeKVCacheManager.get_num_blocks_to_allocate",
        ),
        Edit(
            f"{_CORE}:get_kv_cache_configs",
            admission.get_kv_cache_configs,
            source=f"{_UTILS}:get_kv_cache_configs",
        ),
        Edit(
            "vllm.v1.worker.gpu_model_runner:GPUModelRunner.update_max_model_len",
            admission.update_max_model_len,
        ),
        Edit(f"{_CORE}:EngineCore.gemma4_spec_max_model_len", admission.core_max_model_len, adds=True),
        Edit("vllm.v1.engine.async_llm:AsyncLLM.get_supported_tasks", admission.async_supported_tasks),
        Edit("vllm.v1.engine.llm_engine:LLMEngine.get_supported_tasks", admission.supported_tasks),
    ),
    watches=(
        f"{_SCHEDULER}.schedule",
        f"{_MANAGER}.allocate_slots",
        f"{_SINGLE}:SingleTypeKVCacheManager.remove_skipped_blocks",
        f"{_SINGLE}:SlidingWindowManager.get_num_skipped_tokens",
        f"{_CORE}:EngineCore._initialize_kv_caches",
        "vllm.v1.engine.core_client:AsyncMPClient._call_utility_async",
        "vllm.v1.engine.core_client:SyncMPClient.call_utility",
    ),
)

WAITING_REQUESTS = Patch(
    name="waiting-requests",
    group=Group.CONVENIENCE,
    why="A request that is never admitted waits without a word in the log.",
    how="One line about a request that has been next for a minute while requests, tokens and half of the KV cache "
    "were left over.",
    retire="A release that says why a request waits.",
    scope="Engines with a Gemma 4 as target or drafter.",
    related="none found",
    edits=(Edit(f"{_SCHEDULER}.schedule", waiting.schedule),),
)

PATCHES: tuple[Patch, ...] = (LONG_PROMPTS, WAITING_REQUESTS)
