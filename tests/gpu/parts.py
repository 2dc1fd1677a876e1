"""The parts of the GPU tests: what each needs, and which environment it must start with. Nothing here imports vLLM."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
REHEARSAL = os.environ.get("GEMMA4_GPU_REHEARSAL") == "1"
# Read when Triton, torch or vLLM is imported or an engine starts, so a part's process has them from the beginning.
_ALWAYS = {
    "TRITON_F32_DEFAULT": "ieee",  # tf32 would round differently in passes of different shape
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",  # a part has used CUDA before it starts ranks
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # collective_rpc of functions
    "VLLM_GEMMA4_SPEC_CHECK": "0",  # with it on no draft is captured
    "VLLM_USE_FLASHINFER_MOE_FP4": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}
# NVLink multicast and symmetric memory are not what is tested, and not every host allows them.
_RANKS = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_USE_NCCL_SYMM_MEM": "0",
}


@dataclass(frozen=True)
class Part:
    """One test file.

    Attributes:
        cards: how many it needs; those that need one run in ``make test-gpu``, the others in ``make test-gpus``.
        seconds: about how long it takes; the longest start first.
    """

    name: str
    seconds: int
    cards: int = 1
    own: dict[str, str] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        return HERE / f"test_{self.name}.py"

    @property
    def env(self) -> dict[str, str]:
        return _ALWAYS | (_RANKS if self.cards > 1 else {}) | self.own


_ALL = (
    Part("exactness", 240),
    Part("compiled", 300, own={"TORCHINDUCTOR_DETERMINISTIC": "1"}),
    # A last-bit difference between two batch shapes can round a key to the next fp8 value; see the file.
    Part("fp8_cache", 240, own={"VLLM_BATCH_INVARIANT": "1"}),
    Part("images", 200),
    Part("mtp", 300),
    Part("nvfp4_layers", 200),
    Part("kernels", 90),
    Part("late_compilations", 150),
    Part("checkpoints", 240),
    Part("reload", 120),
    Part("structured_output", 150),
    Part("long_prompts", 200),
    Part("second_start", 200),
    Part("tensor_parallel", 300, cards=2),
    Part("all_reduce", 200, cards=2),
    Part("heads_and_experts", 300, cards=2),
    Part("nvfp4_ranks", 250, cards=2),
    Part("data_parallel", 250, cards=2),
    Part("ray_executor", 150, cards=2),
)
PARTS = {part.name: part for part in _ALL}
