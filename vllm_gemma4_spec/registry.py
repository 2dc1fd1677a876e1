"""Every patch, in the order it is applied, and what applies them in this process. Nothing here imports vLLM.

To add a patch: declare it in its topic's ``patches.py``, run ``make fingerprints ledger``, add its tests.
"""

from __future__ import annotations

from vllm_gemma4_spec.chat import patches as chat
from vllm_gemma4_spec.cpu import patches as cpu
from vllm_gemma4_spec.engine import patches as engine
from vllm_gemma4_spec.hf_config import patches as hf_config
from vllm_gemma4_spec.lora import patches as lora
from vllm_gemma4_spec.metrics import patches as metrics
from vllm_gemma4_spec.mtp import patches as mtp
from vllm_gemma4_spec.multimodal import patches as multimodal
from vllm_gemma4_spec.patching.engine import Patcher
from vllm_gemma4_spec.patching.patch import Patch
from vllm_gemma4_spec.performance import patches as performance
from vllm_gemma4_spec.quantization import patches as quantization
from vllm_gemma4_spec.requests import patches as requests
from vllm_gemma4_spec.scheduling import patches as scheduling
from vllm_gemma4_spec.spec_decode import patches as spec_decode
from vllm_gemma4_spec.startup import patches as startup

PATCHES: tuple[Patch, ...] = (
    *startup.PATCHES,
    *engine.PATCHES,
    *hf_config.PATCHES,
    *spec_decode.PATCHES,
    *scheduling.PATCHES,
    *multimodal.PATCHES,
    *mtp.PATCHES,
    *lora.PATCHES,
    *performance.PATCHES,
    *cpu.PATCHES,
    *quantization.PATCHES,
    *requests.PATCHES,
    *chat.PATCHES,
    *metrics.PATCHES,
)

PATCHER = Patcher(PATCHES)
