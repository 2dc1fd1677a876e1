"""Every draft of an assistant in a running engine, beside the reference's on the same cache and hidden state."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.mtp.reference import FULL, SLIDING, ReferenceAssistant, stored


@dataclass(frozen=True)
class Draft:
    """One request's draft in one step; ``context`` ends with the token that the draft follows."""

    context: list[int]
    made: list[int]
    wanted: list[int]


class Watched:
    """In the place of a drafter's ``propose``: compares with the reference, and the cache with what it was."""

    def __init__(self, llm: Any, assistant: Path, *, reference: bool = True) -> None:
        self.runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        drafter = self.runner.drafter
        self._propose, drafter.propose = drafter.propose, self
        layers = self.runner.compilation_config.static_forward_context
        named = {name: layers[name] for name in drafter._draft_attn_layer_names}
        self.donors = {
            FULL if layer.sliding_window is None else SLIDING: layer.kv_sharing_target_layer_name
            for layer in named.values()
        }
        self.reference = ReferenceAssistant(assistant, drafter.model.model.embed_tokens.weight) if reference else None
        self.drafts: list[Draft] = []
        self.changed = 0  # tensors of the target's cache that a draft changed, summed over all steps
        self._before = {cache.data_ptr(): (cache, torch.empty_like(cache)) for cache in self.runner.kv_caches}

    @torch.inference_mode()
    def __call__(self, **kwargs: Any) -> torch.Tensor:
        runner, cad = self.runner, kwargs["common_attn_metadata"]
        for cache, before in self._before.values():
            before.copy_(cache)
        starts, lengths = cad.query_start_loc.tolist(), cad.seq_lens.tolist()
        rejected = kwargs["num_rejected_tokens_gpu"]
        cut = [0] * cad.num_reqs if rejected is None else rejected.tolist()
        drafts = self._propose(**kwargs)
        for cache, before in self._before.values():
            self.changed += not torch.equal(cache.view(torch.uint8), before.view(torch.uint8))
        for row, made in enumerate(drafts.tolist()):
            request = runner.requests[runner.input_batch.req_ids[row]]
            following, last = int(kwargs["next_token_ids"][row]), starts[row + 1] - 1 - cut[row]
            length, start = lengths[row] - cut[row], starts[row]
            known = request.prompt_token_ids + request.output_token_ids
            at = int(kwargs["target_positions"][start])
            context = known[:at] + kwargs["target_token_ids"][start : last + 1].tolist() + [following]
            wanted = made
            if self.reference is not None:
                kv = {kind: stored(runner, name, row, length) for kind, name in self.donors.items()}
                hidden = kwargs["target_hidden_states"][last].float()
                wanted = self.reference.draft(following, hidden, kv, len(made))
            self.drafts.append(Draft(context, made, wanted))
        return drafts
