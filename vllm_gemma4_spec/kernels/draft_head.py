"""The drafter's argmax over the vocabulary in two passes: a coarse one over NVFP4, an exact one over candidates.

A draft needs the largest logit alone. Reading lm_head in bfloat16 takes 1.3 GB, a third of what a draft pass of
E4B reads. Its NVFP4 copy takes 0.4 GB and finds the few blocks of the vocabulary where the maximum can be; their
logits are then computed from the checkpoint's weight, in float32. The soft cap is monotonic and is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vllm_gemma4_spec.checkpoints import nvfp4
from vllm_gemma4_spec.kernels import small_batch_gemm
from vllm_gemma4_spec.kernels.block_logits import (
    block_maxima,
    chosen_logits,
    largest,
    largest_of_rank,
    largest_of_ranks,
)
from vllm_gemma4_spec.kernels.packing import COLUMNS, pack

BLOCK = 128  # token ids that are candidates together
CANDIDATES = 8  # blocks computed exactly
_CHUNK = 2**15  # token ids quantized at a time

Gemm = Callable[[Tensor], Tensor]


class DraftHead:
    """Argmax of ``hidden @ weight.T``.

    Args:
        weight: lm_head, ``[vocab, hidden_size]`` bfloat16; vocab a multiple of 128, hidden_size of 256.
        coarse: ``[num_reqs, hidden_size]`` -> ``[num_reqs, vocab]``, rough logits; by default of an NVFP4 copy.
        group: vLLM's tensor-parallel group, where ``weight`` has this rank's part of the vocabulary.
    """

    def __init__(self, weight: Tensor, coarse: Gemm | None = None, group: Any = None) -> None:
        self.weight, self._group = weight, group
        self.most_requests = small_batch_gemm.most_rows(*weight.shape)
        if coarse is None:
            self._codes, self._scales, self._scale_2 = quantize(weight)
            small_batch_gemm.reserve(weight.shape[0], weight.shape[1], weight.device)
        self._coarse = coarse or self._by_rows

    def _by_rows(self, hidden: Tensor) -> Tensor:
        return small_batch_gemm.gemm(hidden, self._codes, self._scales, self._scale_2)

    def argmax(self, hidden: Tensor) -> Tensor:
        """``[num_reqs, hidden_size]`` bfloat16 -> ``[num_reqs]`` int64 token ids, without a host sync."""
        hidden = hidden.contiguous()
        keys = block_maxima(self._coarse(hidden), BLOCK)
        logits, blocks = chosen_logits(hidden, self.weight, keys, CANDIDATES, BLOCK)
        group, part = self._group, len(self.weight)
        if group is None:
            return largest(logits, blocks, BLOCK, part)[1]
        # The sum of vLLM's all-reduce gathers, as each rank adds zeros in the others' places: no NCCL in the graph.
        found = largest_of_rank(logits, blocks, BLOCK, part, group.rank_in_group, group.world_size)
        return largest_of_ranks(group.all_reduce(found), group.world_size * part)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and scales of :func:`~vllm_gemma4_spec.kernels.packing.pack`, and the global scale, ``[1]`` float32."""
    scale_2 = weight.abs().amax().float() / (nvfp4.CODE_MAX * nvfp4.SCALE_MAX)
    codes, scales = [], []
    for part in weight.split(_CHUNK):  # float32 copies of the whole would take 2.7 GB each
        scale = nvfp4.block_scale(part, scale_2)
        packed = pack(nvfp4.encode(part, scale, scale_2), scale)
        codes.append(packed[0])
        scales.append(packed[1])
    return torch.cat(codes), torch.cat(scales), scale_2.reshape(1)


def suits(weight: Tensor) -> bool:
    """Whether a head of this shape, dtype and device can be taken."""
    vocab, size = weight.shape
    return (
        weight.is_cuda
        and weight.dtype == torch.bfloat16
        and vocab % (BLOCK * CANDIDATES) == 0
        and size % COLUMNS == 0
        and small_batch_gemm.available()
    )
