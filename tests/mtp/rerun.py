"""Graphs of drafts on a CPU."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import torch

from vllm_gemma4_spec.mtp.graphs import AssistantGraphs


class Rerun(AssistantGraphs):
    """Graphs whose replay calls the captured function on the same buffers."""

    replays = padded = 0

    def capture(self, pool: Any, warmups: int = 0) -> None:
        for n, k in itertools.product(self.batch_sizes, self.draft_lengths):
            drafts = torch.full((n, k), -1, dtype=torch.int64)
            again = SimpleNamespace(replay=lambda n=n, k=k, drafts=drafts: drafts.copy_(self._run(n, k)))
            self._graphs[n, k] = again, drafts  # type: ignore[assignment]

    def replay(self, num_reqs: int, draft_length: int) -> torch.Tensor:
        self.replays += 1
        self.padded += num_reqs not in self.batch_sizes
        return super().replay(num_reqs, draft_length)
