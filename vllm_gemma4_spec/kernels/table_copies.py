"""Block tables of all KV cache groups to the card, by one kernel that reads the host's pinned memory.

vLLM's second model runner reads pinned memory from kernels, too; its function gives the addresses here.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from vllm.triton_utils import tl, triton

from vllm_gemma4_spec.kernels.slot_mapping import where_rows_are

BLOCK = 1024  # entries per inner step


@triton.jit
def _copy_rows(  # type: ignore[no-untyped-def]
    sources,  # [num_groups] int64: addresses of int32 block tables in pinned memory
    counts,  # [num_groups] int64: addresses of [max_num_reqs] int32 in pinned memory: entries in use
    targets,  # [num_groups] int64: addresses of the tables on the device, of the same shape
    widths,  # [num_groups] int64: entries per row
    whole: tl.constexpr,  # read all entries: what lies behind those in use may not be 0
    block: tl.constexpr,
):
    """Grid ``(num_reqs, num_groups)``."""
    request, group = tl.program_id(0), tl.program_id(1)
    width = tl.load(widths + group)
    source = tl.load(sources + group).to(tl.pointer_type(tl.int32)) + request * width
    target = tl.load(targets + group).to(tl.pointer_type(tl.int32)) + request * width
    used = width
    if not whole:
        used = tl.load(tl.load(counts + group).to(tl.pointer_type(tl.int32)) + request).to(tl.int64)
    for first in range(0, width, block):
        entry = first + tl.arange(0, block)
        tl.store(target + entry, tl.load(source + entry, mask=entry < used, other=0), mask=entry < width)


def _view(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A pinned tensor as the device addresses it."""
    if device.type == "cpu":  # Triton's interpreter
        return tensor
    from vllm.utils.torch_utils import get_accelerator_view_from_cpu_tensor

    return get_accelerator_view_from_cpu_tensor(tensor)


class TableCopies:
    """Copies rows of all groups' block tables to the device: if ``clean`` what a request uses of its row, then zeros.

    Args:
        tables: vLLM's ``BlockTable`` of each group, whose buffers stay where they are. Their ``num_blocks_per_row``
            move to pinned memory.
        clean: whether entries behind those in use are 0 on the host, as the patch ``own-blocks`` has them; if not,
            whole rows are read.
    """

    def __init__(self, tables: Sequence[Any], *, clean: bool) -> None:
        self._tables, self._whole = tables, not clean
        pinned = tables[0].block_table.cpu.is_pinned()
        self._counts = torch.zeros(len(tables), tables[0].max_num_reqs, dtype=torch.int32, pin_memory=pinned)
        for table, counts in zip(tables, self._counts.numpy(), strict=True):
            counts[:] = table.num_blocks_per_row
            table.num_blocks_per_row = counts

    @functools.cached_property
    def _groups(self) -> tuple[torch.Tensor, ...]:
        """What the kernel knows of the groups. Made when first used, as ``DraftGroups.slot_kernel``, for sleep mode."""
        device = [t.block_table.gpu for t in self._tables]
        self._views = [_view(t, device[0].device) for t in (self._counts, *(t.block_table.cpu for t in self._tables))]
        counts, *host = self._views
        values = [t.data_ptr() for t in host], [t.data_ptr() for t in counts]
        sources, used = (torch.tensor(of, dtype=torch.int64, device=device[0].device) for of in values)
        return (sources, used, *where_rows_are(device))

    def __call__(self, num_reqs: int) -> None:
        """As ``BlockTable.commit_block_table`` of each."""
        num_groups, most = self._counts.shape
        _copy_rows[(min(num_reqs, most), num_groups)](*self._groups, whole=self._whole, block=BLOCK)


def reachable(tables: Sequence[Any]) -> bool:
    """Whether a kernel can read the tables of the host: all of them are pinned."""
    return all(t.block_table.cpu.is_pinned() for t in tables)
