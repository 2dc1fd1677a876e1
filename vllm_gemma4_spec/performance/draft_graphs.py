"""The whole draft of a decode step as one CUDA graph per batch size (and number of passes, where that adapts).

``SpecDecodeBaseProposer.propose`` does no host synchronization once its model and metadata run on the
GPU, so for a batch in which every request brings the same number of tokens (k + 1: the last token and k
drafts) the original is captured as it stands: input expansion, first pass, k - 1 further passes with
their metadata updates and slot mappings, lm_head and argmax. A replay is a handful of copies into the
graph's inputs and one launch. Every other batch (prompts, mixed batches) goes to the original.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_gemma4_spec import scope

# Attribute of a proposer that holds its graphs once they are captured.
GRAPHS = "_gemma4_spec_draft_graphs"
# What these build is a function of device tensors alone; another backend may read a host value (a sequence
# length, a schedule) that a replay would not refresh.
CAPTURABLE = {"TritonAttentionMetadataBuilder"}


@dataclass
class _Graph:
    """One batch size and draft length: the graph and the tensor that its replay writes."""

    cuda_graph: torch.cuda.CUDAGraph
    drafts: torch.Tensor  # [num_reqs, draft_length] int64, in the graphs' memory pool


@dataclass
class DraftInputs:
    """What ``propose`` reads of a step, at addresses that never change. b = most requests, q = k + 1.

    Attributes:
        token_ids: ``[b * q]`` int32, what the target just verified.
        positions: ``[b * q]`` int64.
        next_token_ids: ``[b]`` int32, the last token that the target sampled.
        num_rejected: ``[b]`` int32.
        seq_lens: ``[b]`` int32, drafts included.
        query_start_loc: ``[b + 1]`` int32, 0, q, 2 q, …
        slot_mapping: ``[b * q]`` int64; ``propose`` computes its own, longer one.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    next_token_ids: torch.Tensor
    num_rejected: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    slot_mapping: torch.Tensor

    @classmethod
    def allocate(cls, num_reqs: int, query_len: int, device: torch.device) -> DraftInputs:
        tokens = num_reqs * query_len
        int32: dict[str, Any] = {"dtype": torch.int32, "device": device}
        int64: dict[str, Any] = {"dtype": torch.int64, "device": device}
        return cls(
            token_ids=torch.zeros(tokens, **int32),
            # A padding request stands at positions 0 to k of the null block.
            positions=torch.arange(query_len, **int64).repeat(num_reqs),
            next_token_ids=torch.zeros(num_reqs, **int32),
            num_rejected=torch.zeros(num_reqs, **int32),
            seq_lens=torch.full((num_reqs,), query_len, **int32),
            query_start_loc=torch.arange(num_reqs + 1, **int32) * query_len,
            slot_mapping=torch.full((tokens,), -1, **int64),
        )

    def metadata(self, num_reqs: int, query_len: int, table: torch.Tensor, max_seq_len: int) -> CommonAttentionMetadata:
        return CommonAttentionMetadata(
            query_start_loc=self.query_start_loc[: num_reqs + 1],
            query_start_loc_cpu=torch.arange(num_reqs + 1, dtype=torch.int32) * query_len,
            seq_lens=self.seq_lens[:num_reqs],
            num_reqs=num_reqs,
            num_actual_tokens=num_reqs * query_len,
            max_query_len=query_len,
            # An upper bound for any step: what is captured must not depend on this one.
            max_seq_len=max_seq_len,
            block_table_tensor=table,
            slot_mapping=self.slot_mapping[: num_reqs * query_len],
        )


@contextmanager
def with_draft_length(proposer: Any, draft_length: int) -> Iterator[None]:
    """``propose`` makes ``draft_length`` drafts per request, not k; it reads nothing but this attribute for that."""
    k, proposer.num_speculative_tokens = proposer.num_speculative_tokens, draft_length
    try:
        yield
    finally:
        proposer.num_speculative_tokens = k


