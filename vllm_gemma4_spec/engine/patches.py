"""Patches that stand before an engine or a worker is made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_gemma4_spec.patching.failure import gate
from vllm_gemma4_spec.patching.patch import Edit, Group, Lazy, Patch

if TYPE_CHECKING:
    from vllm_gemma4_spec.engine import checks
else:  # a wrapper's module is imported only after the module of vLLM that it patches
    checks = Lazy("vllm_gemma4_spec.engine.checks")

PATCH_FAILURES = Patch(
    name="patch-failures",
    group=Group.CORRECTNESS,
    why="vLLM imports some modules inside try, so the error of a patch that does not fit may be logged and forgotten, "
    "and the process would answer without the patch.",
    how="Once a correctness patch has failed, a config, an engine core or a worker is not made any more: the process "
    "ends with the first failure's line.",
    retire="None: the other patches need it.",
    scope="Every process in which a correctness patch has failed; a call straight through in any other.",
    related="none found",
    edits=(
        Edit("vllm.engine.arg_utils:EngineArgs.create_engine_config", gate),
        Edit("vllm.v1.engine.core:EngineCore.__init__", gate),
        Edit("vllm.v1.worker.worker_base:WorkerWrapperBase.init_device", gate),
        Edit("vllm.v1.worker.worker_base:WorkerWrapperBase.initialize_from_config", gate),
    ),
)

ENGINE_CHECKS = Patch(
    name="engine-checks",
    group=Group.CORRECTNESS,
    why="VLLM_USE_V2_MODEL_RUNNER=1 goes past every patch of the model runner while their state says on; on a CPU, "
    "head sizes over 256 (Gemma 4's full layers have 512) end the engine at its first request.",
    how="create_engine_config looks at the finished config and ends with one line.",
    retire="A release whose V2 runner is right for Gemma 4, and whose CPU attention takes a head size of 512.",
    scope="Engines with a Gemma 4 as target or drafter.",
    related="none found",
    edits=(Edit("vllm.engine.arg_utils:EngineArgs.create_engine_config", checks.create_engine_config),),
    watches=("vllm.v1.attention.backends.cpu_attn:CPUAttentionBackend.get_supported_head_sizes",),
)

PATCHES: tuple[Patch, ...] = (PATCH_FAILURES, ENGINE_CHECKS)
