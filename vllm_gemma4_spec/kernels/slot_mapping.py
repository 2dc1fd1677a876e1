"""Slots of tokens in all KV cache groups: of a step, of a draft's first pass in the primary one, of each of its passes.

For the last the PyTorch form, which the CPU runs and the tests compare with, is
``spec_decode.slot_mapping.group_slot_mappings``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from vllm.triton_utils import tl, triton

BLOCK = 64  # tokens per inner step: a decode step has k + 2, a prefill chunk thousands


@triton.jit
def _group_slot_mapping_kernel(  # type: ignore[no-untyped-def]
    table_ptrs,  # [num_groups] int64: addresses of int32 block tables
    table_strides,  # [num_groups] int64: entries per row
    block_sizes,  # [num_groups] int64
    query_start_loc,  # [num_reqs + 1] int32
    positions,  # [num_tokens] int64
    primary_slots,  # [num_tokens] int64
    num_live,  # [1] int32: requests from here on are padding of a CUDA graph
    out,  # [num_groups, out_stride] int64
    out_stride,
    pad: tl.constexpr,
    block: tl.constexpr,
):
    """Grid ``(num_reqs, num_groups)``: one program per request and group."""
    request = tl.program_id(0)
    group = tl.program_id(1)
    start = tl.load(query_start_loc + request)
    end = tl.load(query_start_loc + request + 1)
    live = request < tl.load(num_live)
    stride = tl.load(table_strides + group)
    block_size = tl.load(block_sizes + group)
    row = tl.load(table_ptrs + group).to(tl.pointer_type(tl.int32)) + request * stride
    for first in range(start, end, block):
        token = first + tl.arange(0, block)
        mask = token < end
        position = tl.load(positions + token, mask=mask, other=0)
        written = mask & live & (tl.load(primary_slots + token, mask=mask, other=pad) >= 0)
        # The clamp keeps positions that are not written inside the table.
        index = tl.minimum(position // block_size, stride - 1)
        number = tl.load(row + index, mask=written, other=0).to(tl.int64)
        slot = number * block_size + position % block_size
        tl.store(out + group * out_stride + token, tl.where(written, slot, pad), mask=mask)


def where_rows_are(tables: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Addresses and entries per row of block tables, ``[num_groups]`` int64 each, where the tables are."""
    values = [t.data_ptr() for t in tables], [t.stride(0) for t in tables]
    pointers, strides = (torch.tensor(of, dtype=torch.int64, device=tables[0].device) for of in values)
    return pointers, strides


class GroupSlotKernel:
    """Launches the kernel for a fixed set of groups; nothing is allocated per call.

    It is not launched early, and must not be: attention of a pass may read the metadata before it waits for the kernel
    ahead, as what updates it has ended when this kernel starts.

    Args:
        block_sizes: per group, tokens in a kernel block.
        out: ``[num_groups, max_tokens]`` int64, written in place.
    """

    def __init__(self, block_sizes: Sequence[int], out: torch.Tensor) -> None:
        self._out = out
        self._sizes = torch.tensor(list(block_sizes), dtype=torch.int64, device=out.device)
        self._bound: list[int] = []
        # [1] int32: how many requests are no padding. A CUDA graph is captured with its own tensor here.
        self.num_live = torch.full((1,), 2**31 - 1, dtype=torch.int32, device=out.device)

    def bind(self, tables: Sequence[torch.Tensor]) -> None:
        """Take the groups' block tables, ``[num_reqs, max_blocks_g]`` int32 each; free if they are the same."""
        addresses = [t.data_ptr() for t in tables]
        if addresses != self._bound:
            self._bound = addresses
            self._pointers, self._strides = where_rows_are(tables)

    def __call__(
        self, query_start_loc: torch.Tensor, num_reqs: int, positions: torch.Tensor, primary_slots: torch.Tensor
    ) -> None:
        """Same result as ``group_slot_mappings``; ``query_start_loc`` is ``[>= num_reqs + 1]`` int32."""
        _group_slot_mapping_kernel[(num_reqs, self._out.shape[0])](
            self._pointers,
            self._strides,
            self._sizes,
            query_start_loc,
            positions,
            primary_slots,
            self.num_live,
            self._out,
            self._out.stride(0),
            pad=-1,
            block=BLOCK,
        )


