"""A draft's first pass runs the drafter's KV-shared layers for each request's last token alone.

The pass writes the KV of the k + 1 tokens that the target has just verified and the new one, or of a whole prompt, and
drafts from the last one. Layers that read an earlier layer's KV (18 of E4B's 42) write none, so of every other token
nothing is left behind them. With ``--kv-sharing-fast-prefill``, for a target's prompts, vLLM makes ``Gemma4Model`` of
two compiled halves; here a drafter is, whatever that flag says.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable
from typing import Any

import torch
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context

from vllm_gemma4_spec import scope
from vllm_gemma4_spec.spec_decode.proposer import GROUPS

DECODER = "_gemma4_spec_decoder"  # of a proposer: its drafter's Gemma4Model, if that has two halves
OURS = "_gemma4_spec_in_halves"  # of that model: a target's is --kv-sharing-fast-prefill's
NEXT = "_gemma4_spec_last_tokens"  # of that model: the tokens that its next pass drafts from
COLD = "_gemma4_spec_cold"  # of that model, until its second half has run compiled
# The model that is built now gets two halves; its constructor is not told that it drafts.
_in_halves: contextvars.ContextVar[bool] = contextvars.ContextVar("gemma4_in_halves", default=False)


def _suits(proposer: Any) -> bool:
    config = proposer.vllm_config
    if not scope.gemma4_drafter(config):
        return False
    text = config.speculative_config.draft_model_config.hf_text_config
    return (
        (getattr(text, "num_kv_shared_layers", 0) or 0) > 0
        and not getattr(text, "enable_moe_block", False)  # ranks that share experts must have as many tokens
        and not config.cache_config.kv_sharing_fast_prefill
        and not proposer.parallel_drafting  # drafts from several tokens of a request
        and not proposer.uses_mrope
        and config.parallel_config.pipeline_parallel_size == 1
    )


def get_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """``DraftModelProposer._get_model``: a drafter with KV-shared layers is built in two halves.

    Patch: ``last-tokens``. Evidence:
    ``tests/performance/test_last_tokens.py::test_stock_runs_all_layers_for_all_tokens``. Related upstream change: none
    found; sglang #27183, open, does the same for prompts of a target.
    """

    @functools.wraps(original)
    def wrapper(self: Any) -> Any:
        if not _suits(self):
            return original(self)
        token = _in_halves.set(True)
        try:
            model = original(self)
        finally:
            _in_halves.reset(token)
        decoder = next((m for m in model.modules() if getattr(m, "fast_prefill_enabled", False)), None)
        setattr(self, DECODER, decoder)
        return model

    return wrapper


def model_init(original: Callable[..., None]) -> Callable[..., None]:
    """``Gemma4ForCausalLM.__init__``: a drafter in two halves, with small buffers.

    Patch: ``last-tokens``. Evidence:
    ``tests/performance/test_last_tokens.py::test_stock_runs_all_layers_for_all_tokens``. Related upstream change: none
    found; sglang #27183, open, does the same for prompts of a target.
    """

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if not _in_halves.get():
            original(self, *args, **kwargs)
            return
        config = kwargs["vllm_config"]
        config.cache_config.kv_sharing_fast_prefill = True
        try:
            original(self, *args, **kwargs)
        finally:
            config.cache_config.kv_sharing_fast_prefill = False
        _prepare(self.model, config.compilation_config.max_cudagraph_capture_size or 0)

    return __init__


def _prepare(decoder: Any, rows: int) -> None:
    """Mark a drafter's model, cut its buffers down to the largest CUDA graph, and make its last norm one kernel.

    vLLM's buffers are for prompts: 0.2 GB of an E4B for 8,192 tokens.
    """
    setattr(decoder, OURS, True)
    for name in ("hidden_states", "per_layer_inputs"):
        buffer = getattr(decoder, name)
        if buffer is not None:
            setattr(decoder, name, buffer.new_zeros(min(rows, len(buffer)), *buffer.shape[1:]))
    if not decoder.cross_decoder.do_not_compile:
        setattr(decoder, COLD, True)
    if decoder.norm.weight.is_cuda:  # in neither compiled half, where PyTorch's own would be eight kernels
        decoder.norm._forward_method = decoder.norm.forward_cuda


def set_inputs_first_pass(original: Callable[..., Any]) -> Callable[..., Any]:
    """``SpecDecodeBaseProposer.set_inputs_first_pass``: says which tokens the pass drafts from.

    Patch: ``last-tokens``. Evidence:
    ``tests/performance/test_last_tokens.py::test_stock_runs_all_layers_for_all_tokens``. Related upstream change: none
    found; sglang #27183, open, does the same for prompts of a target.
    """

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        prepared = original(self, *args, **kwargs)
        decoder, groups = getattr(self, DECODER, None), getattr(self, GROUPS, None)
        if decoder is not None and groups is not None:
            setattr(decoder, NEXT, LastTokens(self, groups, prepared[1].long()))
        return prepared

    return wrapper


class LastTokens:
    """The tokens that a first pass drafts from.

    Args:
        proposer: whose pass it is.
        groups: its ``DraftGroups``.
        indices: ``[requests]`` int64, of each request's last token in the pass.
    """

    def __init__(self, proposer: Any, groups: Any, indices: torch.Tensor) -> None:
        self._proposer, self._groups, self.indices = proposer, groups, indices

    def metadata(self, positions: torch.Tensor, layers: Any) -> dict[str, Any]:
        """Attention metadata of these tokens, by name of ``layers``, the drafter's that share KV.

        Args:
            positions: ``[requests]`` int64, where they stand.
        """
        names = {layer.self_attn.attn.layer_name for layer in layers}
        return self._groups.build_for_last_tokens(positions, names)

    def padded(self) -> torch.Tensor:
        """``indices``, and the last one again up to the size of a piecewise CUDA graph."""
        _, batch = self._proposer.cudagraph_dispatcher.dispatch(len(self.indices), invalid_modes={CUDAGraphMode.FULL})
        return torch.cat([self.indices, self.indices[-1:].expand(batch.num_tokens - len(self.indices))])


def fast_prefill_forward(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``Gemma4Model.fast_prefill_forward``: a drafter's second half for the last tokens alone, in a first pass.

    Where piecewise CUDA graphs run, the original copies what the second half reads into the buffers that it was
    captured with. Elsewhere (a draft's own graph, long prompts) nothing need be copied.

    Patch: ``last-tokens``. Evidence:
    ``tests/performance/test_last_tokens.py::test_stock_runs_all_layers_for_all_tokens``. Related upstream change: none
    found; sglang #27183, open, does the same for prompts of a target.
    """

    @functools.wraps(original)
    def wrapper(
        self: Any,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
        per_layer_inputs: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if OURS not in self.__dict__:
            return original(self, input_ids, positions, inputs_embeds, per_layer_inputs, **kwargs)
        context = get_forward_context()
        last: LastTokens | None = self.__dict__.pop(NEXT, None)
        if context.attn_metadata is None:  # a dummy run: tokens still there are of a pass that came to no model
            last = None
        if last is not None:
            stand = positions[last.indices]
            of_last = last.metadata(stand, self.cross_decoder.decoder_layers)
            context.attn_metadata = {**context.attn_metadata, **of_last}
        if context.cudagraph_runtime_mode != CUDAGraphMode.NONE:
            if last is not None:  # where the original looks for them
                looked_at = of_last[self.layers[-1].self_attn.attn.layer_name]
                looked_at.logits_indices_padded, looked_at.num_logits_indices = last.padded(), len(last.indices)
            return original(self, input_ids, positions, inputs_embeds, per_layer_inputs, **kwargs)
        hidden, inputs = self.self_decoder(
            input_ids=input_ids,
            positions=positions,
            inputs_embeds=inputs_embeds,
            per_layer_inputs=per_layer_inputs,
            **kwargs,
        )
        if last is not None:
            of = last.indices
            inputs = None if inputs is None else inputs[of]
            return hidden.index_copy_(0, of, self.cross_decoder(stand, hidden[of], inputs, **kwargs))
        output = self.cross_decoder(positions, hidden, inputs, **kwargs)
        if COLD in self.__dict__:
            delattr(self, COLD)
            _empty(hidden, inputs)
        return output

    return wrapper


def _empty(*tensors: torch.Tensor | None) -> None:
    """Free what these hold: vLLM keeps the arguments with which it compiled a model, here those of the largest prompt.

    (``VllmSerializableFunction.example_inputs``; it has written them to its cache by then, as shapes.)
    """
    for tensor in tensors:
        if tensor is not None:
            tensor.untyped_storage().resize_(0)
