"""Patches for the model config."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_gemma4_spec.patching.patch import Edit, Group, Lazy, Patch

if TYPE_CHECKING:
    from vllm_gemma4_spec.hf_config import parser
else:  # a wrapper's module is imported only after the module of vLLM that it patches
    parser = Lazy("vllm_gemma4_spec.hf_config.parser")

CONFIG_FORM = Patch(
    name="config-form",
    group=Group.CORRECTNESS,
    why="transformers 5.15 and later saves the sizes of full-attention layers under per_layer_config, and from 5.17 a "
    "vision tower's rotary embedding as `axial`: 0.19.1 builds such a model, as every llm-compressor 0.14 export is, "
    "with default sizes, or stops with a traceback. A GGUF file of a Gemma 4 ends in a traceback of transformers.",
    how="A config of Gemma 4 is brought into the form that transformers 5.5 writes; two forms that differ, or a size "
    "that would be guessed, are refused in one line, and so is a GGUF file.",
    retire="vLLM 0.28.0, which reads both forms.",
    scope="Configs of a Gemma 4: targets, drafters and assistants.",
    related="#51744, fixed by #49797",
    edits=(
        Edit("vllm.transformers_utils.config:HFConfigParser.parse", parser.parse),
        Edit(
            "vllm.engine.arg_utils:maybe_override_with_speculators",
            parser.speculators,
            source="vllm.transformers_utils.config:maybe_override_with_speculators",
        ),
    ),
    watches=("vllm.transformers_utils.config:get_config",),
)

PATCHES: tuple[Patch, ...] = (CONFIG_FORM,)
