"""What corrects counts and prepares drafts between two steps is compiled when an engine starts, not by requests."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from vllm_gemma4_spec import scope
from vllm_gemma4_spec.kernels import cuda
from vllm_gemma4_spec.performance import step_slots

logger = logging.getLogger("vllm.plugins.gemma4_spec")

# Attribute of the ``num_computed_tokens`` of a runner in scope: whether the kernel corrects them, or PyTorch does.
BY_KERNEL = "_gemma4_spec_by_kernel"
# torch.compile keeps the function that it was given under this name.
_GIVEN = "_torchdynamo_orig_callable"


@functools.cache
def _say_that_it_stays() -> None:
    logger.info(
        "This PyTorch does not hand out the function behind torch.compile: vLLM's correction of computed tokens may be "
        "compiled while requests wait, half a second each time"
    )


def may_reinitialize_input_batch(original: Callable[..., None]) -> Callable[..., None]:
    """``GPUModelRunner.may_reinitialize_input_batch``: the counts of an engine in scope know that they are.

    vLLM's function is given tensors and no config.

    Patch: ``compiled-at-start``. Evidence:
    ``tests/performance/test_compiled_at_start.py::test_stock_compiles_while_requests_wait``. Related upstream change:
    #41484, closed: the function without torch.compile, for #39940; 0.33.0 compiles it still.
    """

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        counts = self.num_computed_tokens
        by_kernel = cuda.nvidia(counts)
        if scope.gemma4_speculation(self.vllm_config) and (by_kernel or counts.device.type == "cpu"):
            setattr(counts, BY_KERNEL, by_kernel)

    return wrapper


def update_num_computed_tokens(original: Callable[..., None]) -> Callable[..., None]:
    """``update_num_computed_tokens_for_batch_change``: one kernel on CUDA, on a CPU the function before torch.compile.

    Patch: ``compiled-at-start``. Evidence:
    ``tests/performance/test_compiled_at_start.py::test_stock_compiles_while_requests_wait``. Related upstream change:
    #41484, closed: the function without torch.compile, for #39940; 0.33.0 compiles it still.
    """
    # With torch.compile switched off it is the function itself, which wraps none.
    plain = getattr(original, _GIVEN, None) if hasattr(original, "__wrapped__") else original

    @functools.wraps(original)
    def wrapper(num_computed_tokens: torch.Tensor, *args: torch.Tensor, **kwargs: torch.Tensor) -> None:
        by_kernel = getattr(num_computed_tokens, BY_KERNEL, None)
        if by_kernel is None:
            original(num_computed_tokens, *args, **kwargs)
        elif by_kernel:
            from vllm_gemma4_spec.kernels import computed_counts

            computed_counts.update(num_computed_tokens, *args, **kwargs)
        elif plain is not None:
            plain(num_computed_tokens, *args, **kwargs)
        else:
            _say_that_it_stays()
            original(num_computed_tokens, *args, **kwargs)

    return wrapper


def dummy_sampler_run(original: Callable[..., Any]) -> Callable[..., Any]:
    """``GPUModelRunner._dummy_sampler_run``: when the cache is there, kernels that no start-up path launches follow.

    The start samples once before that, too, to see how much memory it takes. Pipeline ranks that do not sample launch
    none of them.

    Patch: ``compiled-at-start``. Evidence:
    ``tests/performance/test_compiled_at_start.py::test_stock_compiles_while_requests_wait``. Related upstream change:
    #41484, closed: the function without torch.compile, for #39940; 0.33.0 compiles it still.
    """

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        sampled = original(self, *args, **kwargs)
        if getattr(self.num_computed_tokens, BY_KERNEL, False) and not torch.cuda.is_current_stream_capturing():
            compile_all(self)
        return sampled

    return wrapper


@torch.inference_mode()
def compile_all(runner: Any) -> None:
    """Launch on tensors of their own what stands between two steps, in every form that a step may need.

    Args:
        runner: a ``GPUModelRunner`` in scope on CUDA, whose drafter is loaded.
    """
    try:
        if runner.use_async_spec_decode:  # else nothing corrects them
            _correct_counts(runner)
    except Exception as error:  # of Triton's compiler, which raises anything; a start does without
        setattr(runner.num_computed_tokens, BY_KERNEL, False)
        logger.info("Computed tokens are corrected by PyTorch's functions, not by one kernel (%r)", error)
    try:
        _prepare_drafts(runner)
    except Exception as error:
        logger.info("Kernels that prepare a draft are compiled by the first requests (%r)", error)
    try:
        _map_slots(runner)
    except Exception as error:
        logger.info("The kernel of a step's slots is compiled by the first request (%r)", error)


def _map_slots(runner: Any) -> None:
    """That of ``step-slots``, where it is in use: for no request it fills the slots with pads, which each step does."""
    slots = runner.input_batch.block_table.__dict__.get(step_slots.SLOTS)
    if slots is not None:
        starts = torch.zeros(2, dtype=torch.int32, device=runner.device)
        slots(0, starts, torch.zeros(16, dtype=torch.int64, device=runner.device))


def _correct_counts(runner: Any) -> None:
    """The kernel has one form."""
    from vllm_gemma4_spec.kernels import computed_counts

    computed, drafts = (torch.zeros_like(t) for t in (runner.num_computed_tokens, runner.prev_num_draft_tokens.gpu))
    accepted, previous = (torch.zeros_like(t.gpu[:1]) for t in (runner.num_accepted_tokens, runner.prev_positions))
    counts = torch.zeros_like(computed[:1])
    computed_counts.update(computed, accepted, previous, counts, drafts, torch.zeros_like(counts))


def _prepare_drafts(runner: Any) -> None:
    """vLLM's kernels are specialized on numbers that are 1 or divisible by 16, and on a power of two of the tokens.

    The drafter's buffer of backup tokens is written, as by every step before it is read.
    """
    spec, drafter = runner.speculative_config, runner.drafter
    if spec.disable_padded_drafter_batch or not (spec.use_eagle() or spec.uses_draft_model()):
        return
    int32 = {"dtype": torch.int32, "device": runner.device}
    request = SimpleNamespace(get_token_id=lambda at: 0)
    for num_reqs in (1, 2, 16):
        if num_reqs > runner.max_num_reqs:
            break
        batch = SimpleNamespace(
            num_reqs=num_reqs,
            req_ids=[""] * num_reqs,
            num_tokens_no_spec=np.ones(num_reqs, dtype=np.int32),
            vocab_size=runner.input_batch.vocab_size,
        )
        none_discarded = torch.zeros(num_reqs, dtype=torch.bool, device=runner.device)
        for num_tokens in range(1, runner.num_spec_tokens + 2):
            sampled = torch.zeros(num_reqs, num_tokens, **int32)
            _, counts = drafter.prepare_next_token_ids_padded(sampled, {"": request}, batch, none_discarded)
        starts = torch.arange(num_reqs + 1, dtype=torch.int32)
        metadata = SimpleNamespace(
            num_reqs=num_reqs,
            query_start_loc=starts.to(runner.device),
            query_start_loc_cpu=starts,
            seq_lens=counts,
            _seq_lens_cpu=None,
            _num_computed_tokens_cpu=None,
            max_seq_len=1,
            block_table_tensor=torch.zeros(num_reqs, 1, **int32),
            slot_mapping=torch.zeros(num_reqs, dtype=torch.int64, device=runner.device),
            dcp_local_seq_lens=None,
        )
        drafter.prepare_inputs_padded(
            metadata, SimpleNamespace(cu_num_draft_tokens=torch.zeros(num_reqs, **int32)), counts
        )
