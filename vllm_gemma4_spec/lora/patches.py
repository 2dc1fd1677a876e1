"""Patches for LoRA adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_gemma4_spec.patching.patch import Edit, Group, Lazy, Patch

if TYPE_CHECKING:
    from vllm_gemma4_spec.lora import adapters, aliases, multimodal
else:  # a wrapper's module is imported only after the module of vLLM that it patches
    adapters = Lazy("vllm_gemma4_spec.lora.adapters")
    aliases = Lazy("vllm_gemma4_spec.lora.aliases")
    multimodal = Lazy("vllm_gemma4_spec.lora.multimodal")

_MANAGER = "vllm.lora.model_manager:LoRAModelManager"

LORA_ALIASES = Patch(
    name="lora-aliases",
    group=Group.CORRECTNESS,
    why="Gemma4Model registers each layer under two names. vLLM loads a LoRA adapter under the first and clears it "
    "under the second, for which the adapter has no weights. Requests with an adapter get the base model's answer.",
    how="A layer that is registered already is not registered under a second name.",
    retire="A release whose LoRA manager passes over aliases, or whose Gemma4Model has none.",
    scope="Adapters of Gemma 4.",
    related="none found",
    edits=(Edit(f"{_MANAGER}.register_module", aliases.register_module),),
    watches=(
        f"{_MANAGER}.activate_adapter",
        f"{_MANAGER}._create_lora_modules",
        "vllm.model_executor.models.gemma4:Gemma4Model.__init__",
    ),
)

_MULTIMODAL = "vllm.model_executor.models.gemma4_mm:Gemma4ForConditionalGeneration"

LORA_ADAPTERS = Patch(
    name="lora-adapters",
    group=Group.CORRECTNESS,
    why="Gemma4ForConditionalGeneration, the class of every published checkpoint, refuses LoRA. Adapters of k_proj "
    "leave the values alone where V is K, so answers are wrong; tensors for a tower or another base are left out in "
    "silence.",
    how="The class says that it takes adapters; k_proj's are applied to V where V is K; a tensor that fits no layer of "
    "the language model is named.",
    retire="A release whose Gemma4ForConditionalGeneration has SupportsLoRA and whose K = V layers adapt both.",
    scope="The model Gemma 4.",
    related="none found",
    edits=(
        Edit(f"{_MULTIMODAL}.supports_lora", multimodal.supported, adds=True),
        Edit(f"{_MULTIMODAL}.embedding_modules", multimodal.no_embeddings, adds=True),
        Edit(f"{_MULTIMODAL}.lora_skip_prefixes", multimodal.no_prefixes, adds=True),
        Edit(f"{_MULTIMODAL}.is_3d_moe_weight", multimodal.gated, adds=True),
        Edit(f"{_MULTIMODAL}.is_non_gated_moe", multimodal.gated, adds=True),
        Edit("vllm.lora.worker_manager:WorkerLoRAManager._load_adapter", adapters.load_adapter),
    ),
    watches=(
        "vllm.model_executor.models.interfaces:SupportsLoRA",
        f"{_MULTIMODAL}.get_mm_mapping",
        "vllm.lora.lora_model:LoRAModel.from_local_checkpoint",
        "vllm.lora.utils:parse_fine_tuned_lora_name",
    ),
)

PATCHES: tuple[Patch, ...] = (LORA_ALIASES, LORA_ADAPTERS)