class DraftGraphs:
    """Captured drafts of one proposer, by batch size and draft length, its number of passes.

    Args:
        proposer: a ``DraftModelProposer`` whose layers span several KV cache groups.
        groups: its ``DraftGroups``.
        primary_table: gives the first ``n`` rows of the primary group's block table, int32.
        propose: the original method.
        batch_sizes: numbers of requests to capture, in any order.
        draft_lengths: numbers of passes to capture.
    """

    def __init__(
        self,
        proposer: Any,
        groups: Any,
        primary_table: Callable[[int], torch.Tensor],
        propose: Callable[..., torch.Tensor],
        batch_sizes: Sequence[int],
        draft_lengths: Sequence[int],
    ) -> None:
        self._proposer, self._groups, self._propose = proposer, groups, propose
        self._primary_table = primary_table
        self.query_len = proposer.num_speculative_tokens + 1
        self.batch_sizes = sorted(batch_sizes)
        self.draft_lengths = draft_lengths
        most = self.batch_sizes[-1]
        self._inputs = DraftInputs.allocate(most, self.query_len, proposer.device)
        self._num_live = torch.zeros(1, dtype=torch.int32, device=proposer.device)
        self._live = 0  # what that holds
        self._graphs: dict[tuple[int, int], _Graph] = {}
        # Batch size -> the captured one it is padded to.
        self._padded = [min(b for b in self.batch_sizes if b >= n) for n in range(most + 1)]

    def _run(self, num_reqs: int) -> torch.Tensor:
        """The original ``propose`` on this object's inputs: ``[num_reqs, draft_length]`` draft token ids."""
        inputs, tokens = self._inputs, num_reqs * self.query_len
        longest = self._proposer.vllm_config.model_config.max_model_len  # the target's: a drafter's may be shorter
        return self._propose(
            self._proposer,
            target_token_ids=inputs.token_ids[:tokens],
            target_positions=inputs.positions[:tokens],
            target_hidden_states=None,  # a draft model reads none
            next_token_ids=inputs.next_token_ids[:num_reqs],
            token_indices_to_sample=None,  # computed from the rejection counts
            common_attn_metadata=inputs.metadata(num_reqs, self.query_len, self._primary_table(num_reqs), longest),
            sampling_metadata=None,  # drafts are greedy
            num_rejected_tokens_gpu=inputs.num_rejected[:num_reqs],
        )

    def mark_live(self, num_reqs: int) -> None:
        """From here on the graphs' requests are padding."""
        if num_reqs != self._live:
            self._live = num_reqs
            self._num_live.fill_(num_reqs)

    @contextmanager
    def _as_captured(self) -> Iterator[None]:
        """Padding decided by this object's live count, and no graph replayed inside the one being captured."""
        kernel, dispatcher = self._groups.slot_kernel, self._proposer.cudagraph_dispatcher
        live, keys = kernel.num_live, dispatcher.keys_initialized
        graphs = self._proposer.__dict__.pop(GRAPHS, None)
        kernel.num_live, dispatcher.keys_initialized = self._num_live, False
        try:
            yield
        finally:
            kernel.num_live, dispatcher.keys_initialized = live, keys
            setattr(self._proposer, GRAPHS, graphs)

    @torch.inference_mode()
    def capture(self, pool: Any, warmups: int = 2) -> None:
        """Capture every batch size, the largest first, so that the others reuse its memory.

        While nothing is live no slot is written, so the warm-up runs leave the KV cache as it is.
        """
        self.mark_live(0)
        with self._as_captured():
            for draft_length, num_reqs in itertools.product(self.draft_lengths, reversed(self.batch_sizes)):
                with with_draft_length(self._proposer, draft_length):
                    for _ in range(warmups if num_reqs == self.batch_sizes[-1] else 1):
                        self._run(num_reqs)
                    torch.cuda.synchronize()
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
                        drafts = self._run(num_reqs)
                self._graphs[num_reqs, draft_length] = _Graph(graph, drafts)

    def fits(self, cad: CommonAttentionMetadata, num_rejected: torch.Tensor | None, mm_inputs: Any) -> bool:
        """Every request brings k + 1 tokens, none of them an image's, and the batch is not too large."""
        return (
            num_rejected is not None
            and mm_inputs is None
            and cad.num_reqs <= self.batch_sizes[-1]
            and cad.max_query_len == self.query_len
            and cad.num_actual_tokens == cad.num_reqs * self.query_len
        )

    def replay(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        next_token_ids: torch.Tensor,
        cad: CommonAttentionMetadata,
        num_rejected: torch.Tensor,
    ) -> torch.Tensor:
        """Drafts of a step that :meth:`fits`: ``[cad.num_reqs, draft_length]`` int64, the caller's own.

        The draft length is what the proposer's ``num_speculative_tokens`` is now.
        """
        num_reqs = cad.num_reqs
        padded = self._padded[num_reqs]
        inputs, tokens = self._inputs, num_reqs * self.query_len
        inputs.positions[:tokens].copy_(positions)
        of_requests = inputs.next_token_ids, inputs.num_rejected, inputs.seq_lens
        torch._foreach_copy_(  # one kernel: all are int32
            [inputs.token_ids[:tokens], *(of[:num_reqs] for of in of_requests)],
            [token_ids, next_token_ids, num_rejected, cad.seq_lens],
        )
        if padded > num_reqs:
            # Padding reads the null block and writes nowhere. Rows past the batch belong to nobody: the
            # runner refills them before a request uses them.
            inputs.seq_lens[num_reqs:padded].fill_(self.query_len)
            for table in (self._primary_table(padded), *self._groups.block_tables(padded)):
                table[num_reqs:].zero_()
        self.mark_live(num_reqs)
        graph = self._graphs[padded, self._proposer.num_speculative_tokens]
        graph.cuda_graph.replay()
        # The next graph that shares the pool may overwrite it.
        return graph.drafts[:num_reqs].clone()


