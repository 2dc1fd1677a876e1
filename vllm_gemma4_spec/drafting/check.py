"""Invariants of a draft pass, checked on the host when ``VLLM_GEMMA4_SPEC_CHECK=1``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_gemma4_spec.errors import Gemma4SpecError


class InvariantError(Gemma4SpecError):
    """A draft pass would write where it must not, or its lengths and positions disagree."""


def check_pass(
    runner: Any, gids: Sequence[int], cad: CommonAttentionMetadata, positions: torch.Tensor, slots: torch.Tensor
) -> None:
    """Every slot lies in a block that its request owns in that group; sequence lengths follow the positions.

    Args:
        runner: the model runner; ``requests[...].block_ids`` is the scheduler's word on who owns what.
        gids: KV cache group ids, one per row of ``slots``.
        cad: metadata of the pass.
        positions: ``[num_tokens]`` int64.
        slots: ``[num_groups, num_tokens]`` int64.

    Raises:
        InvariantError: names the request, the KV cache group, the position and the block.
    """
    batch = runner.input_batch
    starts = cad.query_start_loc[: cad.num_reqs + 1].tolist()
    seq_lens = cad.seq_lens[: cad.num_reqs].tolist()
    position, slot_rows = positions.tolist(), slots.tolist()
    for row in range(cad.num_reqs):
        req_id, (start, end) = batch.req_ids[row], starts[row : row + 2]
        if end == start:
            continue
        # Past the maximum length positions are clamped and nothing is written.
        if slot_rows[0][start] >= 0 and position[start] + (end - start) != seq_lens[row]:
            raise InvariantError(
                f"request {req_id}: {end - start} draft inputs from position {position[start]} on, "
                f"but a sequence length of {seq_lens[row]}"
            )
        for gid, of_group in zip(gids, slot_rows, strict=True):
            table = batch.block_table[gid]
            owned = set(runner.requests[req_id].block_ids[gid])
            for at, slot in zip(position[start:end], of_group[start:end], strict=True):
                block = slot // (table.block_size * table.blocks_per_kv_block)
                if slot >= 0 and block not in owned:
                    raise InvariantError(
                        f"request {req_id}: position {at} of KV cache group {gid} would be written to block {block}, "
                        f"which it does not own"
                    )
