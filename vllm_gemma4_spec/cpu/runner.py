"""A CPU model runner that drafts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.worker.cpu_model_runner import CPUModelRunner, _torch_cuda_wrapper
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_gemma4_spec import scope


class DraftingCPUModelRunner(CPUModelRunner):
    """``CPUModelRunner`` for a configuration with speculation; without it, its parent but for seeds.

    The parent's ``__init__`` asserts that there is no speculation, so it is passed over: the grandparent
    runs in the same wrapper and the parent's own post-processing follows.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        if vllm_config.speculative_config is None:
            super().__init__(vllm_config, device)
            return
        with _torch_cuda_wrapper():
            GPUModelRunner.__init__(self, vllm_config, device)
        self.use_cuda_graph = False
        self.cascade_attn_enabled = False
        self._postprocess_tensors()
        self._postprocess_triton()

    def load_model(self, load_dummy_weights: bool = False) -> None:
        super().load_model(load_dummy_weights)
        drafter: Any = getattr(self, "drafter", None)
        if drafter is not None and hasattr(drafter, "load_model"):
            drafter.load_model(self.model)
        if self.use_aux_hidden_state_outputs:
            layers = self._get_eagle3_aux_layers_from_config()
            self.model.set_aux_hidden_state_layers(layers or self.model.get_eagle3_default_aux_hidden_state_layers())

    def _copy_draft_token_ids_to_cpu(self, scheduler_output: Any, zeros_only: bool = False) -> None:
        """The parent's copy goes through a CUDA stream; here both sides are in the same memory."""
        self._draft_token_req_ids = self.input_batch.req_ids.copy()
        if torch.is_tensor(self._draft_token_ids):
            drafts = self._draft_token_ids
            self.draft_token_ids_cpu[: drafts.shape[0]] = 0 if zeros_only else drafts

    def _thrown_away(self) -> list[int]:
        """Rows whose sampled token is not used, as their prompt goes on, and which have a generator (a seed)."""
        generators = self.input_batch.generators
        return [row for row in generators if row < self.input_batch.num_reqs and self.discard_request_mask.np[row]]

    def _sample(self, logits: torch.Tensor | None, spec_decode_metadata: Any) -> Any:
        """A token that is thrown away leaves its request's generator where it was, so an answer is its seed's alone."""
        generators = self.input_batch.generators
        states = {row: generators[row].get_state() for row in self._thrown_away()}
        output = super()._sample(logits, spec_decode_metadata)
        for row, state in states.items():
            generators[row].set_state(state)
        return output

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        """The original sets these generators back by an offset that CPU generators lack, and would end the engine."""
        generators = self.input_batch.generators
        hidden = {row: generators.pop(row) for row in self._thrown_away()}
        try:
            return super()._bookkeeping_sync(*args, **kwargs)
        finally:
            generators.update(hidden)

    def _copy_valid_sampled_token_count(self, next_token_ids: Any, valid_sampled_tokens_count: Any) -> None:
        """Needed for async scheduling only, which the CPU worker does not do."""


def runner_class(original: type[CPUModelRunner]) -> Callable[[VllmConfig, torch.device], CPUModelRunner]:
    """What ``CPUWorker`` calls in place of ``CPUModelRunner``: the subclass for Gemma 4 and for whatever speculates.

    Patch: ``cpu-runner``. Evidence: ``tests/patching/test_stock.py::test_the_cpu_refuses_speculation``. Related
    upstream change: none found by number; 0.20.0 drafts on a CPU.
    """

    def make(vllm_config: VllmConfig, device: torch.device) -> CPUModelRunner:
        ours = scope.gemma4_engine(vllm_config) or vllm_config.speculative_config is not None
        return (DraftingCPUModelRunner if ours else original)(vllm_config, device)

    return make
