"""Patches for the start of an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_gemma4_spec.patching.patch import Edit, Group, Lazy, Patch

if TYPE_CHECKING:
    from vllm_gemma4_spec.startup import transformers_version
else:  # a wrapper's module is imported only after the module of vLLM that it patches
    transformers_version = Lazy("vllm_gemma4_spec.startup.transformers_version")

_CONVERTOR = "vllm.transformers_utils.model_arch_config_convertor:Gemma4ModelArchConfigConvertor"

TRANSFORMERS_VERSION = Patch(
    name="transformers-version",
    group=Group.CONVENIENCE,
    why="vLLM 0.19.1 takes any transformers from 5.5.1 on, and from 5.15 on head_dim of a Gemma 4 config raises: the "
    "start ends in a traceback that names neither.",
    how="A start with a Gemma 4 and another release ends with the line that doctor prints.",
    retire="A vLLM that reads per-layer configs (#49797) or bounds transformers.",
    scope="Configs of a Gemma 4.",
    related="#51744, fixed by #49797",
    edits=(Edit(f"{_CONVERTOR}.get_head_size", transformers_version.get_head_size),),
)

PATCHES: tuple[Patch, ...] = (TRANSFORMERS_VERSION,)
