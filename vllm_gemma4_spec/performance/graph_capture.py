"""When and for which batch sizes the drafter's graphs are captured."""

from __future__ import annotations

import functools
import gc
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vllm_gemma4_spec import scope, settings
from vllm_gemma4_spec.performance import adaptive_k
from vllm_gemma4_spec.performance.draft_graphs import GRAPHS, DraftGraphs, capturable, decode_batch_sizes
from vllm_gemma4_spec.spec_decode.proposer import GROUPS

logger = logging.getLogger("vllm.plugins.gemma4_spec")


def capture_model(original: Callable[..., int]) -> Callable[..., int]:
    """``GPUModelRunner.capture_model``: then the drafter's graphs.

    Patch: ``draft-graphs``. Evidence: ``tests/performance/test_draft_capture.py::test_stock_drafts_kernel_by_kernel``.
    Related upstream change: #45258, open: the same lack for MTP drafters.
    """

    @functools.wraps(original)
    def wrapper(self: Any) -> int:
        used = original(self)
        return used + capture_drafts(self)

    return wrapper


def capture_drafts(runner: Any) -> int:
    """Capture the drafter's graphs after the target's.

    Args:
        runner: a ``GPUModelRunner`` that has just captured its own graphs.

    Returns:
        Bytes of GPU memory taken.
    """
    from vllm.compilation.monitor import set_cudagraph_capturing_enabled
    from vllm.distributed.parallel_state import graph_capture

    graphs: Any = _assistant_graphs(runner) if scope.is_assistant(runner.speculative_config) else _draft_graphs(runner)
    if graphs is None:
        return 0
    started, free, lacking = time.perf_counter(), torch.cuda.mem_get_info()[0], ""
    set_cudagraph_capturing_enabled(True)
    try:
        # The target's pool: its graphs and these are never in flight together.
        with runner._freeze_gc(), graph_capture(device=runner.device):
            graphs.capture(_pool())
    except torch.OutOfMemoryError as error:
        lacking = str(error).splitlines()[0]
    finally:
        set_cudagraph_capturing_enabled(False)
    if lacking:
        del graphs  # after the handler: the error's frames hold what was captured
        gc.collect()
        torch.cuda.empty_cache()
        logger.warning(
            "Drafter: out of memory while its CUDA graphs were captured; it drafts kernel by kernel, several times "
            "slower. Lower gpu_memory_utilization or max_num_seqs to make room (%s)",
            lacking,
        )
        return 0
    torch.cuda.synchronize()
    used = max(0, free - torch.cuda.mem_get_info()[0])
    setattr(runner.drafter, GRAPHS, graphs)
    logger.info(
        "Drafter: %d CUDA graphs of whole drafts (1 to %d requests) in %.1f s, %.2f GiB",
        len(graphs.batch_sizes) * len(graphs.draft_lengths),
        graphs.batch_sizes[-1],
        time.perf_counter() - started,
        used / 2**30,
    )
    return used


def _pool() -> Any:
    from vllm.platforms import current_platform

    return current_platform.get_global_graph_pool()


def _draft_lengths(runner: Any) -> Sequence[int]:
    k: int = runner.drafter.num_speculative_tokens
    return range(1, k + 1) if adaptive_k.adapts(runner.speculative_config) else (k,)


def _wanted(runner: Any) -> bool:
    """Whether the options leave room for whole drafts as graphs."""
    spec, mode = runner.speculative_config, runner.compilation_config.cudagraph_mode
    return (
        spec is not None
        and not spec.enforce_eager
        and not spec.disable_padded_drafter_batch
        and mode.has_full_cudagraphs()
        and not settings.CHECK.on()  # it reads every pass back, which a graph cannot
        and runner.parallel_config.pipeline_parallel_size == 1
    )


def _assistant_graphs(runner: Any) -> Any:
    """Graphs to capture of an assistant; none where it must stay eager."""
    return runner.drafter.graphs_to_capture(_draft_lengths(runner)) if _wanted(runner) else None


def _draft_graphs(runner: Any) -> DraftGraphs | None:
    """Graphs to capture of a draft model; none where the original must stay in charge."""
    sizes = _batch_sizes(runner)
    if not sizes:
        return None
    drafter = runner.drafter
    table, groups = runner.input_batch.block_table[drafter.kv_cache_gid], getattr(drafter, GROUPS)
    return DraftGraphs(drafter, groups, table.get_device_tensor, type(drafter).propose, sizes, _draft_lengths(runner))


def _batch_sizes(runner: Any) -> list[int]:
    """Batch sizes to capture of a draft model."""
    config = runner.compilation_config
    if not _wanted(runner) or not runner.speculative_config.uses_draft_model():
        return []
    groups = getattr(runner.drafter, GROUPS, None)
    if (
        groups is None
        or groups.slot_kernel is None
        # Data parallel ranks agree on every pass's padding, and LoRA changes what a graph must hold.
        or runner.parallel_config.data_parallel_size > 1
        or runner.lora_config is not None
        or not capturable(runner.drafter, groups)
    ):
        return []
    return decode_batch_sizes(runner.drafter, config.cudagraph_capture_sizes, runner.scheduler_config.max_num_seqs)
