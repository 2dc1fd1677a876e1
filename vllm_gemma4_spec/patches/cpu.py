"""Patches that let the CPU engine speculate; none of them changes anything on a GPU."""

from __future__ import annotations

from vllm_gemma4_spec.patching.patch import Edit, Group, Patch

CPU_RUNNER = Patch(
    name="cpu-runner",
    group=Group.CORRECTNESS,
    why="CPUModelRunner asserts that there is no speculation, loads no drafter and copies through CUDA streams.",
    how="The CPU worker instantiates a subclass that passes over the assertion, loads the drafter and copies "
    "plainly. Without speculation the subclass does what its parent does.",
    retire="A release whose CPU model runner speculates.",
    edits=(
        Edit(
            "vllm.v1.worker.cpu_worker:CPUModelRunner",
            "vllm_gemma4_spec.cpu.runner:runner_class",
            source="vllm.v1.worker.cpu_model_runner:CPUModelRunner",
        ),
    ),
)

PATCHES: tuple[Patch, ...] = (CPU_RUNNER,)
