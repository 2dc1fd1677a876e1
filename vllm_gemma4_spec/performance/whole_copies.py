"""A draft model that is whole on every tensor-parallel rank: no all-reduce in a draft pass.

Without the fused all-reduce two all-reduces a layer cost a small drafter what the second card saves it. With
``draft_tensor_parallel_size: 1`` in the speculative config each rank builds, loads and runs all of it, as vLLM's
``patch_tensor_parallel_group`` is for: the drafter sees a tensor-parallel group of one.

Ranks must agree on every draft, since each embeds its own. Their kernels may have been tuned apart, so rank 0's drafts
go to all: one broadcast of ``[num_reqs, k]`` token ids a step, inside the graph where there is one.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from vllm_gemma4_spec import scope

# Attribute of a proposer whose draft model is whole on each rank: its tensor-parallel group, of one rank.
GROUP = "_gemma4_spec_draft_tp_group"


def is_whole(proposer: Any) -> bool:
    """Whether the drafter is on one rank while the target is on several."""
    spec = getattr(proposer, "speculative_config", None)
    if spec is None:
        return False
    sizes = (spec.draft_parallel_config.tensor_parallel_size, spec.target_parallel_config.tensor_parallel_size)
    return spec.uses_draft_model() and sizes[0] == 1 < sizes[1] and scope.gemma4_model(spec.draft_model_config)


def raise_if_draft_tp_mismatch(original: Callable[[Any], None]) -> Callable[[Any], None]:
    """``DraftModelProposer._raise_if_draft_tp_mismatch``: a drafter on one rank is none.

    Patch: ``whole-copies``. Evidence:
    ``tests/patching/test_stock.py::test_a_whole_drafter_beside_several_ranks_is_refused``. Related upstream change:
    none found.
    """

    @functools.wraps(original)
    def wrapper(self: Any) -> None:
        if not is_whole(self):
            original(self)

    return wrapper


@contextlib.contextmanager
def _alone(proposer: Any) -> Iterator[bool]:
    """The drafter's own tensor-parallel group is vLLM's while this lasts; yields whether there is one."""
    if not is_whole(proposer):
        yield False
        return
    from vllm.distributed import parallel_state

    group = proposer.__dict__.get(GROUP)
    if group is None:
        group = _group_of_one()
        setattr(proposer, GROUP, group)
    with parallel_state.patch_tensor_parallel_group(group):
        yield True


def _group_of_one() -> Any:
    """Every rank makes all of these groups, in the same order, and is in one of them."""
    from vllm.distributed import parallel_state

    world = parallel_state.get_world_group()
    backend = torch.distributed.get_backend(world.device_group)
    ranks = [[rank] for rank in range(torch.distributed.get_world_size())]
    return parallel_state.init_model_parallel_group(ranks, world.local_rank, backend, group_name="draft_tp")


def alone(original: Callable[..., Any]) -> Callable[..., Any]:
    """``load_model`` and ``dummy_run`` of a proposer: as one rank.

    Patch: ``whole-copies``. Evidence:
    ``tests/patching/test_stock.py::test_a_whole_drafter_beside_several_ranks_is_refused``. Related upstream change:
    none found.
    """

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _alone(self):
            return original(self, *args, **kwargs)

    return wrapper


def initialize_attn_backend(original: Callable[..., None]) -> Callable[..., None]:
    """``SpecDecodeBaseProposer.initialize_attn_backend``: metadata for the drafter's own number of heads.

    A builder takes its buffers' sizes from the target's heads on this rank, which may be fewer.

    Patch: ``whole-copies``. Evidence:
    ``tests/patching/test_stock.py::test_a_whole_drafter_beside_several_ranks_is_refused``. Related upstream change:
    none found.
    """

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        if not is_whole(self):
            original(self, *args, **kwargs)
            return
        kept, own = self.vllm_config, copy.copy(self.vllm_config)
        own.model_config = self.speculative_config.draft_model_config
        own.parallel_config = self.speculative_config.draft_parallel_config
        self.vllm_config = own
        try:
            original(self, *args, **kwargs)
        finally:
            self.vllm_config = kept

    return wrapper


def propose(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``SpecDecodeBaseProposer.propose``: as one rank, and then rank 0's drafts everywhere.

    Patch: ``whole-copies``. Evidence:
    ``tests/patching/test_stock.py::test_a_whole_drafter_beside_several_ranks_is_refused``. Related upstream change:
    none found.
    """

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        with _alone(self) as whole:
            drafts = original(self, *args, **kwargs)
        return _of_rank_0(drafts.contiguous()) if whole else drafts

    return wrapper


def _of_rank_0(drafts: torch.Tensor) -> torch.Tensor:
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    nccl = getattr(group.device_communicator, "pynccl_comm", None)
    if nccl is None or nccl.disabled:
        group.broadcast(drafts, src=0)
    else:
        nccl.broadcast(drafts, src=0)  # as vLLM's own collectives inside a CUDA graph
    return drafts
