"""PyTorch forms of the Triton kernels in ``vllm.v1.spec_decode.utils`` (0.19.1).

B is the number of requests. Nothing here loops over requests or tokens or reads a tensor's value on the host.
"""

from __future__ import annotations

import torch

from vllm_gemma4_spec.cpu.launch import CpuKernel, Grid


@CpuKernel
def eagle_step_slot_mapping_metadata(
    grid: Grid,  # (number of rows, padding rows included,)
    positions: torch.Tensor,  # [B] int64
    block_table: torch.Tensor,  # [B, n_blocks_per_req] int32
    block_table_stride: int,
    seq_lens: torch.Tensor,  # [B] int32, updated in place
    out_clamped_positions: torch.Tensor,  # [B] int64, may be `positions` itself
    out_slot_mapping: torch.Tensor,  # [grid[0]] int64
    block_size: int,
    max_model_len: int,
    n_blocks_per_req: int,
    PAD_ID: int,
    batch_size: int,
) -> None:
    """Advance every request by one draft token; past ``max_model_len`` it goes to position 0 and slot ``PAD_ID``.

    Patch: ``cpu-kernels``. Evidence: ``tests/patching/test_stock.py::test_triton_kernels_cannot_be_launched_on_a_cpu``.
    Related upstream change: none found by number; 0.20.0 drafts on a CPU.
    """
    rows = min(grid[0], batch_size)
    position = positions[:rows] + 1
    past_end = position >= max_model_len
    position.masked_fill_(past_end, 0)

    block = (position // block_size).clamp_(max=n_blocks_per_req - 1)
    block_id = block_table[:rows].gather(1, block.long().unsqueeze(1)).squeeze(1)
    slot = block_id.long() * block_size + position % block_size
    seq_len = (seq_lens[:rows] + 1).masked_fill_(past_end, 1).clamp_(max=max_model_len)

    out_clamped_positions[:rows] = position
    out_slot_mapping[:rows] = slot.masked_fill_(past_end, PAD_ID)
    out_slot_mapping[rows : grid[0]] = PAD_ID
    seq_lens[:rows] = seq_len


@CpuKernel
def eagle_prepare_inputs_padded(
    grid: Grid,  # (B,)
    cu_num_draft_tokens: torch.Tensor,  # [B] int32, inclusive
    valid_sampled_tokens_count: torch.Tensor,  # [B] int32, accepted drafts + 1; 0 if discarded
    query_start_loc_gpu: torch.Tensor,  # [B + 1] int32
    token_indices_to_sample: torch.Tensor,  # [B] int32, output
    num_rejected_tokens_gpu: torch.Tensor,  # [B] int32, output
    num_reqs: int,
) -> None:
    """Count each request's rejected drafts and find its last token that was not rejected.

    Patch: ``cpu-kernels``. Evidence: ``tests/patching/test_stock.py::test_triton_kernels_cannot_be_launched_on_a_cpu``.
    Related upstream change: none found by number; 0.20.0 drafts on a CPU.
    """
    rows = min(grid[0], num_reqs)
    cu = cu_num_draft_tokens[:rows]
    num_drafts = torch.diff(cu, prepend=cu.new_zeros(1))
    num_rejected = torch.where(num_drafts > 0, num_drafts + 1 - valid_sampled_tokens_count[:rows], 0)
    token_indices_to_sample[:rows] = query_start_loc_gpu[1 : rows + 1] - 1 - num_rejected
    num_rejected_tokens_gpu[:rows] = num_rejected


@CpuKernel
def eagle_prepare_next_token_padded(
    grid: Grid,  # (B,)
    sampled_token_ids: torch.Tensor,  # [B, num_sampled_tokens_per_req] int32, -1 where rejected
    discard_request_mask: torch.Tensor,  # [>= B] bool
    backup_next_token_ids: torch.Tensor,  # [>= B] int32
    next_token_ids: torch.Tensor,  # [B] int32, output
    valid_sampled_tokens_count: torch.Tensor,  # [B] int32, output
    vocab_size: int,
    num_sampled_tokens_per_req: int,
    num_reqs: int,
    stride_sampled_token_ids: int,
    BLOCK_SIZE_TOKENS: int,
) -> None:
    """Take each request's last valid sampled token, or its backup token if it has none or is discarded.

    Patch: ``cpu-kernels``. Evidence: ``tests/patching/test_stock.py::test_triton_kernels_cannot_be_launched_on_a_cpu``.
    Related upstream change: none found by number; 0.20.0 drafts on a CPU.
    """
    rows = min(grid[0], num_reqs)
    sampled = sampled_token_ids[:rows, :num_sampled_tokens_per_req]
    kept = ~discard_request_mask[:rows].bool()
    valid = (sampled != -1) & (sampled < vocab_size) & kept.unsqueeze(1)
    valid_count = valid.sum(1)

    columns = torch.arange(sampled.shape[1], device=sampled.device)
    last_valid = torch.where(valid, columns, 0).amax(1, keepdim=True)
    last_token = sampled.gather(1, last_valid).squeeze(1)
    next_token_ids[:rows] = torch.where(valid_count > 0, last_token, backup_next_token_ids[:rows])
    valid_sampled_tokens_count[:rows] = valid_count


@CpuKernel
def copy_and_expand_eagle_inputs(
    grid: Grid,  # (B, blocks that cover the longest request)
    target_token_ids: torch.Tensor,  # [total_input_tokens] int32
    target_positions: torch.Tensor,  # [total_input_tokens] int64
    next_token_ids: torch.Tensor,  # [B] int32
    out_input_ids: torch.Tensor,  # [>= total output] int32
    out_positions: torch.Tensor,  # [>= total output] int64
    out_is_rejected_token_mask: torch.Tensor,  # [>= total output] bool
    out_is_masked_token_mask: torch.Tensor,  # [>= total output] bool
    out_new_token_indices: torch.Tensor,  # [B * num_padding_slots_per_request] int32
    out_hidden_state_mapping: torch.Tensor,  # [total_input_tokens] int32, written if shift_input_ids
    query_start_loc: torch.Tensor,  # [B + 1] int32
    query_end_loc: torch.Tensor,  # [B] int32, last input token that was not rejected
    padding_token_id: int,
    parallel_drafting_token_id: int,
    total_input_tokens: int,
    num_padding_slots_per_request: int,
    shift_input_ids: bool,
    BLOCK_SIZE_TOKENS: int,
) -> None:
    """Lay out each request's draft inputs: valid tokens, the next token, parallel-drafting slots, rejected tokens.

    A request of n input tokens gets n + ``num_padding_slots_per_request`` output tokens, one less if
    ``shift_input_ids`` drops its first token, so the outputs lie one after another without gaps.

    Patch: ``cpu-kernels``. Evidence: ``tests/patching/test_stock.py::test_triton_kernels_cannot_be_launched_on_a_cpu``.
    Related upstream change: none found by number; 0.20.0 drafts on a CPU.
    """
    rows, device = grid[0], target_token_ids.device
    slots = num_padding_slots_per_request
    offset = int(shift_input_ids)  # tokens dropped at the front of each request
    start, next_start = query_start_loc[:rows], query_start_loc[1 : rows + 1]
    request = torch.arange(rows, device=device, dtype=start.dtype)
    out_start = start + request * (slots - offset)  # [B]
    out_len = next_start - start + slots - offset  # [B]
    num_valid = query_end_loc[:rows] - start + 1 - offset  # [B], -1 if all were rejected and one is dropped

    # Per output token: its request, and its place j in that request.
    out_index = torch.arange(total_input_tokens + rows * (slots - offset), device=device, dtype=start.dtype)
    row = torch.searchsorted(out_start, out_index, right=True) - 1
    j = out_index - out_start[row]
    place = j - num_valid[row]  # < 0: valid; 0: next token; 1..slots-1: parallel drafting; the rest: rejected
    written = j < out_len[row]
    is_masked = (place > 0) & (place < slots)
    is_rejected = place >= slots

    source = (start[row] + offset + j).clamp_(max=total_input_tokens - 1)
    token_ids = torch.where(place < 0, target_token_ids[source], padding_token_id)
    token_ids = torch.where(place == 0, next_token_ids[row], token_ids)
    token_ids = torch.where(is_masked, parallel_drafting_token_id, token_ids)
    token_ids = torch.where(is_rejected, padding_token_id, token_ids)
    # A request without tokens may start past the last position.
    first_position = target_positions[start.clamp(max=target_positions.shape[0] - 1)]
    positions = torch.where(is_rejected, 0, first_position[row] + j)

    _write(out_input_ids[: len(out_index)], written, token_ids)
    _write(out_positions[: len(out_index)], written, positions)
    _write(out_is_rejected_token_mask[: len(out_index)], written, is_rejected)
    _write(out_is_masked_token_mask[: len(out_index)], written, is_masked)

    slot = num_valid.unsqueeze(1) + torch.arange(slots, device=device, dtype=start.dtype)  # [B, slots]
    _write(
        out_new_token_indices[: rows * slots].view(rows, slots),
        slot >= 0,
        out_start.unsqueeze(1) + slot,
    )
    if shift_input_ids:
        source = torch.arange(total_input_tokens, device=device, dtype=start.dtype)
        row = torch.searchsorted(start, source, right=True) - 1
        mapping = out_hidden_state_mapping[:total_input_tokens]
        _write(mapping, source < next_start[row], source - start[row] + out_start[row])


def _write(out: torch.Tensor, mask: torch.Tensor, values: torch.Tensor) -> None:
    """A masked store: no boolean indexing, whose result size the host would have to wait for."""
    out.copy_(torch.where(mask, values, out))
