"""A prompt is admitted if the pool can hold it, and no request is longer than the pool can hold."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from vllm_gemma4_spec import scope
from vllm_gemma4_spec.errors import Gemma4SpecError, stop
from vllm_gemma4_spec.scheduling.capacity import Step, longest_request, most_blocks

logger = logging.getLogger("vllm.plugins.gemma4_spec")

# Attributes of a sliding-window group's manager: blocks that a request holds at once at most; whether it is being asked
# if a whole prompt fits.
MOST = "_gemma4_spec_most_blocks"
ADMITTING = "_gemma4_spec_admitting"
_ASK_CORE = "gemma4_spec_max_model_len"


def scheduler_init(original: Callable[..., None]) -> Callable[..., None]:
    """``Scheduler.__init__``: tell each sliding-window group's manager the most that a request holds at once.

    Patch: ``long-prompts``. Evidence: ``tests/scheduling/test_no_deadlock.py::test_stock_waits_for_ever``. Related
    upstream change: #40946, in 0.20.0 (#39734, #39914).
    """

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if scope.gemma4_engine(self.vllm_config):
            step = Step.of(self.vllm_config)
            for manager in self.kv_cache_manager.coordinator.single_type_managers:
                setattr(manager, MOST, most_blocks(manager.kv_cache_spec, self.max_model_len, step))

    return __init__


def can_fit_full_sequence(original: Callable[..., bool]) -> Callable[..., bool]:
    """``KVCacheManager.can_fit_full_sequence``: sliding-window groups are asked for what is held at once.

    Patch: ``long-prompts``. Evidence: ``tests/scheduling/test_no_deadlock.py::test_stock_waits_for_ever``. Related
    upstream change: #40946, in 0.20.0 (#39734, #39914).
    """

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> bool:
        managers = self.coordinator.single_type_managers
        for manager in managers:
            setattr(manager, ADMITTING, True)
        try:
            return original(self, *args, **kwargs)
        finally:
            for manager in managers:
                setattr(manager, ADMITTING, False)

    return wrapper


def get_num_blocks_to_allocate(original: Callable[..., int]) -> Callable[..., int]:
    """``SlidingWindowManager.get_num_blocks_to_allocate``, inherited: no more than is held at once, at the gate only.

    What is allocated is counted as before.

    Patch: ``long-prompts``. Evidence: ``tests/scheduling/test_no_deadlock.py::test_stock_waits_for_ever``. Related
    upstream change: #40946, in 0.20.0 (#39734, #39914).
    """

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> int:
        asked = original(self, *args, **kwargs)
        most = getattr(self, MOST, None)
        return asked if most is None or not getattr(self, ADMITTING, False) else min(asked, most)

    return wrapper


def get_kv_cache_configs(original: Callable[..., Any]) -> Callable[..., Any]:
    """``get_kv_cache_configs`` in the engine core: the maximum length becomes what the pool can hold.

    0.19.1 sizes the pool without the drafts and the null block, and ``--num-gpu-blocks-override`` passes its check by.
    A request that has outgrown the pool would preempt itself for ever. The engine core hands a new length on to its
    workers, as with ``--max-model-len auto``.

    Patch: ``long-prompts``. Evidence: ``tests/scheduling/test_no_deadlock.py::test_stock_waits_for_ever``. Related
    upstream change: #40946, in 0.20.0 (#39734, #39914).
    """

    @functools.wraps(original)
    def wrapper(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        made = original(vllm_config, *args, **kwargs)
        specs = [group.kv_cache_spec for group in made[0].kv_cache_groups]
        if specs and scope.gemma4_engine(vllm_config):
            model, blocks = vllm_config.model_config, made[0].num_blocks
            longest = longest_request(specs, blocks, Step.of(vllm_config), model.max_model_len)
            if longest < 2:  # a token to read and one to write
                stop(Gemma4SpecError(f"a KV cache of {blocks} blocks holds no request; give it more memory or blocks"))
            if longest < model.max_model_len:
                logger.warning(
                    "The KV cache has %d blocks and holds requests of up to %d tokens: max_model_len is %d now, not "
                    "%d, and longer requests are refused. More memory, or a smaller max_num_batched_tokens, makes room",
                    blocks,
                    longest,
                    longest,
                    model.max_model_len,
                )
                model.max_model_len = longest
        return made

    return wrapper


def update_max_model_len(original: Callable[..., None]) -> Callable[..., None]:
    """``GPUModelRunner.update_max_model_len``: the drafter, too, ends at the new length.

    It has no slots beyond: 0.19.1 updates the target alone, with ``--max-model-len auto`` as well.

    Patch: ``long-prompts``. Evidence: ``tests/scheduling/test_no_deadlock.py::test_stock_waits_for_ever``. Related
    upstream change: #40946, in 0.20.0 (#39734, #39914).
    """

    @functools.wraps(original)
    def wrapper(self: Any, max_model_len: int) -> None:
        original(self, max_model_len)
        drafter = getattr(self, "drafter", None)
        if drafter is not None and hasattr(drafter, "max_model_len") and scope.gemma4_engine(self.vllm_config):
            drafter.max_model_len = min(drafter.max_model_len, max_model_len)
            self.effective_drafter_max_model_len = min(self.effective_drafter_max_model_len, max_model_len)

    return wrapper


def core_max_model_len(_: None) -> Callable[[Any], int]:
    """``EngineCore.gemma4_spec_max_model_len``, which 0.19.1 lacks: what the front end is to refuse by.

    Patch: ``long-prompts``. Evidence: ``tests/scheduling/test_no_deadlock.py::test_stock_waits_for_ever``. Related
    upstream change: #40946, in 0.20.0 (#39734, #39914).
    """

    def gemma4_spec_max_model_len(self: Any) -> int:
        return int(self.vllm_config.model_config.max_model_len)

    return gemma4_spec_max_model_len


def async_supported_tasks(original: Callable[..., Any]) -> Callable[..., Any]:
    """``AsyncLLM.get_supported_tasks``, which a server calls before it serves: learn the engine cores' length.

    Patch: ``long-prompts``. Evidence: ``tests/scheduling/test_no_deadlock.py::test_stock_waits_for_ever``. Related
    upstream change: #40946, in 0.20.0 (#39734, #39914).
    """

    @functools.wraps(original)
    async def wrapper(self: Any) -> Any:
        if not hasattr(self, "_supported_tasks") and scope.gemma4_engine(self.vllm_config):
            core = self.engine_core
            lengths = [await core._call_utility_async(_ASK_CORE, engine=engine) for engine in core.core_engines]
            _learn(self.vllm_config, min(lengths))
        return await original(self)

    return wrapper


def supported_tasks(original: Callable[..., Any]) -> Callable[..., Any]:
    """``LLMEngine.get_supported_tasks``, which ``LLM`` calls when it is made: as :func:`async_supported_tasks`.

    Patch: ``long-prompts``. Evidence: ``tests/scheduling/test_no_deadlock.py::test_stock_waits_for_ever``. Related
    upstream change: #40946, in 0.20.0 (#39734, #39914).
    """

    @functools.wraps(original)
    def wrapper(self: Any) -> Any:
        ask = getattr(self.engine_core, "call_utility", None)  # a core in this process has the same config object
        if ask is not None and not hasattr(self, "_supported_tasks") and scope.gemma4_engine(self.vllm_config):
            _learn(self.vllm_config, ask(_ASK_CORE))
        return original(self)

    return wrapper


def _learn(vllm_config: Any, max_model_len: int) -> None:
    vllm_config.model_config.max_model_len = min(vllm_config.model_config.max_model_len, max_model_len)
