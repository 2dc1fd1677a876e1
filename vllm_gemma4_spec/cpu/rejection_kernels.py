"""PyTorch forms of the Triton kernels in ``vllm.v1.sample.rejection_sampler`` (0.19.1).

B is the number of requests, T the number of draft tokens of all requests, V the vocabulary size. Drafts of all
requests lie one after another; ``cu_num_draft_tokens`` [B] int32 is where each request's end. Nothing here
loops over requests or tokens or reads a tensor's value on the host.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vllm_gemma4_spec.cpu.launch import CpuKernel, Grid


@CpuKernel
def rejection_greedy_sample(
    grid: Grid,  # (B,)
    output_token_ids: torch.Tensor,  # [B, max_spec_len + 1] int32, prefilled with -1
    cu_num_draft_tokens: torch.Tensor,  # [B]
    draft_token_ids: torch.Tensor,  # [T] int32
    target_argmax: torch.Tensor,  # [T] int64
    bonus_token_ids: torch.Tensor,  # [B] or [B, 1] int32
    is_greedy: torch.Tensor | None,  # [B] bool; None: all are
    max_spec_len: int,
) -> None:
    """Accept drafts up to the first that is not the target's argmax, which takes its place.

    Patch: ``cpu-kernels``. Evidence: ``tests/patching/test_stock.py::test_triton_kernels_cannot_be_launched_on_a_cpu``.
    Related upstream change: none found by number; 0.20.0 drafts on a CPU.
    """
    _write_accepted(
        output_token_ids[: grid[0]],
        cu_num_draft_tokens,
        accepted=draft_token_ids == target_argmax,
        token_ids=target_argmax,
        bonus_token_ids=bonus_token_ids,
        rows=is_greedy,
    )


@CpuKernel
def rejection_random_sample(
    grid: Grid,  # (B,)
    output_token_ids: torch.Tensor,  # [B, max_spec_len + 1] int32, prefilled with -1
    cu_num_draft_tokens: torch.Tensor,  # [B]
    draft_token_ids: torch.Tensor,  # [T] int32
    draft_probs: torch.Tensor | None,  # [T, V] float32; None: each draft was certain (all methods of 0.19.1)
    target_probs: torch.Tensor,  # [T, V] float32
    bonus_token_ids: torch.Tensor,  # [B] or [B, 1] int32
    recovered_token_ids: torch.Tensor,  # [T] int32
    uniform_probs: torch.Tensor,  # [T] float64, in [0, 1)
    is_greedy: torch.Tensor,  # [B] bool; these rows are left alone
    max_spec_len: int,
    vocab_size: int,
    NO_DRAFT_PROBS: bool,
) -> None:
    """Accept a draft with probability min(1, target / draft); the first rejected one gives way to a recovered token.

    Patch: ``cpu-kernels``. Evidence: ``tests/patching/test_stock.py::test_triton_kernels_cannot_be_launched_on_a_cpu``.
    Related upstream change: none found by number; 0.20.0 drafts on a CPU.
    """
    target_prob = _prob_of(target_probs, draft_token_ids, vocab_size)
    if NO_DRAFT_PROBS or draft_probs is None:
        accepted = target_prob >= uniform_probs
    else:
        draft_prob = _prob_of(draft_probs, draft_token_ids, vocab_size)
        accepted = (draft_prob > 0) & (target_prob / draft_prob >= uniform_probs)
    _write_accepted(
        output_token_ids[: grid[0]],
        cu_num_draft_tokens,
        accepted=accepted,
        token_ids=torch.where(accepted, draft_token_ids, recovered_token_ids),
        bonus_token_ids=bonus_token_ids,
        rows=~is_greedy.bool(),
    )


@CpuKernel
def expand(
    grid: Grid,  # (B,)
    output: torch.Tensor,  # [T], dtype of `input`
    input: torch.Tensor,  # [B] any dtype
    cu_num_tokens: torch.Tensor,  # [B] int32
    replace_from: int,
    replace_to: int,
    MAX_NUM_TOKENS: int,
) -> None:
    """Repeat each request's value once per token, with ``replace_from`` exchanged for ``replace_to``.

    Patch: ``cpu-kernels``. Evidence: ``tests/patching/test_stock.py::test_triton_kernels_cannot_be_launched_on_a_cpu``.
    Related upstream change: none found by number; 0.20.0 drafts on a CPU.
    """
    row, place, within = _requests_of(cu_num_tokens[: grid[0]], output.shape[0])
    value = input[: grid[0]]
    value = torch.where(value == replace_from, replace_to, value)
    output.copy_(torch.where(within & (place < MAX_NUM_TOKENS), value[row], output))


@CpuKernel
def sample_recovered_tokens(
    grid: Grid,  # (B, max_spec_len)
    output_token_ids: torch.Tensor,  # [T] int32
    cu_num_draft_tokens: torch.Tensor,  # [B]
    draft_token_ids: torch.Tensor,  # [T] int32
    draft_probs: torch.Tensor | None,  # [T, V] float32; None: each draft was certain
    target_probs: torch.Tensor,  # [T, V] float32
    inv_q: torch.Tensor,  # [B, V] float32, 1 / Exp(1): the Gumbel-max trick without logarithms
    vocab_size: int,
    BLOCK_SIZE: int,
    NO_DRAFT_PROBS: bool,
) -> None:
    """Sample each draft's replacement from max(0, target - draft); the lowest id wins a tie.

    Patch: ``cpu-kernels``. Evidence: ``tests/patching/test_stock.py::test_triton_kernels_cannot_be_launched_on_a_cpu``.
    Related upstream change: none found by number; 0.20.0 drafts on a CPU.
    """
    # The kernel counts elements, so [T, 1] is as good as [T] to it.
    output_token_ids, draft_token_ids = output_token_ids.view(-1), draft_token_ids.reshape(-1)
    row, place, within = _requests_of(cu_num_draft_tokens[: grid[0]], output_token_ids.shape[0])
    score = inv_q[row]  # [T, V]
    if NO_DRAFT_PROBS or draft_probs is None:
        score.mul_(target_probs)
        # The draft itself is never the replacement; an id outside the vocabulary (-1) excludes nothing.
        draft = draft_token_ids.long().unsqueeze(1)
        known = (draft >= 0) & (draft < vocab_size)
        draft = draft.clamp(0, vocab_size - 1)
        score.scatter_(1, draft, score.gather(1, draft).masked_fill_(known, 0))
    else:
        score.mul_((target_probs - draft_probs).clamp_(min=0))
    output_token_ids.copy_(torch.where(within & (place < grid[1]), score.argmax(1), output_token_ids))


def _requests_of(cu: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per token [num_tokens]: its request, its place in that request, and whether any request holds it."""
    token = torch.arange(num_tokens, device=cu.device, dtype=cu.dtype)
    row = torch.searchsorted(cu, token, right=True)
    within = row < cu.shape[0]
    row.clamp_(max=cu.shape[0] - 1)
    return row, token - F.pad(cu, (1, 0))[row], within


