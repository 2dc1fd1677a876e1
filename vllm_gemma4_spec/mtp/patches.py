"""Patches for Gemma 4's MTP assistants; without an assistant in the speculative config they change nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_gemma4_spec.patching.patch import Edit, Group, Lazy, Patch

if TYPE_CHECKING:
    from vllm_gemma4_spec.mtp import config, proposer, scheduling, validation
else:  # a wrapper's module is imported only after the module of vLLM that it patches
    config = Lazy("vllm_gemma4_spec.mtp.config")
    proposer = Lazy("vllm_gemma4_spec.mtp.proposer")
    scheduling = Lazy("vllm_gemma4_spec.mtp.scheduling")
    validation = Lazy("vllm_gemma4_spec.mtp.validation")

_PROPOSER = "vllm.v1.spec_decode.eagle:SpecDecodeBaseProposer"
_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_SPECULATIVE = "vllm.config.speculative"

MTP_ASSISTANT = Patch(
    name="mtp-assistant",
    group=Group.CONVENIENCE,
    why="vLLM 0.19.1 has neither the configuration nor the network of Gemma 4's assistants, and would run a drafter "
    "with hidden states over the whole prompt, with KV of its own.",
    how="Registers the configuration where transformers lacks it and the model class; the method is mtp, given or not. "
    "The runner's EagleProposer becomes one that drafts from each request's last accepted token in k identical passes "
    "over the KV of the target's last sliding and last full layer, and writes nothing. In bfloat16 its linear layers "
    "take a kernel for up to 16 rows where it is faster than cuBLAS (with draft-products), its queries one for norm "
    "and rotary embedding (with head-norms).",
    retire="vLLM #41745, in 0.21.0, once it drafts from the last accepted token alone, stores no KV for prefix caching "
    "to distrust (use_eagle) and takes the donor layers' scales of an fp8 cache (#49262).",
    scope="Engines whose drafter is a Gemma 4 assistant; for others vLLM's tables have entries that nothing asks for.",
    related="#41745 (assistants, in 0.21.0), #43982 and #43909 (in 0.23.0), #45258 and #49262 (open)",
    edits=(
        Edit("vllm.transformers_utils.config:_CONFIG_REGISTRY", config.config_registry),
        Edit(f"{_SPECULATIVE}:MTPModelTypes", config.mtp_model_types),
        Edit(f"{_SPECULATIVE}:SpeculativeConfig.hf_config_override", config.hf_config_override),
        Edit(
            "vllm.config.model:MODEL_ARCH_CONFIG_CONVERTORS",
            config.convertors,
            source="vllm.transformers_utils.model_arch_config_convertor:MODEL_ARCH_CONFIG_CONVERTORS",
        ),
        Edit("vllm.model_executor.models.registry:ModelRegistry", config.registry),
        Edit(
            "vllm.v1.worker.gpu_model_runner:EagleProposer",
            proposer.runner_proposer,
            source="vllm.v1.spec_decode.eagle:EagleProposer",
        ),
    ),
    watches=(
        f"{_SPECULATIVE}:SpeculativeConfig.__post_init__",
        f"{_SPECULATIVE}:SpeculativeConfig.use_eagle",
        f"{_PROPOSER}.__init__",
        f"{_PROPOSER}.prepare_inputs_padded",
        f"{_PROPOSER}._greedy_sample",
        f"{_PROPOSER}._create_draft_vllm_config",
        f"{_RUNNER}.__init__",
        f"{_RUNNER}.propose_draft_token_ids",
        f"{_RUNNER}.get_kv_cache_spec",
        "vllm.model_executor.layers.attention.attention:Attention.__init__",
        "vllm.model_executor.layers.attention.attention:Attention.forward",
        "vllm.v1.attention.backends.triton_attn:TritonAttentionImpl.forward",
        "vllm.v1.attention.backends.triton_attn:TritonAttentionMetadataBuilder",
        "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.forward",
        "vllm.model_executor.models.gemma4:Gemma4MLP",
        "vllm.model_executor.models.gemma4:Gemma4SelfDecoderLayers.embed_input_ids",
    ),
)

MTP_SCHEDULING = Patch(
    name="mtp-scheduling",
    group=Group.CONVENIENCE,
    why="For every drafter with hidden states the scheduler keeps k slots for its KV and drops the last block of a "
    "prefix hit, which the patch prefix-hits fixes, too; near the maximum length the runner drafts for none.",
    how="With an assistant, which stores nothing, prefix hits are those of plain decoding, no slot is kept beyond the "
    "verification's, and drafting goes on up to the maximum length.",
    retire="A release that asks a drafter whether it stores KV.",
    scope="Engines whose drafter is a Gemma 4 assistant.",
    related="#40624 (prefix hits of hybrid models with a drafter); since 0.30.0 disable_eagle_block_drop",
    edits=(
        Edit("vllm.v1.core.sched.scheduler:Scheduler.__init__", scheduling.scheduler_init),
        Edit(f"{_RUNNER}.sample_tokens", scheduling.sample_tokens),
    ),
    watches=(
        "vllm.v1.core.sched.scheduler:Scheduler.schedule",
        "vllm.v1.core.kv_cache_manager:KVCacheManager.__init__",
        "vllm.v1.core.kv_cache_coordinator:HybridKVCacheCoordinator.find_longest_cache_hit",
        "vllm.v1.core.kv_cache_coordinator:UnitaryKVCacheCoordinator.find_longest_cache_hit",
    ),
    needs=("mtp-assistant",),
)

MTP_CHECKS = Patch(
    name="mtp-checks",
    group=Group.CONVENIENCE,
    why="An assistant of another target, a file without one of its tensors or an option that it cannot serve under "
    "ends in a traceback after the target has been loaded, or drafts nonsense.",
    how="create_speculative_config compares the assistant's configuration and the headers of its files with the target "
    "before anything is loaded, and ends with one line.",
    retire="One-line errors upstream; the checks are of use with any release.",
    scope="Engines whose drafter is a Gemma 4 assistant.",
    related="none found",
    edits=(Edit("vllm.engine.arg_utils:EngineArgs.create_speculative_config", validation.create_speculative_config),),
    needs=("mtp-assistant",),
)

PATCHES: tuple[Patch, ...] = (MTP_ASSISTANT, MTP_SCHEDULING, MTP_CHECKS)
