"""Patches for speculation with a drafter whose layers span several KV cache groups."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_gemma4_spec.patching.patch import Edit, Group, Lazy, Patch

if TYPE_CHECKING:
    from vllm_gemma4_spec.spec_decode import (
        acceptance,
        block_tables,
        chunked_prefill,
        config_validation,
        dropped_drafts,
        kv_sharing,
        max_length,
        one_group,
        prefix_cache,
        proposer,
        sleep,
        text_only_drafter,
    )
else:  # a wrapper's module is imported only after the module of vLLM that it patches
    acceptance = Lazy("vllm_gemma4_spec.spec_decode.acceptance")
    block_tables = Lazy("vllm_gemma4_spec.spec_decode.block_tables")
    chunked_prefill = Lazy("vllm_gemma4_spec.spec_decode.chunked_prefill")
    config_validation = Lazy("vllm_gemma4_spec.spec_decode.config_validation")
    dropped_drafts = Lazy("vllm_gemma4_spec.spec_decode.dropped_drafts")
    kv_sharing = Lazy("vllm_gemma4_spec.spec_decode.kv_sharing")
    max_length = Lazy("vllm_gemma4_spec.spec_decode.max_length")
    one_group = Lazy("vllm_gemma4_spec.spec_decode.one_group")
    prefix_cache = Lazy("vllm_gemma4_spec.spec_decode.prefix_cache")
    proposer = Lazy("vllm_gemma4_spec.spec_decode.proposer")
    sleep = Lazy("vllm_gemma4_spec.spec_decode.sleep")
    text_only_drafter = Lazy("vllm_gemma4_spec.spec_decode.text_only_drafter")

_PROPOSER = "vllm.v1.spec_decode.eagle:SpecDecodeBaseProposer"
_RUNNER = "vllm.v1.worker.gpu_model_runner"

DRAFT_GROUPS = Patch(
    name="draft-groups",
    group=Group.CORRECTNESS,
    why="vLLM asserts that all draft layers are in one KV cache group. A Gemma 4 drafter's sliding and full "
    "layers are in several; with the first group's block table for all of them 1.5 % to 29 % of drafts "
    "are accepted where the drafter is the target itself.",
    how="Calls initialize_attn_backend once per group and layer spec, and puts an adapter in each metadata "
    "builder's place that swaps in its group's block table, slot mapping and kernel block size, in every "
    "draft pass. Metadata is built once per distinct spec. A drafter in one group is left as it is.",
    retire="A release whose proposer builds attention metadata per KV cache group.",
    scope="Engines that speculate with a Gemma 4 as target or drafter.",
    related="none found; since 0.32.0 the V2 runner drafts over several groups, eagerly",
    edits=(
        Edit(f"{_PROPOSER}.__init__", proposer.keep_runner),
        Edit(f"{_PROPOSER}.initialize_attn_backend", proposer.initialize_attn_backend),
        Edit(f"{_PROPOSER}._get_slot_mapping", proposer.get_slot_mapping),
    ),
    watches=(
        f"{_PROPOSER}.propose",
        f"{_PROPOSER}.set_inputs_first_pass",
        f"{_PROPOSER}.dummy_run",
        f"{_RUNNER}:GPUModelRunner._build_attention_metadata",
        "vllm.v1.worker.utils:AttentionGroup",
    ),
    needs=("own-blocks",),
)

OWN_BLOCKS = Patch(
    name="own-blocks",
    group=Group.CORRECTNESS,
    why="A new request's first step allocates no slots for drafts, while the drafter writes k tokens past the "
    "prompt; rows of the block table keep the tail of the request that had them before. Those writes can "
    "land in another request's live block.",
    how="allocate_slots grants look-ahead in the first step as in all later ones (not with a KV connector, "
    "whose block counts must match the remote side's); add_row and move_row leave the null block in "
    "every entry that a row's request does not own.",
    retire="A release that allocates look-ahead slots in the first step and clears rows of the block table.",
    scope="Engines that speculate with a Gemma 4 as target or drafter.",
    related="none found; since 0.23.0 the first step looks ahead",
    edits=(
        Edit("vllm.v1.core.sched.scheduler:Scheduler.__init__", block_tables.scheduler_init),
        Edit("vllm.v1.core.kv_cache_manager:KVCacheManager.allocate_slots", block_tables.allocate_slots),
        Edit("vllm.v1.worker.block_table:BlockTable.__init__", block_tables.block_table_init),
        Edit("vllm.v1.worker.block_table:BlockTable.add_row", block_tables.add_row),
        Edit("vllm.v1.worker.block_table:BlockTable.move_row", block_tables.move_row),
    ),
    watches=(
        "vllm.v1.core.sched.scheduler:Scheduler.schedule",
        "vllm.v1.worker.block_table:BlockTable.append_row",
        "vllm.v1.worker.block_table:BlockTable.clear_row",
        "vllm.v1.worker.block_table:BlockTable.swap_row",
    ),
)

KV_SHARED_LAYERS = Patch(
    name="kv-shared-layers",
    group=Group.CORRECTNESS,
    why="E4B checkpoints as transformers writes them have no k_norm in layers that reuse KV, and vLLM refuses "
    "them; with --disable-hybrid-kv-cache-manager such layers have no KV cache spec of their own and "
    "start-up ends in a KeyError.",
    how="load_weights reports the k_norm of such layers, which nothing reads, as loaded; they get the spec of "
    "the layer whose KV they reuse.",
    retire="A release in which Gemma 4's KV-shared layers have no k_norm and per-layer specs include them.",
    scope="The model Gemma 4, and engines with a Gemma 4 as target or drafter.",
    related="none found; since 0.30.0 such layers have a q_proj only",
    edits=(
        Edit("vllm.model_executor.models.gemma4:Gemma4Model.load_weights", kv_sharing.load_weights),
        Edit(
            f"{_RUNNER}:add_kv_sharing_layers_to_kv_cache_groups",
            kv_sharing.add_kv_sharing_layers,
            source="vllm.v1.worker.utils:add_kv_sharing_layers_to_kv_cache_groups",
        ),
    ),
    watches=("vllm.model_executor.models.gemma4:Gemma4Attention",),
)

ONE_GROUP_WINDOWS = Patch(
    name="one-group-windows",
    group=Group.CORRECTNESS,
    why="With --disable-hybrid-kv-cache-manager, a drafter whose sliding window is not the target's (512 and 1024) "
    "ends start-up: 'All attention layers in the same KV cache group must have the same window size'.",
    how="The test for equal specs answers no instead of raising; vLLM then makes one group with a spec per layer.",
    retire="A release whose is_kv_cache_spec_uniform returns False for different windows.",
    scope="Engines with a Gemma 4 as target or drafter.",
    related="none found",
    edits=(
        Edit("vllm.v1.core.kv_cache_utils:get_kv_cache_groups", one_group.get_kv_cache_groups),
        Edit("vllm.v1.core.kv_cache_utils:is_kv_cache_spec_uniform", one_group.is_kv_cache_spec_uniform),
    ),
    watches=(
        "vllm.v1.core.kv_cache_utils:unify_hybrid_kv_cache_specs",
        "vllm.v1.kv_cache_interface:UniformTypeKVCacheSpecs",
    ),
)

TEXT_DRAFTER = Patch(
    name="text-drafter",
    group=Group.CORRECTNESS,
    why="A multimodal target is refused with a draft model, and all published Gemma 4 checkpoints are multimodal: "
    "without this check the target's embeddings would go into the drafter, whose own towers would be built and "
    "loaded for nothing.",
    how="A draft model drafts from token ids, placeholders of images, audio and video included. A drafter's "
    "Gemma4ForConditionalGeneration config becomes that of its language model, Gemma4ForCausalLM.",
    retire="A release that drafts from text for multimodal targets and loads a drafter's language model only.",
    scope="Engines with a Gemma 4 as target or drafter; drafters that are multimodal Gemma 4s.",
    related="#42005; since 0.21.0 such a pair is warned about, no longer refused",
    edits=(
        Edit(f"{_PROPOSER}._raise_if_multimodal", text_only_drafter.raise_if_multimodal),
        Edit("vllm.config.speculative:SpeculativeConfig.hf_config_override", text_only_drafter.hf_config_override),
    ),
    watches=(
        f"{_PROPOSER}.load_model",
        f"{_PROPOSER}.propose",
        f"{_RUNNER}:GPUModelRunner.propose_draft_token_ids",
        "vllm.model_executor.models.gemma4:Gemma4ForCausalLM.load_weights",
    ),
)

CHUNK_BOUNDARIES = Patch(
    name="chunk-boundaries",
    group=Group.CORRECTNESS,
    why="After a chunk of a prompt the drafter is given the whole prompt's last token, not the next one. An EAGLE "
    "head keeps the KV of that wrong pair, once per chunk, and drafts from it. Draft models recompute it.",
    how="The token looked up for an unfinished prompt is the one after the tokens computed so far.",
    retire="A release whose prepare_next_token_ids_padded looks up the sequence length for unfinished prompts.",
    scope="Engines that speculate with a Gemma 4 as target or drafter.",
    related="none found",
    edits=(Edit(f"{_PROPOSER}.prepare_next_token_ids_padded", chunked_prefill.prepare_next_token_ids_padded),),
    watches=(f"{_RUNNER}:GPUModelRunner._prepare_inputs", "vllm.v1.worker.gpu_input_batch:CachedRequestState"),
    needs=("draft-groups",),
)

LENGTH_LIMIT = Patch(
    name="length-limit",
    group=Group.CORRECTNESS,
    why="While one request of a batch is within k tokens of the maximum length, the drafter's or the target's, nothing "
    "is drafted for any. The drafter's KV of those tokens is then missing: drafts of the other requests stay wrong, "
    "and prefix caching hands the holes on to later ones. E4B ends at 131,072 tokens, 31B at 262,144.",
    how="Drafting goes on unless the shortest request is too long. Positions past a shorter drafter's maximum are "
    "clamped and write nothing, in any pass; drafts there are rejected.",
    retire="A release that decides per request whether to draft.",
    scope="Draft models beside or from Gemma 4 (target or drafter).",
    related="none found",
    edits=(
        Edit(f"{_RUNNER}:GPUModelRunner.sample_tokens", max_length.sample_tokens),
        Edit(f"{_PROPOSER}.__init__", max_length.proposer_init),
        Edit(f"{_PROPOSER}.propose", max_length.propose),
        Edit(f"{_PROPOSER}.set_inputs_first_pass", max_length.set_inputs_first_pass),
        Edit(
            "vllm.v1.spec_decode.eagle:eagle_step_update_slot_mapping_and_metadata",
            max_length.eagle_step_update,
            source="vllm.v1.spec_decode.utils:eagle_step_update_slot_mapping_and_metadata",
        ),
    ),
    watches=(
        "vllm.v1.spec_decode.utils:compute_new_slot_mapping",
        "vllm.v1.spec_decode.utils:eagle_step_slot_mapping_metadata_kernel",
    ),
)

DRAFTER_CHECKS = Patch(
    name="drafter-checks",
    group=Group.CONVENIENCE,
    why="A drafter folder without config.json, with another vocabulary or another tensor-parallel size ends in a "
    "traceback, for the last one in a worker after the target has been loaded. With pipeline parallelism a draft "
    "model would be cut into stages of which only the last is built. Sleep level 2 discards its weights for good.",
    how="create_speculative_config looks at the drafter, create_engine_config at the finished config, and either ends "
    "with one line; EngineCore.sleep refuses level 2 before anything is discarded.",
    retire="One-line errors upstream; the checks are of use with any release.",
    scope="Engines with a Gemma 4 as target or drafter.",
    related="none found for the messages; #42516 repairs pipeline parallelism, without speculation",
    edits=(
        Edit(
            "vllm.engine.arg_utils:EngineArgs.create_speculative_config",
            config_validation.create_speculative_config,
        ),
        Edit("vllm.engine.arg_utils:EngineArgs.create_engine_config", config_validation.create_engine_config),
        Edit("vllm.v1.engine.core:EngineCore.sleep", sleep.engine_sleep),
    ),
    watches=("vllm.config.speculative:SpeculativeConfig.verify_equal_vocab_size_if_draft_model",),
)

PREFIX_HITS = Patch(
    name="prefix-hits",
    group=Group.CONVENIENCE,
    why="Beside an EAGLE head 0.19.1 drops the last block of a prefix cache hit once per KV cache group and aligns "
    "what is left to the largest block: of Gemma 4's groups nothing is left, so every prompt is computed anew.",
    how="Nothing is dropped, as in plain decoding. The head's last cached key may then be that of another next token, "
    "which can cost a draft and never an answer.",
    retire="vLLM 0.30.0, where the drop can be switched off; 0.20.0 (#40624) aligns after it and keeps most hits.",
    scope="Engines with a Gemma 4 as target that speculate with an EAGLE head.",
    related="#40624",
    edits=(Edit("vllm.v1.core.sched.scheduler:Scheduler.__init__", prefix_cache.scheduler_init),),
    watches=(
        "vllm.v1.core.kv_cache_coordinator:HybridKVCacheCoordinator.find_longest_cache_hit",
        "vllm.v1.core.single_type_kv_cache_manager:SlidingWindowManager.find_longest_cache_hit",
    ),
)

ACCEPTANCE_WATCH = Patch(
    name="acceptance-watch",
    group=Group.CONVENIENCE,
    why="A drafter that reads the wrong KV cache, or does not fit its target, changes no answer: speculation only gets "
    "slower, and nothing in the log says why.",
    how="With VLLM_GEMMA4_SPEC_CHECK=1, make_spec_decoding_stats counts the drafts whose first token was accepted and "
    "says once when they are fewer than 5 % of the last 500. Without it the original stays in its place.",
    retire="A release that warns of low acceptance.",
    scope="Engines that speculate with a Gemma 4 as target or drafter, with VLLM_GEMMA4_SPEC_CHECK=1.",
    related="none found",
    edits=(
        Edit(
            "vllm.v1.core.sched.scheduler:Scheduler.make_spec_decoding_stats",
            acceptance.make_spec_decoding_stats,
        ),
    ),
    watches=("vllm.v1.core.sched.scheduler:Scheduler.update_from_output",),
)

SKIPPED_DRAFTS = Patch(
    name="skipped-drafts",
    group=Group.CONVENIENCE,
    why="When every request of a batch is within k tokens of the maximum length (with EAGLE heads: when one is), vLLM "
    "runs no draft pass and no metric says so. tok/s falls; under async scheduling so does acceptance, as zeros are "
    "verified in place of drafts.",
    how="Steps that sample without a call of propose_draft_token_ids are counted, as "
    "gemma4_spec_drafts_skipped_total at /metrics.",
    retire="A release that counts them.",
    scope="Engines that speculate with a Gemma 4 as target or drafter.",
    related="none found",
    edits=(
        Edit(f"{_RUNNER}:GPUModelRunner.propose_draft_token_ids", dropped_drafts.propose_draft_token_ids),
        Edit(f"{_RUNNER}:GPUModelRunner.sample_tokens", dropped_drafts.sample_tokens),
    ),
)

PATCHES: tuple[Patch, ...] = (
    DRAFT_GROUPS,
    OWN_BLOCKS,
    KV_SHARED_LAYERS,
    ONE_GROUP_WINDOWS,
    TEXT_DRAFTER,
    CHUNK_BOUNDARIES,
    LENGTH_LIMIT,
    DRAFTER_CHECKS,
    PREFIX_HITS,
    ACCEPTANCE_WATCH,
    SKIPPED_DRAFTS,
)
