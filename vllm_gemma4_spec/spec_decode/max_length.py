"""Drafting goes on for a batch in which one request nears the maximum length, the drafter's or the target's."""

from __future__ import annotations

import contextvars
import functools
import sys
from collections.abc import Callable
from typing import Any

from vllm_gemma4_spec import scope

# Attribute of a model runner: the length at which 0.19.1 stops drafting; of a proposer: its own maximum length, where
# that is shorter than the target's.
LIMIT = "_gemma4_spec_length_limit"
# A proposer in scope drafts: `eagle_step_update_slot_mapping_and_metadata` is given tensors and no config.
_drafting: contextvars.ContextVar[bool] = contextvars.ContextVar("gemma4_drafting", default=False)


def sample_tokens(original: Callable[..., Any]) -> Callable[..., Any]:
    """``GPUModelRunner.sample_tokens``: draft for all requests unless the shortest of them is too long, too.

    The original looks at the longest. What a drafter is not run for is missing from its KV cache ever after, and
    from every block of it that prefix caching hands on.

    Patch: ``length-limit``. Evidence:
    ``tests/spec_decode/test_max_length.py::test_without_the_patch_acceptance_decays``. Related upstream change: none
    found.
    """

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        spec = self.speculative_config
        scoped = scope.gemma4_speculation(self.vllm_config)
        if scoped and spec.uses_draft_model() and self.execute_model_state is not None:
            limit = self.__dict__.setdefault(LIMIT, self.effective_drafter_max_model_len)
            shortest = self.optimistic_seq_lens_cpu[: self.input_batch.num_reqs].min().item()
            # Data-parallel ranks agree on the size of every pass, so none may leave one out.
            together = self.parallel_config.data_parallel_size > 1
            fits = together or shortest + self.num_spec_tokens <= limit
            self.effective_drafter_max_model_len = sys.maxsize if fits else limit
        return original(self, *args, **kwargs)

    return wrapper


def proposer_init(original: Callable[..., None]) -> Callable[..., None]:
    """``SpecDecodeBaseProposer.__init__``: a draft model with a shorter maximum length masks what lies beyond it.

    0.19.1 masks slots and positions from the target's maximum length on.

    Patch: ``length-limit``. Evidence:
    ``tests/spec_decode/test_max_length.py::test_without_the_patch_acceptance_decays``. Related upstream change: none
    found.
    """

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self.method == "draft_model" and scope.gemma4_engine(self.vllm_config):
            longest = self.draft_model_config.max_model_len
            if longest < self.max_model_len:
                self.max_model_len = longest
                setattr(self, LIMIT, longest)

    return __init__


def set_inputs_first_pass(original: Callable[..., Any]) -> Callable[..., Any]:
    """``set_inputs_first_pass``: no position past the drafter's rotary cache. What is drafted there is rejected.

    Patch: ``length-limit``. Evidence:
    ``tests/spec_decode/test_max_length.py::test_without_the_patch_acceptance_decays``. Related upstream change: none
    found.
    """

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = original(self, *args, **kwargs)
        limit = self.__dict__.get(LIMIT)
        if limit is not None:
            self._get_positions(made[0]).clamp_(max=limit - 1)
        return made

    return wrapper


def propose(original: Callable[..., Any]) -> Callable[..., Any]:
    """``SpecDecodeBaseProposer.propose``: says whose passes they are.

    Patch: ``length-limit``. Evidence:
    ``tests/spec_decode/test_max_length.py::test_without_the_patch_acceptance_decays``. Related upstream change: none
    found.
    """

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        token = _drafting.set(scope.gemma4_speculation(self.vllm_config))
        try:
            return original(self, *args, **kwargs)
        finally:
            _drafting.reset(token)

    return wrapper


def eagle_step_update(original: Callable[..., None]) -> Callable[..., None]:
    """``eagle_step_update_slot_mapping_and_metadata``: who has passed the maximum length stays past it.

    The original puts such a request at position 0, so that the draft after the next would write to position 1.

    Patch: ``length-limit``. Evidence:
    ``tests/spec_decode/test_max_length.py::test_without_the_patch_acceptance_decays``. Related upstream change: none
    found.
    """

    @functools.wraps(original)
    def wrapper(**kwargs: Any) -> None:
        original(**kwargs)
        if not _drafting.get():
            return
        positions, slots = kwargs["out_clamped_positions"], kwargs["out_slot_mapping"]
        positions.masked_fill_(slots[: positions.shape[0]] < 0, kwargs["max_model_len"] - 1)

    return wrapper
