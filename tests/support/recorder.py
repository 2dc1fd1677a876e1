"""What a drafter was given and what it drafted."""

from __future__ import annotations

from typing import Any

import torch


class Recorder:
    """Every draft a drafter makes, with the tokens it followed."""

    def __init__(self, llm: Any) -> None:
        self.runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        self.drafts: list[tuple[list[int], list[int]]] = []
        self._propose = self.runner.drafter.propose
        self.runner.drafter.propose = self

    def __call__(self, **kwargs: Any) -> torch.Tensor:
        drafts = self._propose(**kwargs)
        batch = self.runner.input_batch
        for row, (req_id, draft) in enumerate(zip(batch.req_ids, drafts.tolist(), strict=True)):
            request = self.runner.requests[req_id]
            following = int(kwargs["next_token_ids"][row])
            # Bookkeeping has not added this step's tokens yet: take them from what the drafter was given.
            start, end = kwargs["common_attn_metadata"].query_start_loc[row : row + 2].tolist()
            rejected = kwargs["num_rejected_tokens_gpu"]
            end -= 0 if rejected is None else int(rejected[row])
            known = request.prompt_token_ids + request.output_token_ids
            at = int(kwargs["target_positions"][start])
            self.drafts.append((known[:at] + kwargs["target_token_ids"][start:end].tolist() + [following], draft))
        return drafts
