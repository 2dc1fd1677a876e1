"""What vLLM 0.19.1 does with a checkpoint, alone and with the plugin, on each kind of machine.

Told from the same description of layers that loading checks (:mod:`~vllm_gemma4_spec.checkpoints.layers`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_gemma4_spec.checkpoints import layers
from vllm_gemma4_spec.checkpoints.files import Checkpoint

# Why a checkpoint is refused at load; `inspect` says the same.
NO_TOWER = (
    "config.json has a vision tower and no shard holds it; serve the language model alone with "
    '--hf-overrides \'{"architectures": ["Gemma4ForCausalLM"]}\''
)
INTEGER_EXPERTS = (
    "experts in packed integers; vLLM 0.19.1 has no kernel for them on a CPU: serve it on a GPU, or take NVFP4 or bf16"
)
INTEGER_LINEARS = (
    "linears in packed integers; vLLM 0.19.1's kernel for them (cpu_gemm_wna16) is in its builds for CPUs with AVX-512 "
    "alone: serve it on such a CPU or a GPU, or take NVFP4 or bf16"
)

CPU, HOPPER, BLACKWELL = "CPU", "GPU without FP4 (Ada, Hopper)", "GPU with FP4 (Blackwell)"


def _experts_without_scales(checkpoint: Checkpoint) -> tuple[int, int]:
    """Experts' projections without ``input_scale`` that their algorithm wants, and all of these."""
    modules = [m for m in checkpoint.quantized.values() if m.is_nvfp4 and m.is_expert]
    wanting = [m for m in modules if m.algorithm not in layers.WEIGHT_ONLY]
    return sum("input_scale" not in m.parts for m in wanting), len(wanting)


def _float_experts(checkpoint: Checkpoint) -> bool:
    return any(name.endswith("experts.gate_up_proj") for name in checkpoint.tensors)


def _lone_queries(checkpoint: Checkpoint) -> bool:
    """Layers with q_proj and no k_proj: they reuse another layer's KV."""
    modules = checkpoint.quantized
    return any(m.endswith(".q_proj") and m[:-6] + "k_proj" not in modules for m in modules)


def _renamed(checkpoint: Checkpoint) -> bool:
    """Experts under names that 0.19.1's own loader does not map."""
    return any(".moe.experts." in name or layers.stacked_experts(name) for name in checkpoint.tensors)


def _nvfp4(checkpoint: Checkpoint) -> bool:
    return any(m.is_nvfp4 for m in checkpoint.quantized.values())


def _compressed(checkpoint: Checkpoint) -> bool:
    """NVFP4 in compressed-tensors' form; its INT4 has 32-bit words."""
    return any(n.endswith(".weight_packed") and i.dtype == "U8" for n, i in checkpoint.tensors.items())


def fp8_without_kernel(section: dict[str, Any], method: str | None) -> str | None:
    """The name of an 8-bit float format that 0.19.1 cannot multiply with on a CPU and the plugin does not emulate."""
    algorithm = layers.algorithm(section)
    if method == "modelopt" and algorithm not in ("", "FP8", layers.MIXED, *layers.NVFP4):
        return algorithm
    groups = section.get("config_groups")
    if method != "compressed-tensors" or not isinstance(groups, dict):
        return None
    weights = [g.get("weights") or {} for g in groups.values() if isinstance(g, dict)]
    return "FP8" if any(w.get("type") == "float" and w.get("num_bits") == 8 for w in weights) else None


def in_integers(section: Mapping[str, Any]) -> bool:
    """Whether a quantization config says that linears are packed integers: AWQ, GPTQ, compressed-tensors' W4A16."""
    method = str(section.get("quant_method") or "").lower()
    if method != "compressed-tensors":
        return method in ("awq", "gptq")
    groups = section.get("config_groups")
    groups = groups.values() if isinstance(groups, Mapping) else ()
    kinds = {(g.get("weights") or {}).get("type") for g in groups if isinstance(g, Mapping)}
    return section.get("format") == "pack-quantized" and "int" in kinds


