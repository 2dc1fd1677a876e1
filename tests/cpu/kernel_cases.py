"""Random launches of vLLM's speculation kernels: valid inputs, the odd ones included.

Every output lies inside a larger storage filled with noise, so that a store out of bounds shows as well as a
store that is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

Case = dict[str, Any]  # {"kernel": "module:name", "grid": tuple, "args": {parameter: value}}
DRAFT = "vllm.v1.spec_decode.utils"
REJECTION = "vllm.v1.sample.rejection_sampler"


class Random:
    """Tensors drawn from one seeded generator, each a view into a larger storage."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def number(self, low: int, high: int) -> int:
        """Both ends included."""
        return int(self.rng.integers(low, high + 1))

    def numbers(self, low: int, high: int, size: int | tuple[int, ...]) -> np.ndarray:
        return self.rng.integers(low, high + 1, size)

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def inside(self, values: Any, dtype: torch.dtype) -> torch.Tensor:
        """``values`` as a contiguous view with noise before and after it."""
        tensor = torch.as_tensor(np.asarray(values)).to(dtype)
        noise = torch.as_tensor(self.numbers(-99, 99, tensor.numel() + 2 * 3)).to(dtype)
        view = noise[3 : 3 + tensor.numel()].view(tensor.shape)
        view.copy_(tensor)
        return view

    def noise(self, size: int | tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return self.inside(self.numbers(-99, 99, size), dtype)

    def columns(self, values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        """A matrix whose rows lie further apart than they are long."""
        wide = self.noise((values.shape[0], values.shape[1] + self.number(0, 3)), dtype)
        view = wide[:, : values.shape[1]]
        view.copy_(torch.as_tensor(values))
        return view


def eagle_step(r: Random) -> Case:
    batch, padding = r.number(1, 6), r.number(0, 3)
    block_size, n_blocks = int(r.rng.choice([1, 3, 4, 16])), r.number(1, 6)
    # The table may be shorter than max_model_len (its last block is taken) or longer.
    max_model_len = r.number(1, block_size * n_blocks + 3)
    positions = r.inside(r.numbers(0, max_model_len + 1, batch), torch.int64)
    table = r.columns(r.numbers(0, 500, (batch, n_blocks)), torch.int32)
    args = {
        "positions_ptr": positions,
        "block_table_ptr": table,
        "block_table_stride": table.stride(0),
        "seq_lens_ptr": r.inside(r.numbers(0, max_model_len + 1, batch), torch.int32),
        # The proposer reads and writes the same buffer, except with M-RoPE.
        "out_clamped_positions_ptr": positions if r.chance(0.5) else r.noise(batch, torch.int64),
        "out_slot_mapping_ptr": r.noise(batch + padding, torch.int64),
        "block_size": block_size,
        "max_model_len": max_model_len,
        "n_blocks_per_req": n_blocks,
        "PAD_ID": -1,
        "batch_size": batch,
    }
    return {"kernel": f"{DRAFT}:eagle_step_slot_mapping_metadata_kernel", "grid": (batch + padding,), "args": args}


def prepare_inputs(r: Random) -> Case:
    rows, extra = r.number(1, 6), r.number(0, 2)
    drafts = r.numbers(0, 5, rows) * r.numbers(0, 1, rows)
    lengths = np.where(drafts > 0, drafts + 1, r.numbers(0, 9, rows))
    args = {
        "cu_num_draft_tokens_ptr": r.inside(np.cumsum(drafts), torch.int32),
        "valid_sampled_tokens_count_ptr": r.inside(r.numbers(0, 99, rows) % (drafts + 2), torch.int32),
        "query_start_loc_gpu_ptr": r.inside(np.cumsum([0, *lengths]), torch.int32),
        "token_indices_to_sample_ptr": r.noise(rows, torch.int32),
        "num_rejected_tokens_gpu_ptr": r.noise(rows, torch.int32),
        "num_reqs": rows,
    }
    return {"kernel": f"{DRAFT}:eagle_prepare_inputs_padded_kernel", "grid": (rows + extra,), "args": args}


def prepare_next_token(r: Random) -> Case:
    rows, extra, width, vocab = r.number(1, 6), r.number(0, 2), r.number(1, 9), r.number(1, 40)
    sampled = r.numbers(0, vocab + 1, (rows, width))  # ids of vocab and above are invalid too
    if r.chance(0.5):  # a row as the sampler leaves it: tokens, then -1
        sampled[np.arange(width) >= r.numbers(0, width, (rows, 1))] = -1
    else:
        sampled[r.rng.random((rows, width)) < 0.4] = -1
    sampled = r.columns(sampled, torch.int32)
    buffer = rows + extra  # the runner's buffers are as long as its largest batch
    args = {
        "sampled_token_ids_ptr": sampled,
        "discard_request_mask_ptr": r.inside(r.numbers(0, 3, buffer) == 0, torch.bool),
        "backup_next_token_ids_ptr": r.inside(r.numbers(0, vocab, buffer), torch.int32),
        "next_token_ids_ptr": r.noise(rows, torch.int32),
        "valid_sampled_tokens_count_ptr": r.noise(rows, torch.int32),
        "vocab_size": vocab,
        "num_sampled_tokens_per_req": width,
        "num_reqs": rows,
        "stride_sampled_token_ids": sampled.stride(0),
        "BLOCK_SIZE_TOKENS": 1 << (width - 1).bit_length(),
    }
    return {"kernel": f"{DRAFT}:eagle_prepare_next_token_padded_kernel", "grid": (rows + extra,), "args": args}


def copy_and_expand(r: Random) -> Case:
    rows, slots, shift = r.number(1, 3), r.number(1, 4), r.chance(0.5)
    lengths = r.numbers(1, 10, rows)
    if r.chance(0.2):  # rows that pad a batch have no tokens
        lengths[r.number(0, rows - 1) :] = 0
    lengths[0] = max(lengths[0], 1)
    # The target's inputs may be padded past the last request.
    total, net = int(lengths.sum()) + r.number(0, 3) * r.chance(0.3), slots - shift
    start = np.cumsum([0, *lengths])
    # Up to all tokens of a request are rejected (a discarded one).
    rejected = r.numbers(0, 99, rows) % (lengths + 1) * r.numbers(0, 1, rows)
    out = total + rows * net + r.number(0, 4)
    block = int(r.rng.choice([8, 16]))
    args = {
        # One more than is read, where a request without tokens at the end looks for its first position.
        "target_token_ids_ptr": r.inside(r.numbers(0, 99, total + 1), torch.int32),
        "target_positions_ptr": r.inside(r.numbers(0, 99, total + 1), torch.int64),
        "next_token_ids_ptr": r.inside(r.numbers(0, 99, rows), torch.int32),
        "out_input_ids_ptr": r.noise(out, torch.int32),
        "out_positions_ptr": r.noise(out, torch.int64),
        "out_is_rejected_token_mask_ptr": r.inside(r.numbers(0, 1, out), torch.bool),
        "out_is_masked_token_mask_ptr": r.inside(r.numbers(0, 1, out), torch.bool),
        "out_new_token_indices_ptr": r.noise(rows * slots, torch.int32),
        "out_hidden_state_mapping_ptr": r.noise(total, torch.int32),
        "query_start_loc_ptr": r.inside(start, torch.int32),
        "query_end_loc_ptr": r.inside(start[1:] - 1 - rejected, torch.int32),
        "padding_token_id": r.number(0, 2),
        "parallel_drafting_token_id": r.number(100, 120),
        "total_input_tokens": total,
        "num_padding_slots_per_request": slots,
        "shift_input_ids": shift,
        "BLOCK_SIZE_TOKENS": block,
    }
    grid = (rows, -(-(int(lengths.max()) + net) // block))
    return {"kernel": f"{DRAFT}:copy_and_expand_eagle_inputs_kernel", "grid": grid, "args": args}


def _drafts(r: Random) -> tuple[int, np.ndarray, int, int]:
    """Requests, drafts of each (some none), all drafts, and the longest or a little more."""
    rows = r.number(1, 4)
    counts = r.numbers(0, 5, rows) * (r.rng.random(rows) < 0.8)
    return rows, counts, int(counts.sum()), int(counts.max()) + r.number(0, 1)


def rejection_greedy(r: Random) -> Case:
    rows, counts, total, longest = _drafts(r)
    argmax = r.numbers(0, 9, total)
    draft = np.where(r.rng.random(total) < 0.75, argmax, r.numbers(-1, 9, total))
    args = {
        "output_token_ids_ptr": r.inside(np.full((rows, longest + 1), -1), torch.int32),
        "cu_num_draft_tokens_ptr": r.inside(np.cumsum(counts), torch.int32),
        "draft_token_ids_ptr": r.inside(draft, torch.int32),
        "target_argmax_ptr": r.inside(argmax, torch.int64),
        "bonus_token_ids_ptr": r.inside(r.numbers(10, 19, (rows, 1)), torch.int32),
        "is_greedy_ptr": None if r.chance(0.3) else r.inside(r.numbers(0, 3, rows) > 0, torch.bool),
        "max_spec_len": longest,
    }
    return {"kernel": f"{REJECTION}:rejection_greedy_sample_kernel", "grid": (rows,), "args": args}


def _probs(r: Random, rows: int, vocab: int) -> torch.Tensor:
    """Half of the time multiples of 1/8, for zeros, ties and exact thresholds."""
    if r.chance(0.5):
        return r.inside(r.numbers(0, 4, (rows, vocab)) / 8, torch.float32)
    return r.inside(r.rng.dirichlet(np.full(vocab, 0.5), rows).reshape(rows, vocab), torch.float32)


def rejection_random(r: Random) -> Case:
    rows, counts, total, longest = _drafts(r)
    vocab, no_draft_probs = r.number(2, 12), r.chance(0.5)
    draft = r.numbers(0, vocab - 1, total)
    draft[1:][r.rng.random(max(total - 1, 0)) < 0.1] = -1  # -1 in the first place reads memory that is nobody's
    uniform = r.rng.random(total) if r.chance(0.5) else r.numbers(0, 7, total) / 8
    args = {
        "output_token_ids_ptr": r.inside(np.full((rows, longest + 1), -1), torch.int32),
        "cu_num_draft_tokens_ptr": r.inside(np.cumsum(counts), torch.int32),
        "draft_token_ids_ptr": r.inside(draft, torch.int32),
        "draft_probs_ptr": None if no_draft_probs else _probs(r, total, vocab),
        "target_probs_ptr": _probs(r, total, vocab),
        "bonus_token_ids_ptr": r.inside(r.numbers(100, 119, (rows, 1)), torch.int32),
        "recovered_token_ids_ptr": r.inside(r.numbers(50, 69, total), torch.int32),
        "uniform_probs_ptr": r.inside(uniform, torch.float64),
        "is_greedy_ptr": r.inside(r.numbers(0, 3, rows) == 0, torch.bool),
        "max_spec_len": longest,
        "vocab_size": vocab,
        "NO_DRAFT_PROBS": no_draft_probs,
    }
    return {"kernel": f"{REJECTION}:rejection_random_sample_kernel", "grid": (rows,), "args": args}


def expand(r: Random) -> Case:
    rows, counts, total, _ = _drafts(r)
    dtype = [torch.int32, torch.int64, torch.float32][r.number(0, 2)]
    args = {
        "output_ptr": r.noise(total + r.number(0, 2), dtype),  # tokens of no request keep what they hold
        "input_ptr": r.inside(r.numbers(0, 3, rows), dtype),
        "cu_num_tokens_ptr": r.inside(np.cumsum(counts), torch.int32),
        "replace_from": r.number(0, 1),
        "replace_to": r.number(0, 2),
        "MAX_NUM_TOKENS": int(r.rng.choice([4, 8, 128])),  # 4: the longest requests are cut off
    }
    return {"kernel": f"{REJECTION}:expand_kernel", "grid": (rows,), "args": args}


def sample_recovered(r: Random) -> Case:
    rows, counts, total, longest = _drafts(r)
    longest, total = max(longest, 1), total + r.number(0, 1)
    vocab, no_draft_probs = r.number(2, 30), r.chance(0.5)
    draft = r.numbers(0, vocab - 1, total)
    draft[r.rng.random(total) < 0.1] = -1
    inv_q = 1 / r.rng.exponential(size=(rows, vocab)) if r.chance(0.5) else r.numbers(1, 3, (rows, vocab))
    args = {
        "output_token_ids_ptr": r.noise(total, torch.int32),
        "cu_num_draft_tokens_ptr": r.inside(np.cumsum(counts), torch.int32),
        "draft_token_ids_ptr": r.inside(draft, torch.int32),
        "draft_probs_ptr": None if no_draft_probs else _probs(r, total, vocab),
        "target_probs_ptr": _probs(r, total, vocab),
        "inv_q_ptr": r.inside(inv_q, torch.float32),
        "vocab_size": vocab,
        "BLOCK_SIZE": int(r.rng.choice([8, 16, 32])),  # the vocabulary lies in one to four tiles
        "NO_DRAFT_PROBS": no_draft_probs,
    }
    return {"kernel": f"{REJECTION}:sample_recovered_tokens_kernel", "grid": (rows, longest), "args": args}


def slot_mapping(r: Random) -> Case:
    """The kernel for which 0.19.1 has a CPU form of its own."""
    rows, block_size, n_blocks = r.number(1, 5), int(r.rng.choice([1, 4, 16])), r.number(1, 6)
    lengths = r.numbers(0, 9, rows)
    total = int(lengths.sum())
    table = r.inside(r.numbers(0, 500, (rows, n_blocks)), torch.int32)
    args = {
        "num_tokens": total,
        "max_num_tokens": total + r.number(0, 5),
        "query_start_loc_ptr": r.inside(np.cumsum([0, *lengths]), torch.int32),
        "positions_ptr": r.inside(r.numbers(0, block_size * n_blocks - 1, total), torch.int64),
        "block_table_ptr": table,
        "block_table_stride": table.stride(0),
        "block_size": block_size,
        "slot_mapping_ptr": r.noise(total + 5, torch.int64),
        "TOTAL_CP_WORLD_SIZE": 1,
        "TOTAL_CP_RANK": 0,
        "CP_KV_CACHE_INTERLEAVE_SIZE": 1,
        "PAD_ID": -1,
        "BLOCK_SIZE": 16,
    }
    return {"kernel": "vllm.v1.worker.block_table:_compute_slot_mapping_kernel", "grid": (rows + 1,), "args": args}


MAKERS: tuple[Callable[[Random], Case], ...] = (
    eagle_step,
    prepare_inputs,
    prepare_next_token,
    copy_and_expand,
    rejection_greedy,
    rejection_random,
    expand,
    sample_recovered,
    slot_mapping,
)


def make_cases(per_kernel: int, seed: int) -> list[Case]:
    return [maker(Random(1000 * seed + n)) for maker in MAKERS for n in range(per_kernel)]
