from __future__ import annotations

from vllm_gemma4_spec.patching.patch import Patch

PATCHES: tuple[Patch, ...] = ()
