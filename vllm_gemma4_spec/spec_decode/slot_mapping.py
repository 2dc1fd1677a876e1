"""Slot mappings of all KV cache groups at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

PADDING_SLOT_ID = -1  # vLLM's own: the attention backends skip the write


def group_slot_mappings(
    block_tables: Sequence[torch.Tensor],
    block_sizes: Sequence[int],
    positions: torch.Tensor,
    query_ends: torch.Tensor,
    token_arange: torch.Tensor,
    primary_slots: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Look every token's slot up in every group's block table.

    A token that has no slot in the primary group (rejected, past the maximum length, padding) has none
    in any: that is decided by positions and masks alone, which the groups share.

    Args:
        block_tables: per group ``[num_reqs, max_blocks_g]`` int32, kernel block ids.
        block_sizes: per group, tokens in a kernel block.
        positions: ``[num_tokens]`` int64.
        query_ends: ``[num_reqs]`` int32, one past each request's last token (``query_start_loc[1:]``).
        token_arange: ``[num_tokens]`` int32, 0, 1, 2, …
        primary_slots: ``[num_tokens]`` int64, the primary group's slot mapping.
        out: ``[num_groups, >= num_tokens]`` int64, written in place.
    """
    num_tokens = positions.shape[0]
    # No repeat_interleave: on a GPU its output size would have to be read back.
    rows = torch.searchsorted(query_ends, token_arange, right=True)
    written = primary_slots >= 0
    for group, (table, block_size) in enumerate(zip(block_tables, block_sizes, strict=True)):
        # The clamp keeps masked positions inside the table.
        block = (positions // block_size).clamp_(max=table.shape[1] - 1)
        slots = table[rows, block].to(torch.int64) * block_size + positions % block_size
        out[group, :num_tokens] = torch.where(written, slots, PADDING_SLOT_ID)
