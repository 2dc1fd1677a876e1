"""The head of E2B's and E4B's assistants: of 2,048 clusters of 128 tokens a pass looks at the 32 likeliest."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vllm_gemma4_spec.kernels import block_logits


class CentroidHead(nn.Module):
    """Argmax over the tokens of the likeliest centroids.

    ``weight`` is in the order of ``token_ordering`` once :meth:`order` has run, so that the rows of a cluster lie
    together; nothing else reads the tied matrix, as embeddings are the target's.
    """

    def __init__(self, vocab_size: int, hidden_size: int, num_centroids: int, top_k: int) -> None:
        super().__init__()
        self.top_k, self.cluster = top_k, vocab_size // num_centroids
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size), requires_grad=False)
        self.centroids = nn.Parameter(torch.empty(num_centroids, hidden_size), requires_grad=False)
        self.register_buffer("token_ordering", torch.arange(vocab_size))

    @torch.no_grad()
    def order(self) -> None:
        """Bring ``weight`` into the order of the clusters."""
        self.weight.data = self.weight.data[self.token_ordering]

    def _candidates(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the chosen clusters' tokens and the clusters: ``[n, top_k * cluster]``, ``[n, top_k]``."""
        hidden = hidden.contiguous()
        scores = hidden @ self.centroids.T
        if block_logits.suits(hidden, self.cluster):
            keys = block_logits.block_maxima(scores, 1)
            return block_logits.chosen_logits(hidden, self.weight, keys, self.top_k, self.cluster)
        chosen = scores.topk(self.top_k, dim=-1, sorted=False).indices
        rows = self.weight.unflatten(0, (-1, self.cluster))[chosen].flatten(1, 2)
        return torch.einsum("nrd,nd->nr", rows, hidden), chosen

    def argmax(self, hidden: Tensor) -> Tensor:
        """``[n, hidden_size]`` -> ``[n]`` int64 token ids, without a host sync."""
        logits, chosen = self._candidates(hidden)
        if block_logits.suits(hidden, self.cluster):
            return block_logits.largest(logits, chosen, self.cluster, len(self.weight), self.token_ordering)[1]
        best = logits.argmax(-1, keepdim=True)
        place = chosen.gather(-1, best // self.cluster) * self.cluster + best % self.cluster
        return self.token_ordering[place].squeeze(-1)

    def logits(self, hidden: Tensor) -> Tensor:
        """``[n, vocab_size]``; of tokens in no chosen cluster the smallest number of the dtype."""
        logits, chosen = self._candidates(hidden)
        places = (chosen.unsqueeze(-1) * self.cluster + torch.arange(self.cluster, device=hidden.device)).flatten(1)
        out = logits.new_full((len(hidden), len(self.token_ordering)), torch.finfo(logits.dtype).min)
        return out.scatter_(-1, self.token_ordering[places], logits)
