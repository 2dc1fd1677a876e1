"""An assistant's whole draft as one CUDA graph per batch size."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vllm_gemma4_spec.performance.draft_graphs import CAPTURABLE


class AssistantGraphs:
    """Captured drafts by batch size and number of passes.

    A replay reads the proposer's buffers and the block tables of the donors' groups, all at addresses that stay. Rows
    that pad a batch have a length of one and vLLM's null block: they read what exists and write nowhere.

    Args:
        proposer: its model is loaded, its KV cache bound and its metadata builders made.
        batch_sizes: numbers of requests to capture, in any order.
        draft_lengths: numbers of passes to capture.
    """

    def __init__(self, proposer: Any, batch_sizes: Sequence[int], draft_lengths: Sequence[int]) -> None:
        self._proposer, self.batch_sizes, self.draft_lengths = proposer, sorted(batch_sizes), tuple(draft_lengths)
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        # Batch size -> the captured one it is padded to.
        most = self.batch_sizes[-1]
        self._padded = [min(b for b in self.batch_sizes if b >= n) for n in range(most + 1)]

    def _run(self, num_reqs: int, draft_length: int) -> Tensor:
        # An upper bound of the lengths: what is captured must not depend on this step's.
        longest = self._proposer.vllm_config.model_config.max_model_len
        drafts: Tensor = self._proposer._passes(num_reqs, draft_length, self._proposer.metadata(num_reqs, longest))
        return drafts

    @torch.inference_mode()
    def capture(self, pool: Any, warmups: int = 2) -> None:
        """Capture every batch size, the largest first, so that the others reuse its memory."""
        self._pad(0, self.batch_sizes[-1])
        for draft_length, num_reqs in itertools.product(self.draft_lengths, reversed(self.batch_sizes)):
            for _ in range(warmups if num_reqs == self.batch_sizes[-1] else 1):
                self._run(num_reqs, draft_length)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
                drafts = self._run(num_reqs, draft_length)
            self._graphs[num_reqs, draft_length] = graph, drafts

    def fits(self, num_reqs: int, draft_length: int) -> bool:
        return num_reqs <= self.batch_sizes[-1] and draft_length in self.draft_lengths

    def _pad(self, start: int, end: int) -> None:
        self._proposer.seq_lens[start:end].fill_(1)
        self._proposer.positions[start:end].zero_()
        self._proposer.input_ids[start:end].zero_()
        for table in self._proposer.block_tables(end):  # vLLM marks rows past the batch with -1, which is no block
            table[start:].zero_()

    def replay(self, num_reqs: int, draft_length: int) -> Tensor:
        """Drafts for the proposer's buffers: ``[num_reqs, draft_length]`` int64, the caller's own."""
        padded = self._padded[num_reqs]
        if padded > num_reqs:
            self._pad(num_reqs, padded)
        graph, drafts = self._graphs[padded, draft_length]
        graph.replay()
        # The next graph that shares the pool may overwrite it.
        return drafts[:num_reqs].clone()


def capturable(proposer: Any) -> bool:
    """Whether every metadata builder depends on nothing but device tensors."""
    return {type(group.get_metadata_builder()).__name__ for group in proposer.draft_attn_groups} <= CAPTURABLE


def batch_sizes(capture_sizes: Sequence[int], query_len: int, max_num_seqs: int) -> list[int]:
    """Request counts to capture, up to where the target, too, has graphs: all to 8, ever sparser as they grow.

    Args:
        capture_sizes: the target's graph sizes in tokens.
        query_len: tokens of a request in a decode step, k + 1.
        max_num_seqs: the most requests in a batch.
    """
    most = min(max_num_seqs, max(capture_sizes, default=0) // query_len)
    counts = {*range(1, 9), *range(12, 33, 4), *range(48, most + 1, 16), most}
    return sorted(n for n in counts if 0 < n <= most)