@triton.jit
def _first_pass_slots(  # type: ignore[no-untyped-def]
    table,  # [num_reqs, max_blocks] int32
    table_stride,
    query_start_loc,  # [num_reqs + 1] int32, without the tokens that are added
    positions,  # [num_tokens] int64
    rejected,  # [num_tokens] uint8
    out,  # [num_tokens] int64
    added,
    block_size,
    longest,
    pad: tl.constexpr,
    block: tl.constexpr,
):
    """Grid ``(num_reqs,)``."""
    request = tl.program_id(0)
    start = tl.load(query_start_loc + request) + request * added
    end = tl.load(query_start_loc + request + 1) + (request + 1) * added
    row = table + request.to(tl.int64) * table_stride
    for first in range(start, end, block):
        token = first + tl.arange(0, block)
        mask = token < end
        position = tl.load(positions + token, mask=mask, other=0)
        written = mask & (position < longest) & (tl.load(rejected + token, mask=mask, other=1) == 0)
        number = tl.load(row + position // block_size, mask=written, other=0).to(tl.int64)
        tl.store(out + token, tl.where(written, number * block_size + position % block_size, pad), mask=mask)


def first_pass_slots(
    table: torch.Tensor,
    query_start_loc: torch.Tensor,
    positions: torch.Tensor,
    rejected: torch.Tensor,
    added: int,
    block_size: int,
    longest: int,
) -> torch.Tensor:
    """``[num_tokens]`` int64: where each token of a first pass is written, -1: nowhere.

    Args:
        table: ``[num_reqs, max_blocks]`` int32.
        query_start_loc: ``[num_reqs + 1]`` int32, of the target's step.
        positions: ``[num_tokens]`` int64.
        rejected: ``[num_tokens]`` bool.
        added: tokens that each request has more of than in the target's step.
        longest: positions from here on are written nowhere.
    """
    out = torch.empty_like(positions)
    _first_pass_slots[(len(table),)](
        table,
        table.stride(0),
        query_start_loc,
        positions,
        rejected.view(torch.uint8),
        out,
        added,
        block_size,
        longest,
        pad=-1,
        block=BLOCK,
    )
    return out


@triton.jit(do_not_specialize=["num_tokens"])
def _step_slots(  # type: ignore[no-untyped-def]
    table_ptrs,  # [num_groups] int64: addresses of int32 block tables
    table_strides,  # [num_groups] int64: entries per row
    block_sizes,  # [num_groups] int64
    out_ptrs,  # [num_groups] int64: addresses of [longest] int64 slots
    query_start_loc,  # [num_reqs + 1] int32
    positions,  # [num_tokens] int64
    num_tokens,
    longest,
    pad: tl.constexpr,
    block: tl.constexpr,
):
    """Grid ``(num_reqs + 1, num_groups)``; the last program of a group fills the rest of its slots."""
    request = tl.program_id(0)
    group = tl.program_id(1)
    out = tl.load(out_ptrs + group).to(tl.pointer_type(tl.int64))
    if request == tl.num_programs(0) - 1:
        for first in range(num_tokens, longest, 1024):
            token = first + tl.arange(0, 1024)
            tl.store(out + token, pad, mask=token < longest)
    else:
        start = tl.load(query_start_loc + request)
        end = tl.load(query_start_loc + request + 1)
        block_size = tl.load(block_sizes + group)
        row = tl.load(table_ptrs + group).to(tl.pointer_type(tl.int32)) + request * tl.load(table_strides + group)
        for first in range(start, end, block):
            token = first + tl.arange(0, block)
            mask = token < end
            position = tl.load(positions + token, mask=mask, other=0)
            number = tl.load(row + position // block_size, mask=mask, other=0).to(tl.int64)
            tl.store(out + token, number * block_size + position % block_size, mask=mask)


class StepSlots:
    """Where a step's tokens are written in every KV cache group, by one launch for all groups.

    Not launched early, as :class:`GroupSlotKernel`.

    Args:
        tables: vLLM's ``BlockTable`` of each group, whose buffers stay where they are.
    """

    def __init__(self, tables: Sequence[Any]) -> None:
        self._tables, self._longest = tables, tables[0].max_num_batched_tokens

    @functools.cached_property
    def _groups(self) -> tuple[torch.Tensor, ...]:
        """What the kernel knows of the groups. Made when first used, as ``DraftGroups.slot_kernel``, for sleep mode."""
        outs = [t.slot_mapping.gpu for t in self._tables]
        sizes = torch.tensor([t.block_size for t in self._tables], dtype=torch.int64, device=outs[0].device)
        addresses = torch.tensor([out.data_ptr() for out in outs], dtype=torch.int64, device=outs[0].device)
        return (*where_rows_are([t.block_table.gpu for t in self._tables]), sizes, addresses)

    def __call__(self, num_reqs: int, query_start_loc: torch.Tensor, positions: torch.Tensor) -> None:
        """As ``BlockTable.compute_slot_mapping`` of each: ``[>= num_reqs + 1]`` int32, ``[num_tokens]`` int64."""
        _step_slots[(num_reqs + 1, len(self._groups[0]))](
            *self._groups, query_start_loc, positions, len(positions), self._longest, pad=-1, block=BLOCK
        )