def capturable(proposer: Any, groups: Any) -> bool:
    """Whether every metadata builder of the drafter depends on nothing but device tensors."""
    return (
        {type(b).__name__ for b in groups.builders} <= CAPTURABLE
        and not proposer.pass_hidden_states_to_model
        and not proposer.parallel_drafting
    )


def decode_batch_sizes(proposer: Any, capture_sizes: Sequence[int], max_num_seqs: int) -> list[int]:
    """Request counts to capture: where the target, too, has a full decode graph, ever sparser as they grow.

    All up to 8, every fourth up to 32, then every sixteenth, and the largest: padding costs little there,
    while every graph costs start-up time and some 35 MB.

    Args:
        capture_sizes: the target's graph sizes in tokens, multiples of k + 1 after vLLM's adjustment.
        max_num_seqs: the most requests in a batch.
    """
    query_len = proposer.num_speculative_tokens + 1
    most = min(max_num_seqs, proposer.max_num_tokens // (query_len + 1))  # the first pass adds a token each
    counts = sorted({min(size // query_len, most) for size in capture_sizes if size >= query_len})
    return [n for n in counts if n <= 8 or (n <= 32 and n % 4 == 0) or n % 16 == 0 or n == counts[-1]]


def propose(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``SpecDecodeBaseProposer.propose``: replay where a graph fits, else the original.

    Patch: ``draft-graphs``. Evidence: ``tests/performance/test_draft_capture.py::test_stock_drafts_kernel_by_kernel``.
    Related upstream change: #45258, open: the same lack for MTP drafters.
    """

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        graphs: DraftGraphs | None = self.__dict__.get(GRAPHS)
        if graphs is not None and not args:
            cad, rejected = kwargs["common_attn_metadata"], kwargs.get("num_rejected_tokens_gpu")
            if graphs.fits(cad, rejected, kwargs.get("mm_embed_inputs")):
                return graphs.replay(
                    kwargs["target_token_ids"], kwargs["target_positions"], kwargs["next_token_ids"], cad, rejected
                )
        return original(self, *args, **kwargs)

    return wrapper


def update_cudagraph_mode(original: Callable[..., None]) -> Callable[..., None]:
    """``GPUModelRunner._check_and_update_cudagraph_mode``: a draft model, too, gets piecewise graphs.

    0.19.1 initializes the dispatcher for EAGLE only; the drafter's dummy runs then capture piecewise graphs. They
    serve the batches that no whole graph fits.

    Patch: ``draft-pieces``. Evidence:
    ``tests/performance/test_draft_capture.py::test_stock_gives_a_draft_model_no_piecewise_graphs``. Related upstream
    change: none found.
    """

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        spec = self.speculative_config
        drafts = scope.gemma4_speculation(self.vllm_config) and spec.uses_draft_model()
        if drafts and self.device.type == "cuda":
            mode = self.compilation_config.cudagraph_mode
            if mode.requires_piecewise_compilation():
                self.drafter.initialize_cudagraph_keys(mode)

    return wrapper
