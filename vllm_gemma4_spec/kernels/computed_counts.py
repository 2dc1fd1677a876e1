"""How many tokens of each request are computed, corrected by what was accepted of its last drafts: one kernel.

Nothing of it goes by the step: a block holds the largest batch, and no number and no address is specialized on, so that
it is compiled once.
"""

from __future__ import annotations

import torch
from vllm.triton_utils import tl, triton


@triton.jit(
    do_not_specialize=["computed", "accepted", "previous", "counts", "drafts", "on_host", "num_reqs"],
)
def _correct(  # type: ignore[no-untyped-def]
    computed,  # [max_num_reqs] int32, by the last step's places, then by this step's
    accepted,  # [num_reqs] int32, written in place
    previous,  # [num_reqs] int64: a request's place in the last step, -1: it was not there
    counts,  # [num_previous] int32: tokens that the last step gave each request
    drafts,  # [max_num_reqs] int32: drafts that it had
    on_host,  # [num_reqs] int32: the host's numbers
    num_reqs,
    block: tl.constexpr,
):
    """Grid ``(1,)``: requests change places within ``computed``, so all is read before any is written."""
    request = tl.arange(0, block)
    mask = request < num_reqs
    place = tl.load(previous + request, mask=mask, other=-1)
    corrected = place >= 0
    corrected = corrected & (tl.load(drafts + place, mask=corrected, other=0) > 0)
    count = tl.load(counts + place, mask=corrected, other=0).to(tl.int32)
    before = tl.load(computed + place, mask=corrected, other=0)
    host = tl.load(on_host + request, mask=mask, other=0)
    tl.debug_barrier()
    tl.store(computed + request, tl.where(corrected, before + count, host), mask=mask)
    tl.store(accepted + request, count, mask=corrected)


def update(
    computed: torch.Tensor,
    accepted: torch.Tensor,
    previous: torch.Tensor,
    counts: torch.Tensor,
    drafts: torch.Tensor,
    on_host: torch.Tensor,
) -> None:
    """As vLLM's ``update_num_computed_tokens_for_batch_change``, of tensors whose values lie together.

    Args:
        computed: ``[max_num_reqs]`` int32, written up to ``num_reqs``.
        accepted: ``[num_reqs]`` int32, written where a request had drafts.
        previous: ``[num_reqs]`` int64, places in the last step; negative for a request that was not in it.
        counts: ``[num_previous]`` int32, tokens that the last step gave each request.
        drafts: ``[max_num_reqs]`` int32, drafts that each had in it.
        on_host: ``[num_reqs]`` int32, numbers of requests that had none.
    """
    block = triton.next_power_of_2(len(computed))
    _correct[(1,)](computed, accepted, previous, counts, drafts, on_host, len(previous), block=block)
