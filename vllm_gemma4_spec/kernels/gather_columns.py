"""Columns of all ranks, gathered by vLLM's custom all-reduce, one kernel where rows are few: all-gathers are NCCL's."""

from __future__ import annotations

import functools

import torch.nn.functional as F
from torch import Tensor

from vllm_gemma4_spec.kernels import ranks

OPERATOR = "gemma4_spec_gather_columns"


def gather_columns(x: Tensor, group_name: str) -> Tensor:
    """``[..., width]`` of each rank -> ``[..., width * ranks]`` on all, the bits of an all-gather.

    Whether the all-reduce takes it goes by the shape, which is the same on all ranks.
    """
    group = ranks.group(group_name)
    width, count, mine = x.shape[-1], group.world_size, group.rank_in_group
    whole = x.new_empty(*x.shape[:-1], width * count, device="meta")
    custom = ranks.custom_all_reduce(group)
    if custom is None or not custom.should_custom_ar(whole):
        return group._all_gather_out_place(x, -1)
    # Zeros in the others' places; negative ones, as x + -0.0 has the bits of x where x is a zero, too.
    return custom.custom_all_reduce(F.pad(x, (mine * width, (count - mine - 1) * width), value=-0.0))


def _shape(x: Tensor, group_name: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] * ranks.group(group_name).world_size)


@functools.cache
def register_operator() -> None:
    """``torch.ops.vllm.gemma4_spec_gather_columns``: opaque to torch.compile, which sees its shape only."""
    from vllm.utils.torch_utils import direct_register_custom_op

    direct_register_custom_op(OPERATOR, gather_columns, fake_impl=_shape)