def _prob_of(probs: torch.Tensor, token_ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """``probs[t, token_ids[t]]`` [T], addressed as Triton does: an id of -1 reads the element before the row."""
    flat = probs.reshape(-1)
    index = torch.arange(token_ids.shape[0], device=probs.device) * vocab_size + token_ids
    return flat[index.clamp_(0, max(flat.shape[0] - 1, 0))]


def _write_accepted(
    output: torch.Tensor,  # [B, max_spec_len + 1] int32, written in place
    cu_num_draft_tokens: torch.Tensor,  # [B]
    accepted: torch.Tensor,  # [T] bool
    token_ids: torch.Tensor,  # [T], what stands at a draft's place, accepted or not
    bonus_token_ids: torch.Tensor,  # [B] or [B, 1]
    rows: torch.Tensor | None,  # [B] bool, the requests to write; None: all
) -> None:
    """Write each request's tokens up to and with the first that was not accepted, or all and the bonus token."""
    num_reqs, num_tokens = output.shape[0], accepted.shape[0]
    cu = cu_num_draft_tokens[:num_reqs]
    start, count = F.pad(cu[:-1], (1, 0)), torch.diff(cu, prepend=cu.new_zeros(1))
    column = torch.arange(output.shape[1], device=output.device, dtype=cu.dtype)
    is_draft = column < count.unsqueeze(1)  # [B, max_spec_len + 1]
    # One token of padding stands for "no draft here", also where no request has any.
    token = torch.where(is_draft, start.unsqueeze(1) + column, num_tokens)
    num_accepted = F.pad(accepted, (0, 1))[token].cumprod(1).sum(1, keepdim=True)
    candidate = torch.where(is_draft, F.pad(token_ids, (0, 1))[token], bonus_token_ids.reshape(-1, 1)[:num_reqs])
    written = column <= num_accepted
    if rows is not None:
        written &= rows[:num_reqs].unsqueeze(1)
    output.copy_(torch.where(written, candidate, output))
