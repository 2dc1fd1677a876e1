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
    """Every slot is its position's own, in a block its request owns in that group; lengths follow the positions.

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
            size = table.block_size * table.blocks_per_kv_block
            owned = runner.requests[req_id].block_ids[gid]
            for place, (at, slot) in enumerate(zip(position[start:end], of_group[start:end], strict=True)):
                if slot < 0:
                    continue
                where = f"request {req_id}: position {at} of KV cache group {gid}"
                block = slot // size
                if at != position[start] + place:
                    raise InvariantError(f"{where} is out of order: expected position {position[start] + place}")
                if block not in owned:
                    raise InvariantError(f"{where} would be written to block {block}, which it does not own")
                if owned[at // size] != block or slot % size != at % size:
                    raise InvariantError(f"{where} would be written to slot {slot}, which is another position's")


class CheckedBuilder:
    """Stands in a metadata builder's place where the drafter is in one KV cache group, and checks every pass."""

    def __init__(self, proposer: Any, runner: Any, builder: Any) -> None:
        self._proposer, self._runner, self._builder = proposer, runner, builder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._builder, name)

    def build_for_drafting(self, common_attn_metadata: CommonAttentionMetadata, draft_index: int) -> Any:
        cad = common_attn_metadata
        positions = self._proposer._get_positions(cad.num_actual_tokens)
        positions = positions if positions.dim() == 1 else positions[0]  # M-RoPE: alike for text
        slots = cad.slot_mapping[: cad.num_actual_tokens].unsqueeze(0)
        check_pass(self._runner, [max(self._proposer.kv_cache_gid, 0)], cad, positions, slots)
        return self._builder.build_for_drafting(common_attn_metadata=cad, draft_index=draft_index)
