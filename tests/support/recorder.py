"""What a drafter was given and what it drafted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Given:
    """One request in one draft pass.

    Attributes:
        context: the tokens drafted from: those the target has seen and the one it sampled last.
        draft: the tokens drafted.
        first: position of the first row of ``hidden``.
        hidden: the target's hidden states of this step up to the last token that was not rejected.
    """

    context: list[int]
    draft: list[int]
    first: int
    hidden: torch.Tensor


class Recorder:
    """Every draft a drafter makes, with the tokens it followed."""

    def __init__(self, llm: Any) -> None:
        self.runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        self.given: list[Given] = []
        self._propose = self.runner.drafter.propose
        self.runner.drafter.propose = self

    @property
    def drafts(self) -> list[tuple[list[int], list[int]]]:
        """Tokens followed and tokens drafted."""
        return [(g.context, g.draft) for g in self.given]

    def __call__(self, **kwargs: Any) -> torch.Tensor:
        starts = kwargs["common_attn_metadata"].query_start_loc.tolist()  # an EAGLE pass overwrites it
        drafts = self._propose(**kwargs)
        batch, rejected = self.runner.input_batch, kwargs["num_rejected_tokens_gpu"]
        for row, (req_id, draft) in enumerate(zip(batch.req_ids, drafts.tolist(), strict=True)):
            request = self.runner.requests[req_id]
            following = int(kwargs["next_token_ids"][row])
            # Bookkeeping has not added this step's tokens yet: take them from what the drafter was given.
            start, end = starts[row : row + 2]
            end -= 0 if rejected is None else int(rejected[row])
            known = request.prompt_token_ids + request.output_token_ids
            at = int(kwargs["target_positions"][start])
            context = known[:at] + kwargs["target_token_ids"][start:end].tolist() + [following]
            self.given.append(Given(context, draft, at, kwargs["target_hidden_states"][start:end].clone()))
        return drafts
