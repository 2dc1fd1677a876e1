"""Invariants of an assistant's draft, checked on the host when ``VLLM_GEMMA4_SPEC_CHECK=1``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from vllm.v1.kv_cache_interface import SlidingWindowSpec

from vllm_gemma4_spec.spec_decode.invariants import InvariantError


def check_draft(runner: Any, groups: Sequence[Any], seq_lens: Tensor, positions: Tensor) -> None:
    """Every length is that of what the target has accepted, and every block that it covers is the request's own.

    Args:
        runner: the model runner; ``requests[...].block_ids`` is the scheduler's word on who owns what.
        groups: attention groups of the assistant's layers.
        seq_lens: ``[num_reqs]`` int32, without rejected tokens.
        positions: ``[num_reqs]`` int64, where the target's last accepted tokens stand.

    Raises:
        InvariantError: names the request, the KV cache group and the block.
    """
    batch = runner.input_batch
    rows = zip(batch.req_ids, seq_lens.tolist(), positions.tolist(), strict=True)
    for row, (req_id, length, position) in enumerate(rows):
        if length != position + 1:
            raise InvariantError(
                f"request {req_id}: drafts from position {position}, but a sequence length of {length}"
            )
        for group in groups:
            table = batch.block_table[group.kv_cache_group_id]
            spec = group.kv_cache_spec
            window = spec.sliding_window if isinstance(spec, SlidingWindowSpec) else length
            ratio = table.blocks_per_kv_block
            owned = runner.requests[req_id].block_ids[group.kv_cache_group_id]
            first, last = max(0, length - window) // table.block_size, (length - 1) // table.block_size
            blocks = table.get_device_tensor(row + 1)[row, first : last + 1].tolist()
            for index, block in enumerate(blocks, first):
                want = owned[index // ratio] if index // ratio < len(owned) else None
                if want is None or block != want * ratio + index % ratio:
                    raise InvariantError(
                        f"request {req_id}: a draft would read block {block} of KV cache group "
                        f"{group.kv_cache_group_id} for position {index * table.block_size}, which it does not own"
                    )
