"""Patches that make drafting fast on a GPU; without them the tokens are the same. On a CPU they do nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_gemma4_spec.patching.patch import Edit, Group, Lazy, Patch

if TYPE_CHECKING:
    from vllm_gemma4_spec.performance import (
        adaptive_k,
        argmax,
        async_scheduling,
        cache_write,
        compile_settings,
        compiled_at_start,
        draft_graph_key,
        draft_graphs,
        expert_routing,
        first_pass_slots,
        fused_all_reduce,
        graph_capture,
        greedy_sampling,
        head_norms,
        heads_into_cache,
        last_tokens,
        per_layer_gather,
        soft_cap,
        split_attention,
        step_indices,
        step_slots,
        table_copies,
        whole_copies,
    )
else:  # a wrapper's module is imported only after the module of vLLM that it patches
    adaptive_k = Lazy("vllm_gemma4_spec.performance.adaptive_k")
    argmax = Lazy("vllm_gemma4_spec.performance.argmax")
    async_scheduling = Lazy("vllm_gemma4_spec.performance.async_scheduling")
    cache_write = Lazy("vllm_gemma4_spec.performance.cache_write")
    compile_settings = Lazy("vllm_gemma4_spec.performance.compile_settings")
    compiled_at_start = Lazy("vllm_gemma4_spec.performance.compiled_at_start")
    draft_graph_key = Lazy("vllm_gemma4_spec.performance.draft_graph_key")
    draft_graphs = Lazy("vllm_gemma4_spec.performance.draft_graphs")
    expert_routing = Lazy("vllm_gemma4_spec.performance.expert_routing")
    first_pass_slots = Lazy("vllm_gemma4_spec.performance.first_pass_slots")
    fused_all_reduce = Lazy("vllm_gemma4_spec.performance.fused_all_reduce")
    graph_capture = Lazy("vllm_gemma4_spec.performance.graph_capture")
    greedy_sampling = Lazy("vllm_gemma4_spec.performance.greedy_sampling")
    head_norms = Lazy("vllm_gemma4_spec.performance.head_norms")
    heads_into_cache = Lazy("vllm_gemma4_spec.performance.heads_into_cache")
    last_tokens = Lazy("vllm_gemma4_spec.performance.last_tokens")
    per_layer_gather = Lazy("vllm_gemma4_spec.performance.per_layer_gather")
    soft_cap = Lazy("vllm_gemma4_spec.performance.soft_cap")
    split_attention = Lazy("vllm_gemma4_spec.performance.split_attention")
    step_indices = Lazy("vllm_gemma4_spec.performance.step_indices")
    step_slots = Lazy("vllm_gemma4_spec.performance.step_slots")
    table_copies = Lazy("vllm_gemma4_spec.performance.table_copies")
    whole_copies = Lazy("vllm_gemma4_spec.performance.whole_copies")

_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_PROPOSER = "vllm.v1.spec_decode.eagle:SpecDecodeBaseProposer"
_GEMMA4 = "vllm.model_executor.models.gemma4:Gemma4"
_DRAFT_MODEL = "vllm.v1.spec_decode.draft_model:DraftModelProposer"

DRAFT_GRAPHS = Patch(
    name="draft-graphs",
    group=Group.CONVENIENCE,
    why="vLLM runs a draft model without CUDA graphs: a pass of E4B takes the host 32 ms to launch where an H200 "
    "needs 2 to 3 ms to run it, so speculation loses at any acceptance.",
    how="For decode batches the original propose (first pass, further passes, lm_head, argmax) is captured as one "
    "CUDA graph per batch size after the target's own graphs, and replayed on buffers that keep their address. "
    "Other batches, and drafters in one KV cache group, use the original.",
    retire="A release that captures a draft model's whole loop.",
    scope="Draft models in several KV cache groups, of engines with a Gemma 4 as target or drafter.",
    related="#45258, open: the same lack for MTP drafters",
    edits=(
        Edit(f"{_PROPOSER}.propose", draft_graphs.propose),
        Edit(f"{_RUNNER}.capture_model", graph_capture.capture_model),
    ),
    watches=(
        f"{_PROPOSER}.set_inputs_first_pass",
        f"{_PROPOSER}.prepare_inputs_padded",
        f"{_PROPOSER}._determine_batch_execution_and_padding",
        f"{_RUNNER}.propose_draft_token_ids",
        "vllm.v1.spec_decode.utils:compute_new_slot_mapping",
        "vllm.v1.spec_decode.utils:extend_all_queries_by_N",
        "vllm.v1.cudagraph_dispatcher:CudagraphDispatcher.dispatch",
        "vllm.v1.attention.backends.triton_attn:TritonAttentionMetadataBuilder",
    ),
    needs=("draft-groups",),
)

DRAFT_PIECES = Patch(
    name="draft-pieces",
    group=Group.CONVENIENCE,
    why="Only EAGLE's dispatcher is given piecewise CUDA graphs, so the passes of a draft model in a batch that also "
    "holds a prompt are launched kernel by kernel.",
    how="The draft model's dispatcher gets the target's sizes, too; vLLM's dummy runs then capture piecewise graphs.",
    retire="A release that initializes the dispatcher of draft models.",
    scope="Draft models of engines with a Gemma 4 as target or drafter.",
    related="none found",
    edits=(Edit(f"{_RUNNER}._check_and_update_cudagraph_mode", draft_graphs.update_cudagraph_mode),),
    watches=(
        f"{_PROPOSER}.initialize_cudagraph_keys",
        f"{_PROPOSER}.dummy_run",
        f"{_RUNNER}._dummy_run",
    ),
)

ADAPTIVE_K = Patch(
    name="adaptive-k",
    group=Group.CONVENIENCE,
    why="Every step runs k draft passes, also while the target rejects nearly all of them: with nothing accepted 31B + "
    "E4B decode at half the speed of plain decoding.",
    how="With VLLM_GEMMA4_SPEC_ADAPTIVE_K set, a step runs as many passes as recent acceptance pays for, at least one; "
    "dropped drafts are token 0, to be rejected. Off by default.",
    retire="A release that adapts the number of draft tokens.",
    scope="Draft models of engines with a Gemma 4 as target or drafter, with VLLM_GEMMA4_SPEC_ADAPTIVE_K set.",
    related="none found by number; 0.24.0 chooses k by batch size, 0.28.0 verifies adaptively (V2 runner)",
    edits=(Edit(f"{_RUNNER}.propose_draft_token_ids", adaptive_k.propose_draft_token_ids),),
    watches=(f"{_PROPOSER}.propose", f"{_RUNNER}._copy_draft_token_ids_to_cpu"),
)

ASYNC_DRAFTS = Patch(
    name="async-drafts",
    group=Group.CONVENIENCE,
    why="Async scheduling turns itself off for a draft model, so the host's work between steps is not hidden; and "
    "where a user turns it on, sliding-window blocks are freed up to k tokens too early, because lengths count "
    "drafts that are then rejected.",
    how="It stays on by default for draft models on CUDA, and blocks are freed k tokens later while it is on.",
    retire="A release whose default is on and that frees blocks by confirmed lengths.",
    scope="Engines that speculate with a Gemma 4 as target or drafter; the default is changed for draft models alone.",
    related="none found",
    edits=(
        Edit("vllm.config.vllm:VllmConfig.__post_init__", async_scheduling.vllm_config),
        Edit("vllm.v1.core.sched.scheduler:Scheduler.__init__", async_scheduling.scheduler_init),
        Edit(
            "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator.remove_skipped_blocks",
            async_scheduling.remove_skipped_blocks,
        ),
    ),
    watches=(
        "vllm.v1.core.sched.async_scheduler:AsyncScheduler",
        "vllm.v1.core.kv_cache_manager:KVCacheManager.allocate_slots",
    ),
)

LOCAL_ARGMAX = Patch(
    name="local-argmax",
    group=Group.CONVENIENCE,
    why="use_local_argmax_reduction of a speculative config ends the engine at the first draft: Gemma 4 has no "
    "get_top_tokens. Without it every draft pass gathers all 262,144 logits under tensor parallelism.",
    how="Adds the method, which hands on to vLLM's own LogitsProcessor.get_top_tokens.",
    retire="A release whose Gemma4ForCausalLM has get_top_tokens.",
    scope="Gemma 4's own class.",
    related="none found",
    edits=(
        Edit(
            "vllm.model_executor.models.gemma4:Gemma4ForCausalLM.get_top_tokens",
            argmax.get_top_tokens,
            adds=True,
        ),
    ),
    watches=(
        "vllm.model_executor.layers.logits_processor:LogitsProcessor.get_top_tokens",
        "vllm.model_executor.models.gemma4:Gemma4ForCausalLM.compute_logits",
    ),
)

DRAFT_COMPILE = Patch(
    name="draft-compile",
    group=Group.CONVENIENCE,
    why="A draft pass is some 300 kernels of 1 to 3 us; each of those that torch.compile makes waits for its launch, "
    "and norms read their row once per sum.",
    how="From Hopper on a draft model is compiled with programmatic dependent launch and with persistent reductions "
    "up to 8,192 values.",
    retire="An Inductor that does both by itself.",
    scope="Draft models that are a Gemma 4, from Hopper on.",
    related="none found",
    edits=(
        Edit(f"{_DRAFT_MODEL}._get_model", compile_settings.get_model),
        Edit("vllm.compilation.backends:VllmBackend.__init__", compile_settings.backend),
    ),
    watches=("vllm.compilation.caching:VllmSerializableFunction.finalize_loading",),
)

TARGET_COMPILE = Patch(
    name="target-compile",
    group=Group.CONVENIENCE,
    why="A decode step of 31B has some 500 kernels of 1 to 7 us between its GEMMs; each of those that torch.compile "
    "makes waits for its launch, the GEMM behind it for its end, and norms read their row once per sum: 0.8 of 9.5 ms "
    "on an H200.",
    how="From Hopper on a Gemma 4 target is compiled with programmatic dependent launch (triton.enable_pdl in "
    "inductor_compile_config, unless a user set it) and with persistent reductions up to 8,192 values. Its kernels let "
    "the next one start before they wait for the one before; where Inductor 2.10.0 would write that line it ends in an "
    "assertion (repaired in 2.11, pytorch PR 170981).",
    retire="An Inductor that does both by itself.",
    scope="Engines whose target is a Gemma 4, from Hopper on.",
    related="none found",
    edits=(
        Edit("vllm.config.vllm:VllmConfig.__post_init__", compile_settings.vllm_config),
        Edit("vllm.compilation.backends:VllmBackend.__init__", compile_settings.target_backend),
    ),
    watches=("vllm.compilation.caching:VllmSerializableFunction.finalize_loading",),
)

DRAFT_ARGMAX = Patch(
    name="draft-argmax",
    group=Group.CONVENIENCE,
    why="Every draft pass computes, soft-caps and stores 262,144 logits to find the largest: 330 us a pass of E4B on "
    "an H200, of which 313 read lm_head in bfloat16.",
    how="A draft model's unquantized lm_head gets an NVFP4 copy (0.4 GB) that finds eight candidate blocks of 128 "
    "token ids; their logits are then computed exactly and the largest is taken. Under tensor parallelism each rank "
    "does so for its part, and the largest of theirs is taken.",
    retire="A fused argmax over lm_head in vLLM.",
    scope="Draft models and assistants that are a Gemma 4, on CUDA.",
    related="none found",
    edits=(
        Edit(f"{_PROPOSER}.load_model", argmax.load_model),
        Edit(f"{_PROPOSER}._greedy_sample", argmax.greedy_sample),
    ),
    watches=(
        "vllm.model_executor.layers.logits_processor:LogitsProcessor.forward",
        "vllm.model_executor.models.gemma4:Gemma4ForCausalLM.compute_logits",
    ),
)

SPLIT_ATTENTION = Patch(
    name="split-attention",
    group=Group.CONVENIENCE,
    why="The attention of a verification and of a draft's first pass, a few tokens per request, runs on a handful of "
    "programs that walk the whole context: at 8,192 tokens a full layer of 31B takes an H200 690 us instead of 90.",
    how="Short queries run vLLM's own kernel that cuts the context into segments, as one token per request does. On "
    "Hopper tiles, stages and segments suit the batch, and in sliding layers a kernel of this package cuts up what a "
    "query sees.",
    retire="A choice of kernel by the number of programs instead of by the query length.",
    scope="Engines with a Gemma 4 as target or drafter, on TRITON_ATTN.",
    related="none found for the choice of kernel; #43257, open, tunes it for head size 512",
    edits=(
        Edit(
            "vllm.v1.attention.backends.triton_attn:TritonAttentionMetadataBuilder.__init__",
            split_attention.builder_init,
        ),
        Edit(
            "vllm.v1.attention.backends.triton_attn:unified_attention",
            split_attention.unified_attention,
            source="vllm.v1.attention.ops.triton_unified_attention:unified_attention",
        ),
        Edit(
            "vllm.v1.attention.ops.triton_unified_attention:kernel_unified_attention_2d",
            split_attention.attention_kernel,
        ),
        Edit(
            "vllm.v1.attention.ops.triton_unified_attention:kernel_unified_attention_3d",
            split_attention.attention_kernel,
        ),
        Edit(
            "vllm.v1.attention.ops.triton_unified_attention:reduce_segments",
            split_attention.reduce_kernel,
        ),
    ),
    watches=(
        "vllm.v1.attention.backends.triton_attn:TritonAttentionImpl.forward",
        "vllm.v1.attention.backends.triton_attn:TritonAttentionMetadataBuilder",
    ),
)

CACHE_WRITE = Patch(
    name="cache-write",
    group=Group.CONVENIENCE,
    why="vLLM's kernel that writes keys and values into the cache starts when all before has ended, between kernels "
    "that start early: 1.2 us of a layer on an H200.",
    how="From Hopper on a Triton kernel with programmatic dependent launch writes the same bits for up to 320 tokens, "
    "in 0.4 to 0.7 us less; caches in fp8, prompts and the rest stay with vLLM's kernel.",
    retire="A cache write of TRITON_ATTN with programmatic dependent launch.",
    scope="Layers of engines with a Gemma 4 as target or drafter, on TRITON_ATTN, from Hopper on.",
    related="none found",
    edits=(
        Edit("vllm.v1.attention.backends.triton_attn:TritonAttentionImpl.__init__", cache_write.impl_init),
        Edit(
            "vllm.v1.attention.backends.triton_attn:TritonAttentionImpl.do_kv_cache_update",
            cache_write.do_kv_cache_update,
        ),
    ),
    watches=(
        "vllm.model_executor.layers.attention.attention:unified_kv_cache_update",
        "vllm.v1.attention.ops.triton_reshape_and_cache_flash:triton_reshape_and_cache_flash",
    ),
)

FIRST_PASS_SLOTS = Patch(
    name="first-pass-slots",
    group=Group.CONVENIENCE,
    why="Before a draft's first pass vLLM finds its slots with 19 kernels of PyTorch, one after the other: 34 us "
    "of E4B's draft on an H200.",
    how="On CUDA one Triton kernel does; and the indices of the tokens to sample from are int64, to which PyTorch "
    "converts them at each of three look-ups.",
    retire="A release that computes the slots within copy_and_expand_eagle_inputs_kernel.",
    scope="Draft models of engines with a Gemma 4 as target or drafter, on CUDA.",
    related="none found",
    edits=(
        Edit(f"{_PROPOSER}.set_inputs_first_pass", first_pass_slots.set_inputs_first_pass),
        Edit(
            "vllm.v1.spec_decode.eagle:compute_new_slot_mapping",
            first_pass_slots.compute_new_slot_mapping,
            source="vllm.v1.spec_decode.utils:compute_new_slot_mapping",
        ),
    ),
    watches=(f"{_PROPOSER}.propose",),
)

LAST_TOKENS = Patch(
    name="last-tokens",
    group=Group.CONVENIENCE,
    why="A draft's first pass runs every layer for the k + 1 tokens of a request that the target has just verified and "
    "the new one, or for its whole prompt, and drafts from the last one. Layers that share an earlier layer's KV, 18 "
    "of E4B's 42, leave nothing behind them for the others.",
    how="The drafter is built in the two halves that Gemma4Model has for --kv-sharing-fast-prefill, each compiled by "
    "itself; in a first pass the second half runs the last token of each request alone, with attention metadata of one "
    "token a request from the drafter's own builders.",
    retire="A release whose draft models run KV-shared layers for the tokens that are sampled from alone.",
    scope="Gemma 4 draft models with KV-shared layers; not with experts, M-RoPE, pipeline parallelism, parallel "
    "drafting or --kv-sharing-fast-prefill. A drafter in one KV cache group has two halves, too, which run all tokens.",
    needs=("draft-groups",),
    related="none found; sglang #27183, open, does the same for prompts of a target",
    edits=(
        Edit(f"{_DRAFT_MODEL}._get_model", last_tokens.get_model),
        Edit(f"{_GEMMA4}ForCausalLM.__init__", last_tokens.model_init),
        Edit(f"{_GEMMA4}Model.fast_prefill_forward", last_tokens.fast_prefill_forward),
        Edit(f"{_PROPOSER}.set_inputs_first_pass", last_tokens.set_inputs_first_pass),
    ),
    watches=(f"{_PROPOSER}.propose", f"{_GEMMA4}Model.__init__", f"{_GEMMA4}Model.forward"),
)

STEP_SLOTS = Patch(
    name="step-slots",
    group=Group.CONVENIENCE,
    why="Before a step's first pass vLLM finds its slots with a kernel for each KV cache group, one after the other: "
    "3 us each on an H200, and a 31B that drafts with an E4B has 22 groups or more, as a group has as many layers as "
    "the smallest kind of layer.",
    how="On CUDA one Triton kernel finds them for all groups and writes them where vLLM's does.",
    retire="A release that computes the slots of all groups at once.",
    scope="Engines with a Gemma 4 as target or drafter, on CUDA, in several KV cache groups, without context "
    "parallelism.",
    related="none found",
    edits=(
        Edit(f"{_RUNNER}.may_reinitialize_input_batch", step_slots.may_reinitialize_input_batch),
        Edit("vllm.v1.worker.block_table:MultiGroupBlockTable.compute_slot_mapping", step_slots.compute_slot_mapping),
    ),
    watches=(
        "vllm.v1.worker.block_table:BlockTable.compute_slot_mapping",
        "vllm.v1.worker.block_table:_compute_slot_mapping_kernel",
    ),
)

TABLE_COPIES = Patch(
    name="table-copies",
    group=Group.CONVENIENCE,
    why="Before every step vLLM copies the block tables of all KV cache groups to the card one after the other, whole "
    "rows: 2.9 us each on an H200, 22 of them for a 31B that drafts with an E4B, and at 131,072 tokens of context "
    "0.7 MB a request.",
    how="On CUDA one Triton kernel reads them in pinned memory: of a row what its request uses where own-blocks keeps "
    "the rest of it 0, and all of it elsewhere.",
    retire="A release that copies the tables of all groups at once.",
    scope="Engines with a Gemma 4 as target or drafter, on CUDA, in several KV cache groups, with pinned memory.",
    related="none found",
    edits=(
        Edit(f"{_RUNNER}.may_reinitialize_input_batch", table_copies.may_reinitialize_input_batch),
        Edit("vllm.v1.worker.block_table:MultiGroupBlockTable.commit_block_table", table_copies.commit_block_table),
    ),
    watches=(
        "vllm.v1.worker.block_table:BlockTable.commit_block_table",
        "vllm.v1.worker.block_table:BlockTable.append_row",
        "vllm.v1.worker.block_table:BlockTable.swap_row",
        "vllm.v1.worker.block_table:BlockTable.clear",
        "vllm.utils.torch_utils:get_accelerator_view_from_cpu_tensor",
        f"{_RUNNER}.synchronize_input_prep",
    ),
)

GREEDY_SAMPLING = Patch(
    name="greedy-sampling",
    group=Group.CONVENIENCE,
    why="vLLM's samplers copy all logits to float32, some twice, before they look for the largest: 17 kernels and "
    "70 us a step of one greedy request with three drafts on an H200, 290 us of sixteen.",
    how="Where every request of a step wants the largest of its logits and nothing else, one Triton kernel finds it in "
    "the logits as they are and a second says which drafts are kept. The first sampling of a start compiles them.",
    retire="A release that takes the largest logits without a copy.",
    scope="Engines with a Gemma 4 as target or drafter, on CUDA; steps whose requests are greedy, without logprobs, "
    "penalties, bad words, allowed tokens, logit bias, minimum tokens still to come, a thinking budget or logits "
    "processors of others.",
    related="none found",
    edits=(
        Edit("vllm.v1.sample.sampler:Sampler.__init__", greedy_sampling.sampler_init),
        Edit("vllm.v1.sample.sampler:Sampler.forward", greedy_sampling.sampler_forward),
        Edit("vllm.v1.sample.rejection_sampler:RejectionSampler.__init__", greedy_sampling.sampler_init),
        Edit("vllm.v1.sample.rejection_sampler:RejectionSampler.forward", greedy_sampling.rejection_forward),
    ),
    watches=(
        "vllm.v1.sample.sampler:Sampler.apply_logits_processors",
        "vllm.v1.sample.sampler:Sampler.greedy_sample",
        "vllm.v1.sample.logits_processor.builtin:LogitBiasLogitsProcessor",
        "vllm.v1.sample.logits_processor.builtin:MinTokensLogitsProcessor",
        f"{_RUNNER}._dummy_sampler_run",
        "vllm.v1.sample.rejection_sampler:RejectionSampler.apply_logits_processors",
        "vllm.v1.sample.rejection_sampler:rejection_sample",
        "vllm.v1.sample.rejection_sampler:rejection_greedy_sample_kernel",
        "vllm.v1.sample.metadata:SamplingMetadata",
    ),
)

STEP_INDICES = Patch(
    name="step-indices",
    group=Group.CONVENIENCE,
    why="Before every step with drafts vLLM copies five small tables of indices to the card and looks drafts up in two "
    "steps: 18 us of an H200 that waits for them. While no request comes or goes they are the same each time.",
    how="The last step's are kept, and given again where the numbers of drafts and tokens are the same; the drafts are "
    "looked up by one index.",
    retire="A release that keeps them on the card.",
    scope="Engines with a Gemma 4 as target or drafter that speculate.",
    related="none found",
    edits=(Edit(f"{_RUNNER}._calc_spec_decode_metadata", step_indices.calc_spec_decode_metadata),),
    watches=("vllm.v1.spec_decode.metadata:SpecDecodeMetadata", f"{_RUNNER}._prepare_inputs"),
)

COMPILED_AT_START = Patch(
    name="compiled-at-start",
    group=Group.CONVENIENCE,
    why="With async scheduling vLLM corrects the counts of computed tokens between two steps with a function of "
    "torch.compile, which no start-up path calls: it is compiled while requests wait, for one and for several requests "
    "now and in the step before. So are two kernels that prepare a draft, by the number of requests and of tokens a "
    "request. On H200s one run in several, the first in which requests came or ended in a new way, took 0.3 to 0.5 s "
    "longer.",
    how="On NVIDIA's cards one Triton kernel of one form corrects the counts, on CPUs the function that torch.compile "
    "was given; and the last step of a start launches the three kernels in every form, on tensors of its own, and that "
    "of step-slots for no request. What does not compile there stays with PyTorch or for the first requests, and the "
    "log says so.",
    retire="A release without torch.compile there that launches the two kernels when it starts.",
    scope="Engines that speculate with a Gemma 4 as target or drafter, on NVIDIA's cards and CPUs; kernels that "
    "prepare a draft for draft models, assistants and EAGLE heads. What a draft model's first pass compiles for "
    "prompts of a new length (vLLM's copy_and_expand_eagle_inputs_kernel) is not launched at start.",
    related="#41484, closed: the function without torch.compile, for #39940; 0.33.0 compiles it still",
    edits=(
        Edit(f"{_RUNNER}.may_reinitialize_input_batch", compiled_at_start.may_reinitialize_input_batch),
        Edit(
            "vllm.v1.worker.gpu_model_runner:update_num_computed_tokens_for_batch_change",
            compiled_at_start.update_num_computed_tokens,
            source="vllm.v1.spec_decode.utils:update_num_computed_tokens_for_batch_change",
        ),
        Edit(f"{_RUNNER}._dummy_sampler_run", compiled_at_start.dummy_sampler_run),
    ),
    watches=(
        f"{_RUNNER}._prepare_inputs",
        f"{_RUNNER}._copy_valid_sampled_token_count",
        f"{_PROPOSER}.prepare_next_token_ids_padded",
        f"{_PROPOSER}.prepare_inputs_padded",
        "vllm.v1.spec_decode.utils:eagle_prepare_inputs_padded_kernel",
        "vllm.v1.spec_decode.utils:eagle_prepare_next_token_padded_kernel",
    ),
)

DRAFT_GRAPH_KEY = Patch(
    name="draft-graph-key",
    group=Group.CONVENIENCE,
    why="Target and drafter share the configuration in which the target, compiled first, leaves the folder of its "
    "graphs; in it the drafter's lie under a name that all drafters have. A start with another drafter beside the same "
    "target, or with other kernels in it, runs the graph of the one before.",
    how="A drafter's folder is named by its own configuration. One that the user chose (cache_dir) is left as it is.",
    retire="A key that the drafter's configuration is part of.",
    scope="Draft models and assistants that are a Gemma 4. Heads (EAGLE) are compiled with the target's configuration, "
    "which names no drafter: clear vLLM's compile cache when they change.",
    related="#53366, open: the number of drafts is no part of the key either; #17662, closed: a head has the target's",
    edits=(Edit("vllm.compilation.backends:VllmBackend.__call__", draft_graph_key.compiled),),
    watches=("vllm.config.compilation:CompilationConfig",),
)

SOFT_CAP = Patch(
    name="soft-cap",
    group=Group.CONVENIENCE,
    why="A Gemma 4's logits are divided by a number, put through tanh and multiplied by it again: three kernels that "
    "each read and write all of them, 10 us of one request with three drafts on an H200, 60 us of sixteen.",
    how="One Triton kernel, in place, which rounds where they do.",
    retire="A release that caps logits with one kernel.",
    scope="Logits in bfloat16 on CUDA, of engines with a Gemma 4 as target or drafter.",
    related="none found",
    edits=(
        Edit("vllm.model_executor.layers.logits_processor:LogitsProcessor.__init__", soft_cap.logits_processor_init),
        Edit("vllm.model_executor.layers.logits_processor:LogitsProcessor.forward", soft_cap.forward),
    ),
    watches=("vllm.model_executor.layers.logits_processor:LogitsProcessor._get_logits",),
)

HEAD_NORMS = Patch(
    name="head-norms",
    group=Group.CONVENIENCE,
    why="Between qkv_proj and attention torch.compile makes two kernels of the norms and the rotary embedding, which "
    "concatenates what it has turned: each waits for the one before.",
    how="One Triton kernel norms and turns all heads of a token, in float32, rounded once. It is an operator that "
    "torch.compile does not look into.",
    retire="A release whose enable_qk_norm_rope_fusion finds Gemma 4's heads: norms of values, head sizes 256 and 512.",
    scope="Gemma 4, as target, draft model or assistant, in bfloat16 on NVIDIA GPUs from Hopper on.",
    related="none found",
    edits=(
        Edit("vllm.config.vllm:VllmConfig.__post_init__", head_norms.vllm_config),
        Edit("vllm.model_executor.models.gemma4:Gemma4Attention.__init__", head_norms.attention_init),
        Edit("vllm.model_executor.models.gemma4:Gemma4Attention.forward", head_norms.forward),
    ),
    watches=(
        "vllm.model_executor.layers.layernorm:RMSNorm.forward_static",
        "vllm.model_executor.layers.rotary_embedding.base:RotaryEmbedding.forward_static",
    ),
)

HEADS_INTO_CACHE = Patch(
    name="heads-into-cache",
    group=Group.CONVENIENCE,
    why="Behind the kernel that norms and turns a layer's heads another one copies its keys and values into the "
    "cache, and attention waits for it: 1 us of a layer on an H200.",
    how="The kernel of head-norms writes them there itself, the same bits, and vLLM's method, called behind it for "
    "these keys, writes nothing. In piecewise CUDA graphs, which do not know a step's slots, and for caches in fp8 the "
    "cache is written as before.",
    retire="A release that writes the cache in the kernel of its enable_qk_norm_rope_fusion.",
    scope="Layers with head-norms' kernel that have keys of their own, on TRITON_ATTN, with a cache in bfloat16.",
    related="none found",
    edits=(
        Edit(f"{_GEMMA4}Attention.__init__", heads_into_cache.attention_init),
        Edit(
            "vllm.v1.attention.backends.triton_attn:TritonAttentionImpl.do_kv_cache_update",
            heads_into_cache.do_kv_cache_update,
        ),
    ),
    watches=(
        "vllm.model_executor.layers.attention.attention:get_attention_context",
        "vllm.model_executor.layers.attention.attention:unified_kv_cache_update",
        "vllm.model_executor.layers.attention.attention:Attention.forward",
    ),
)

EXPERT_ROUTING = Patch(
    name="expert-routing",
    group=Group.CONVENIENCE,
    why="26B-A4B chooses its experts with some ten functions of PyTorch, a sort among them: about 25 us a layer on an "
    "H200, 0.8 of a decode step's 4.6 ms.",
    how="On a GPU one Triton kernel finds the largest logits, takes the softmax over them and multiplies by the "
    "experts' scales. Where it does not compile vLLM's own function stays.",
    retire="A release that chooses Gemma 4's experts with one kernel.",
    scope="Layers with experts of a Gemma 4, on a GPU.",
    related="none found",
    edits=(Edit("vllm.model_executor.models.gemma4:Gemma4MoE.__init__", expert_routing.moe_init),),
    watches=("vllm.model_executor.layers.fused_moe.router.custom_routing_router:CustomRoutingRouter._compute_routing",),
)

WHOLE_COPIES = Patch(
    name="whole-copies",
    group=Group.CONVENIENCE,
    why="A draft pass under tensor parallelism makes two all-reduces a layer. Where fused-all-reduce does not take "
    "them they cost a small drafter what the other cards save it: E4B drafted in 6.46 ms on two H200 and in 6.21 ms on "
    "one (with it: 5.2 ms on two, 6.4 as whole copies). vLLM refuses draft_tensor_parallel_size 1.",
    how="With draft_tensor_parallel_size 1 each rank builds and runs the whole draft model in a tensor-parallel group "
    "of its own, and rank 0's drafts are broadcast to all. Off by default.",
    retire="A release that drafts with draft_tensor_parallel_size 1.",
    scope="Engines with a Gemma 4 as draft model and draft_tensor_parallel_size 1.",
    related="none found",
    edits=(
        Edit(f"{_DRAFT_MODEL}._raise_if_draft_tp_mismatch", whole_copies.raise_if_draft_tp_mismatch),
        Edit(f"{_PROPOSER}.load_model", whole_copies.alone),
        Edit(f"{_PROPOSER}.dummy_run", whole_copies.alone),
        Edit(f"{_PROPOSER}.initialize_attn_backend", whole_copies.initialize_attn_backend),
        Edit(f"{_PROPOSER}.propose", whole_copies.propose),
    ),
    watches=(
        "vllm.distributed.parallel_state:patch_tensor_parallel_group",
        "vllm.config.speculative:SpeculativeConfig._verify_and_get_draft_tp",
    ),
)

FUSED_ALL_REDUCE = Patch(
    name="fused-all-reduce",
    group=Group.CONVENIENCE,
    why="Under tensor parallelism a layer has two all-reduces, each a kernel that waits for the other GPU twice, and "
    "behind it a kernel with two norms and a sum: 6.1 us of one row of 31B on two H200, 120 times a step. FlashInfer's "
    "fusion takes one of the norms and fills a residual for it: 7.8 us.",
    how="On two GPUs from Hopper on a pass of vLLM's over the compiled graph puts one kernel in the place of an "
    "all-reduce, the norm, the residual, the layer's scalar and the next norm: each GPU writes its rows into the "
    "other's memory and waits for the other's, without barriers: 3.4 us, a step of 5.05 ms for 5.61. Above 256 rows "
    "vLLM's all-reduce comes first.",
    retire="A fusion of vLLM's that takes both norms.",
    scope="Engines whose target is a Gemma 4, in bfloat16 on two GPUs from Hopper on; their Gemma 4 drafters.",
    related="none found",
    edits=(
        Edit("vllm.config.vllm:VllmConfig.__post_init__", fused_all_reduce.vllm_config),
        Edit("vllm.compilation.backends:VllmBackend.__init__", fused_all_reduce.backend),
        Edit("vllm.compilation.passes.pass_manager:PostGradPassManager.configure", fused_all_reduce.configure),
    ),
    watches=(
        "vllm.compilation.passes.fusion.matcher_utils:MatcherRMSNorm",
        "vllm.compilation.passes.vllm_inductor_pass:VllmPatternMatcherPass",
        "vllm.distributed.device_communicators.custom_all_reduce:CustomAllreduce.create_shared_buffer",
        "vllm.distributed.parallel_state:GroupCoordinator._all_reduce_out_place",
        "vllm.model_executor.models.gemma4:Gemma4DecoderLayer.forward",
    ),
)

PER_LAYER_GATHER = Patch(
    name="per-layer-gather",
    group=Group.CONVENIENCE,
    why="Under tensor parallelism an E4B's per_layer_model_projection ends in an all-gather, which on GPUs is NCCL's: "
    "10 to 47 us a pass on two H200, and as the one call of NCCL in a draft's CUDA graph it makes a replay take the "
    "host 0.46 ms instead of 0.01.",
    how="Each rank puts zeros in the others' columns, and vLLM's custom all-reduce adds them, with the bits of the "
    "all-gather. What that all-reduce does not take (more than 8 MB, 390 rows of E4B; or it is off) is gathered as "
    "before.",
    retire="A release that gathers by its custom all-reduce, or that has this layer whole on each rank.",
    scope="Engines with a Gemma 4 that has per-layer inputs as target or drafter, on several NVIDIA GPUs; not with "
    "LoRA or --disable-custom-all-reduce.",
    related="none found",
    edits=(
        Edit("vllm.config.vllm:VllmConfig.__post_init__", per_layer_gather.vllm_config),
        Edit(f"{_GEMMA4}ForCausalLM.__init__", per_layer_gather.model_init),
    ),
    watches=(
        f"{_GEMMA4}Model.__init__",
        f"{_GEMMA4}SelfDecoderLayers.project_per_layer_inputs",
        "vllm.model_executor.layers.linear:ColumnParallelLinear.forward",
        "vllm.distributed.device_communicators.custom_all_reduce:CustomAllreduce.should_custom_ar",
        "vllm.distributed.device_communicators.custom_all_reduce:CustomAllreduce.custom_all_reduce",
        "vllm.distributed.parallel_state:GroupCoordinator._all_gather_out_place",
    ),
)

PATCHES: tuple[Patch, ...] = (
    DRAFT_ARGMAX,
    WHOLE_COPIES,  # around draft-argmax's load_model, and inside draft-graphs' propose
    DRAFT_GRAPHS,
    DRAFT_PIECES,
    ADAPTIVE_K,
    ASYNC_DRAFTS,
    LOCAL_ARGMAX,
    DRAFT_COMPILE,
    DRAFT_GRAPH_KEY,
    TARGET_COMPILE,
    FUSED_ALL_REDUCE,
    PER_LAYER_GATHER,
    SPLIT_ATTENTION,
    CACHE_WRITE,
    FIRST_PASS_SLOTS,
    LAST_TOKENS,
    STEP_SLOTS,
    TABLE_COPIES,
    GREEDY_SAMPLING,
    STEP_INDICES,
    COMPILED_AT_START,
    SOFT_CAP,
    HEAD_NORMS,
    HEADS_INTO_CACHE,  # around head-norms' __init__ and cache-write's do_kv_cache_update
    EXPERT_ROUTING,
)
