"""Patches that let the CPU engine speculate; none of them changes anything on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_gemma4_spec.patching.patch import Edit, Group, Lazy, Patch

if TYPE_CHECKING:
    from vllm_gemma4_spec.cpu import draft_kernels as draft
    from vllm_gemma4_spec.cpu import launch, runner
    from vllm_gemma4_spec.cpu import rejection_kernels as rejection
    from vllm_gemma4_spec.cpu.launch import CpuKernel
else:  # a wrapper's module is imported only after the module of vLLM that it patches
    draft = Lazy("vllm_gemma4_spec.cpu.draft_kernels")
    rejection = Lazy("vllm_gemma4_spec.cpu.rejection_kernels")
    launch = Lazy("vllm_gemma4_spec.cpu.launch")
    runner = Lazy("vllm_gemma4_spec.cpu.runner")

CPU_RUNNER = Patch(
    name="cpu-runner",
    group=Group.CORRECTNESS,
    why="CPUModelRunner asserts that there is no speculation, loads no drafter and copies through CUDA streams. A "
    "seed in a prompt that is computed in chunks ends the engine: a CPU generator has no offset to set back.",
    how="The CPU worker instantiates a subclass that passes over the assertion, loads the drafter and copies "
    "plainly, and that puts generators back by their state. Without speculation it does the latter alone.",
    retire="A release whose CPU model runner speculates.",
    scope="The CPU platform: Gemma 4, and every engine that speculates, which 0.19.1 cannot do there.",
    related="none found by number; 0.20.0 drafts on a CPU",
    edits=(
        Edit(
            "vllm.v1.worker.cpu_worker:CPUModelRunner",
            runner.runner_class,
            source="vllm.v1.worker.cpu_model_runner:CPUModelRunner",
        ),
    ),
    watches=(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._sample",
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._bookkeeping_sync",
    ),
    needs=("cpu-kernels",),
)


_UTILS = "vllm.v1.spec_decode.utils"
_EAGLE = "vllm.v1.spec_decode.eagle"
_SAMPLER = "vllm.v1.sample.rejection_sampler"


def _kernel(user: str, name: str, form: CpuKernel, source: str) -> Edit:
    """``user``'s name for the kernel ``name`` of ``source``, which becomes ``form`` on a CPU."""
    return Edit(f"{user}:{name}", form.on_cpu, source=None if user == source else f"{source}:{name}")


CPU_KERNELS = Patch(
    name="cpu-kernels",
    group=Group.CORRECTNESS,
    why="Drafting and rejection sampling launch Triton kernels. On a machine without a GPU driver vLLM's triton is a "
    "placeholder, whose kernels cannot be launched and which lacks next_power_of_2; with a driver they would be "
    "launched on CPU tensors, as would the top-k/top-p kernel for 8 or more draft tokens.",
    how="On the CPU platform each kernel name refers to a vectorised PyTorch form with the same launch interface, and "
    "the top-k/top-p sampler takes vLLM's own PyTorch path. On other platforms every name keeps its kernel.",
    retire="CPU forms of these kernels in vllm.utils.cpu_triton_utils, as 0.19.1 has for compute_slot_mapping.",
    scope="The CPU platform, where 0.19.1 cannot launch these kernels for any model.",
    related="none found by number; 0.20.0 drafts on a CPU",
    edits=(
        _kernel(_UTILS, "eagle_step_slot_mapping_metadata_kernel", draft.eagle_step_slot_mapping_metadata, _UTILS),
        _kernel(_EAGLE, "eagle_prepare_inputs_padded_kernel", draft.eagle_prepare_inputs_padded, _UTILS),
        _kernel(_EAGLE, "eagle_prepare_next_token_padded_kernel", draft.eagle_prepare_next_token_padded, _UTILS),
        _kernel(_EAGLE, "copy_and_expand_eagle_inputs_kernel", draft.copy_and_expand_eagle_inputs, _UTILS),
        _kernel(_SAMPLER, "rejection_greedy_sample_kernel", rejection.rejection_greedy_sample, _SAMPLER),
        _kernel(_SAMPLER, "rejection_random_sample_kernel", rejection.rejection_random_sample, _SAMPLER),
        _kernel(_SAMPLER, "expand_kernel", rejection.expand, _SAMPLER),
        _kernel(_SAMPLER, "sample_recovered_tokens_kernel", rejection.sample_recovered_tokens, _SAMPLER),
        Edit(
            "vllm.v1.sample.ops.topk_topp_sampler:HAS_TRITON",
            launch.without_triton,
            source="vllm.triton_utils.importing:HAS_TRITON",
        ),
        # The placeholder stands in for triton where there is no driver; a machine with one never uses it.
        Edit(
            "vllm.triton_utils.importing:TritonPlaceholder.next_power_of_2",
            launch.next_power_of_2,
            adds=True,
        ),
    ),
    watches=(
        "vllm.triton_utils.importing:TritonPlaceholder",
        "vllm.v1.sample.ops.topk_topp_sampler:apply_top_k_top_p",
        # The launches: argument order, grids, buffer sizes and dtypes.
        "vllm.v1.spec_decode.utils:eagle_step_update_slot_mapping_and_metadata",
        "vllm.v1.spec_decode.eagle:SpecDecodeBaseProposer.set_inputs_first_pass",
        "vllm.v1.spec_decode.eagle:SpecDecodeBaseProposer.prepare_next_token_ids_padded",
        "vllm.v1.spec_decode.eagle:SpecDecodeBaseProposer.prepare_inputs_padded",
        "vllm.v1.sample.rejection_sampler:rejection_sample",
        "vllm.v1.sample.rejection_sampler:expand_batch_to_tokens",
        "vllm.v1.sample.rejection_sampler:sample_recovered_tokens",
    ),
)

PATCHES: tuple[Patch, ...] = (CPU_RUNNER, CPU_KERNELS)