def vllm_alone(checkpoint: Checkpoint, method: str | None, nan: bool) -> str:
    """What vLLM 0.19.1 does with it, first failure first."""
    algorithm = layers.algorithm(checkpoint.quantization)
    if _renamed(checkpoint):
        return "fails while loading: it does not know the names of the experts"
    if checkpoint.config.get("model_type") == "gemma4_assistant":
        return "refuses it: Gemma 4's MTP assistants came with 0.21.0"
    if method is None:
        return "loads it unquantized"
    if _compressed(checkpoint):
        return "loads it; refuses it on a CPU"
    if algorithm in layers.NVFP4 and algorithm != "NVFP4":
        return f"refuses it: quant_algo {algorithm} is unknown"
    if algorithm == layers.MIXED:
        return "loads NVFP4 layers without repairing them and no experts; refuses it on a CPU"
    if not _nvfp4(checkpoint):
        return f"loads it as {method}, if it knows the format"
    if _float_experts(checkpoint):
        return "fails while loading: it takes the bf16 experts for NVFP4, since they are not listed as excluded"
    if nan:
        return "loads it and answers from NaN weights"
    if _lone_queries(checkpoint):
        return "loads it; uninitialised scales of layers without k_proj may spoil q_proj; refuses it on a CPU"
    return "loads it; refuses it on a CPU"


def with_overlay(checkpoint: Checkpoint, method: str | None, destroyed: int, intact: int) -> str:
    """What the plugin changes; ``destroyed`` and ``intact`` count NaN blocks by their codes."""
    if checkpoint.config.get("model_type") == "gemma4_assistant":
        return 'drafts with it for its own target: --speculative-config \'{"model": …, "num_speculative_tokens": 4}\''
    if layers.missing_tower(checkpoint.config, checkpoint.tensors):
        return f"refuses it: {NO_TOWER}"
    if _compressed(checkpoint):
        return "loads it on any backend"
    if not checkpoint.quantized:
        return "loads it" if _renamed(checkpoint) else "as vLLM alone"
    extras = [
        f"{what} in {count} layers"
        for what, part in (("pre_quant_scale", "pre_quant_scale"), ("low-rank branch", "svdquant_lora_a"))
        if (count := sum(part in m.parts for m in checkpoint.quantized.values()))
    ]
    if destroyed or intact:
        extras.append(f"{destroyed} blocks zeroed and {intact} saturated at load; `repair --parent` restores them")
    missing, _ = _experts_without_scales(checkpoint)
    if missing:
        extras.append(f"{missing} experts' projections were never calibrated")
    return "loads it on any backend" + (": " + "; ".join(extras) if extras else "")


def machines(checkpoint: Checkpoint, method: str | None) -> dict[str, str]:
    """Kind of machine -> what happens there with the plugin."""
    section, modules = checkpoint.quantization, checkpoint.quantized.values()
    if method is None:
        return dict.fromkeys((CPU, HOPPER, BLACKWELL), "unquantized")
    only = any(m.algorithm in layers.WEIGHT_ONLY for m in modules)
    eight = any(m.algorithm == "FP8" for m in modules)
    missing, wanting = _experts_without_scales(checkpoint)
    refused = fp8_without_kernel(section, method)
    if refused is None and layers.packed_integers(checkpoint.tensors.values(), experts=True):
        refused = "experts in packed integers"
    ours = _nvfp4(checkpoint) or _compressed(checkpoint)
    if refused:
        cpu = f"refused: no kernel for {refused}"
    elif ours or eight:
        cpu = "emulated: weights dequantized, activations as they are"
    elif layers.packed_integers(checkpoint.tensors.values()):
        cpu = "vLLM's own kernel where the CPU has AVX-512; refused elsewhere: no kernel for linears in packed integers"
    else:
        cpu = "vLLM's own kernels, if it has one for the format"
    if not refused and (section.get("kv_cache_quant_algo") or section.get("kv_cache_scheme")):
        cpu += "; KV cache in the model's dtype, since an fp8 cache needs a GPU"
    if not ours:
        there = "vLLM's own kernels for the format"
        return {CPU: cpu, HOPPER: there, BLACKWELL: there}
    hopper = "Marlin: 4-bit weights, activations as they are" + ("; FP8 layers by FP8 kernels" if eight else "")
    if only:
        blackwell = hopper
    elif missing and missing == wanting:
        blackwell = "experts refused, none has an input_scale: serve with VLLM_USE_FLASHINFER_MOE_FP4=0 (Marlin)"
    else:
        blackwell = "FP4 kernels: 4-bit weights and activations" + ("; FP8 layers by FP8 kernels" if eight else "")
        blackwell += "; experts without input_scale take the largest of the others" if missing else ""
    return {CPU: cpu, HOPPER: hopper, BLACKWELL: blackwell}
