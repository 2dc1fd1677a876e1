"""Patches for LoRA adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_gemma4_spec.patching.patch import Edit, Group, Lazy, Patch

if TYPE_CHECKING:
    from vllm_gemma4_spec.lora import aliases
else:  # a wrapper's module is imported only after the module of vLLM that it patches
    aliases = Lazy("vllm_gemma4_spec.lora.aliases")

_MANAGER = "vllm.lora.model_manager:LoRAModelManager"

LORA_ALIASES = Patch(
    name="lora-aliases",
    group=Group.CORRECTNESS,
    why="Gemma4Model holds its layers under two names. A LoRA adapter is set under the one and cleared again under "
    "the other, for which it has no weights: requests with an adapter are answered as without, with and without "
    "speculation.",
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

PATCHES: tuple[Patch, ...] = (LORA_ALIASES,)
