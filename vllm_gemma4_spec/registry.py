"""Every patch, declared as data: one module per topic. Nothing here imports vLLM.

To add one: declare it in a topic module, run ``make fingerprints ledger``, add its tests.
"""

from __future__ import annotations

from vllm_gemma4_spec.patches import chat, cpu, drafting, graphs, lora, modelopt, multimodal, server
from vllm_gemma4_spec.patching.patch import Patch

PATCHES: tuple[Patch, ...] = (
    *drafting.PATCHES,
    *multimodal.PATCHES,
    *lora.PATCHES,
    *graphs.PATCHES,
    *cpu.PATCHES,
    *modelopt.PATCHES,
    *chat.PATCHES,
    *server.PATCHES,
)
