"""Drafting with an assistant: k identical passes of one token a request.

An assistant has no KV cache, so nothing of a prompt has to be run through it: a draft starts from each request's last
accepted token alone, whatever else the step computed, and every pass stands at the same position over the same cache.
All that a pass depends on is therefore ``[num_reqs]`` long, and one CUDA graph per batch size holds the whole draft of
decode steps, mixed batches and the last chunk of a prompt alike.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.config.utils import replace
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader import get_model
from vllm.model_executor.models import supports_multimodal
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec, UniformTypeKVCacheSpecs
from vllm.v1.spec_decode.eagle import EagleProposer
from vllm.v1.worker.utils import AttentionGroup

from vllm_gemma4_spec import scope, settings
from vllm_gemma4_spec.mtp.graphs import AssistantGraphs, batch_sizes, capturable
from vllm_gemma4_spec.mtp.invariants import check_draft
from vllm_gemma4_spec.performance import compile_settings
from vllm_gemma4_spec.performance.argmax import HEAD, head_of
from vllm_gemma4_spec.performance.draft_graphs import GRAPHS
from vllm_gemma4_spec.quantization import bf16_layers

# A query stands at the last position that the target's cache holds: with L tokens there, at L - 1, as in vLLM 0.21 and
# later, SGLang and mlx-vlm. transformers' generate() puts it at L.
POSITION = -1


class RunnerProposer(EagleProposer):
    """An ``EagleProposer``, but for an assistant, which gets an :class:`AssistantProposer`.

    The runner asks in six places whether its drafter is an ``EagleProposer``, by the name that this class takes there.
    """

    def __new__(cls, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> RunnerProposer:
        assistant = cls is RunnerProposer and scope.is_assistant(vllm_config.speculative_config)
        return object.__new__(AssistantProposer if assistant else cls)


class AssistantProposer(RunnerProposer):
    """Drafts with an assistant; of its parents it keeps what prepares a step's tokens and lengths."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner: Any = None) -> None:
        super().__init__(vllm_config, device, runner)
        self._runner = runner
        self._check = settings.CHECK.on()
        self.supports_mm_inputs = False  # placeholders are drafted from as the token ids that they are
        # One token a request: the parent's buffers are as long as the longest step. Two rows at least, since
        # torch.compile takes a first call with one for a constant.
        self.most_requests = most = max(2, vllm_config.scheduler_config.max_num_seqs)
        self.inputs_embeds = torch.empty(0, device=device)
        self.hidden_states = torch.zeros(most, self.hidden_size, dtype=self.dtype, device=device)
        self.input_ids = torch.zeros(most, dtype=torch.int32, device=device)
        self.positions = torch.zeros(most, dtype=torch.int64, device=device)
        self.seq_lens = torch.ones(most, dtype=torch.int32, device=device)
        self.no_slots = torch.full((most,), -1, dtype=torch.int64, device=device)

    # Loading.

    def _create_draft_vllm_config(self) -> VllmConfig:
        spec = self.speculative_config
        return replace(
            super()._create_draft_vllm_config(),
            quant_config=None,  # the assistant's own, or none: VllmConfig reads it from the model's config
            parallel_config=replace(spec.draft_parallel_config, rank=self.vllm_config.parallel_config.rank),
            model_config=spec.draft_model_config,
        )

    def _get_model(self) -> nn.Module:
        from vllm.compilation.backends import set_model_tag

        compile_settings.use_choices()
        self._draft_config = self._create_draft_vllm_config()
        with set_model_tag(scope.DRAFT_GRAPH):
            model = get_model(vllm_config=self._draft_config, prefix="assistant")
        if settings.patch_switch("draft-products").on():
            bf16_layers.take(model)
        return model

    def load_model(self, target_model: nn.Module) -> None:
        before = set(get_layers_from_vllm_config(self.vllm_config, Attention))
        self.model = self._get_model()
        self._draft_attn_layer_names = set(get_layers_from_vllm_config(self.vllm_config, Attention)) - before
        language = target_model.get_language_model() if supports_multimodal(target_model) else target_model
        embedding = language.model.embed_tokens
        # Without a LoRA adapter's part, whose kernels expect the rows of the target's step.
        self.model.model.embed_tokens = getattr(embedding, "base_layer", embedding)
        if self.device.type == "cuda" and settings.patch_switch("draft-argmax").on():
            setattr(self, HEAD, head_of(self.model))
        # One value and index per rank instead of all logits.
        self.use_local_argmax_reduction = True

    # What the runner asks for before it serves.

    def initialize_attn_backend(
        self, kv_cache_config: KVCacheConfig, kernel_block_sizes: list[int] | None = None
    ) -> None:
        """Metadata builders for the donors' groups, of the assistant's own head counts."""
        layers: dict[tuple[int, KVCacheSpec], list[str]] = defaultdict(list)
        for gid, group in enumerate(kv_cache_config.kv_cache_groups):
            for name in sorted(self._draft_attn_layer_names & set(group.layer_names)):
                spec = group.kv_cache_spec
                spec = spec.kv_cache_specs[name] if isinstance(spec, UniformTypeKVCacheSpecs) else spec
                layers[gid, spec].append(name)
        attention = get_layers_from_vllm_config(self.vllm_config, Attention)
        self.draft_attn_groups = []
        for (gid, spec), names in layers.items():
            group = AttentionGroup(attention[names[0]].get_attn_backend(), names, spec, gid)
            size = kernel_block_sizes[gid] if kernel_block_sizes is not None else None
            group.create_metadata_builders(self._draft_config, self.device, kernel_block_size=size)
            self.draft_attn_groups.append(group)
        # The group whose metadata the runner hands to `propose`; lengths are the same in all.
        self.kv_cache_gid = min(gid for gid, _ in layers)
        self.block_size = kv_cache_config.kv_cache_groups[self.kv_cache_gid].kv_cache_spec.block_size

    def initialize_cudagraph_keys(self, cudagraph_mode: Any) -> None:
        """Nothing: a draft is one graph, without pieces."""

    def dummy_run(self, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """One pass without attention: compiles the model, and shows the memory profile what a draft takes."""
        num_reqs = max(2, min(num_tokens, self.most_requests))
        self._passes(num_reqs, 1, None)

    def graphs_to_capture(self, draft_lengths: Sequence[int]) -> AssistantGraphs | None:
        """Graphs of whole drafts; None where a metadata builder depends on more than device tensors."""
        config = self.vllm_config
        if not capturable(self):
            return None
        sizes, query_len = config.compilation_config.cudagraph_capture_sizes, self.num_speculative_tokens + 1
        counts = batch_sizes(sizes or (), query_len, config.scheduler_config.max_num_seqs)
        return AssistantGraphs(self, counts, draft_lengths) if counts else None

    # Drafting.

    @torch.inference_mode()
    def propose(
        self,
        target_token_ids: Tensor,
        target_positions: Tensor,
        target_hidden_states: Tensor,
        next_token_ids: Tensor,
        token_indices_to_sample: Tensor | None,
        common_attn_metadata: CommonAttentionMetadata,
        sampling_metadata: Any,
        mm_embed_inputs: Any = None,
        num_rejected_tokens_gpu: Tensor | None = None,
        slot_mappings: Any = None,
    ) -> Tensor:
        """Drafts from each request's last accepted token.

        Args:
            target_hidden_states: ``[num_tokens, backbone_hidden_size]``, after the target's final norm.
            next_token_ids: ``[num_reqs]``, the tokens just sampled.
            token_indices_to_sample: ``[num_reqs]``, rows of the last accepted tokens; None: of the last tokens.
            num_rejected_tokens_gpu: ``[num_reqs]`` int32, how much of each length the target rejected.

        Returns:
            ``[num_reqs, num_speculative_tokens]`` int64.
        """
        cad = common_attn_metadata
        num_reqs, draft_length = cad.num_reqs, self.num_speculative_tokens
        rows = token_indices_to_sample if token_indices_to_sample is not None else cad.query_start_loc[1:] - 1
        torch.index_select(target_hidden_states, 0, rows[:num_reqs], out=self.hidden_states[:num_reqs])
        self.input_ids[:num_reqs].copy_(next_token_ids)
        seq_lens = self.seq_lens[:num_reqs]
        if num_rejected_tokens_gpu is None:
            seq_lens.copy_(cad.seq_lens[:num_reqs])
        else:
            torch.sub(cad.seq_lens[:num_reqs], num_rejected_tokens_gpu, out=seq_lens)
        torch.add(seq_lens, POSITION, out=self.positions[:num_reqs])
        if self._check:
            check_draft(self._runner, self.draft_attn_groups, seq_lens, target_positions[rows[:num_reqs].long()])
        graphs: AssistantGraphs | None = self.__dict__.get(GRAPHS)
        if graphs is not None and graphs.fits(num_reqs, draft_length):
            return graphs.replay(num_reqs, draft_length)
        return self._passes(num_reqs, draft_length, self.metadata(num_reqs, cad.max_seq_len))

    def block_tables(self, num_reqs: int) -> list[Tensor]:
        """The first rows of each donor group's block table: ``[num_reqs, blocks]`` int32, at addresses that stay."""
        tables = self._runner.input_batch.block_table
        return [tables[group.kv_cache_group_id].get_device_tensor(num_reqs) for group in self.draft_attn_groups]

    def metadata(self, num_reqs: int, max_seq_len: int) -> dict[str, Any]:
        """What every pass of a draft attends with, by layer: each group's blocks, the same lengths, no slots."""
        out: dict[str, Any] = {}
        for group, table in zip(self.draft_attn_groups, self.block_tables(num_reqs), strict=True):
            cad = CommonAttentionMetadata(
                query_start_loc=self.arange[: num_reqs + 1],
                query_start_loc_cpu=torch.arange(num_reqs + 1, dtype=torch.int32),
                seq_lens=self.seq_lens[:num_reqs],
                num_reqs=num_reqs,
                num_actual_tokens=num_reqs,
                max_query_len=1,
                max_seq_len=max_seq_len,
                block_table_tensor=table,
                slot_mapping=self.no_slots[:num_reqs],
            )
            built = group.get_metadata_builder().build_for_drafting(common_attn_metadata=cad, draft_index=0)
            out |= dict.fromkeys(group.layer_names, built)
        return out

    def _passes(self, num_reqs: int, draft_length: int, metadata: dict[str, Any] | None) -> Tensor:
        """``draft_length`` passes from the first ``num_reqs`` rows of the buffers: ``[num_reqs, draft_length]`` int64.

        No host synchronization.
        """
        ids, hidden = self.input_ids[:num_reqs], self.hidden_states[:num_reqs]
        drafts: list[Tensor] = []
        parallel = self.vllm_config.parallel_config.data_parallel_size
        with set_forward_context(
            metadata,
            self.vllm_config,
            num_tokens=num_reqs,
            # Ranks need not agree on anything: an assistant has no experts.
            num_tokens_across_dp=torch.full((parallel,), num_reqs, dtype=torch.int32) if parallel > 1 else None,
        ):
            for _ in range(draft_length):
                if drafts:
                    ids = drafts[-1].to(ids.dtype)
                normed, hidden = self.model(input_ids=ids, positions=self.positions[:num_reqs], hidden_states=hidden)
                drafts.append(self._greedy_sample(normed))
        return torch.stack(drafts, dim=1)


def runner_proposer(original: type[EagleProposer]) -> type[EagleProposer]:
    """What the model runner instantiates in place of ``EagleProposer``.

    Patch: ``mtp-assistant``. Evidence: ``tests/mtp/test_mtp_validation.py::test_stock_does_not_know_assistants``.
    Related upstream change: #41745 (assistants, in 0.21.0), #43982 and #43909 (in 0.23.0), #45258 and #49262 (open).
    """
    return RunnerProposer
