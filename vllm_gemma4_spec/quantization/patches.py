from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_gemma4_spec.patching.patch import Edit, Group, Lazy, Patch

if TYPE_CHECKING:
    from vllm_gemma4_spec.quantization import (
        compressed_tensors,
        config,
        cpu_experts,
        fp8,
        kv_scales,
        loading,
        mixed,
        nan_scales,
        reload,
        small_batch_layers,
    )
else:  # a wrapper's module is imported only after the module of vLLM that it patches
    compressed_tensors = Lazy("vllm_gemma4_spec.quantization.compressed_tensors")
    config = Lazy("vllm_gemma4_spec.quantization.config")
    cpu_experts = Lazy("vllm_gemma4_spec.quantization.cpu_experts")
    fp8 = Lazy("vllm_gemma4_spec.quantization.fp8")
    kv_scales = Lazy("vllm_gemma4_spec.quantization.kv_scales")
    loading = Lazy("vllm_gemma4_spec.quantization.loading")
    mixed = Lazy("vllm_gemma4_spec.quantization.mixed")
    nan_scales = Lazy("vllm_gemma4_spec.quantization.nan_scales")
    reload = Lazy("vllm_gemma4_spec.quantization.reload")
    small_batch_layers = Lazy("vllm_gemma4_spec.quantization.small_batch_layers")

_QUANTIZATION = "vllm.model_executor.layers.quantization.modelopt"
_FP8 = f"{_QUANTIZATION}:ModelOptFp8LinearMethod"
_LOADER = "vllm.model_executor.model_loader"
_COMPRESSED = "vllm.model_executor.layers.quantization.compressed_tensors"
_DRAFT_MODEL = "vllm.v1.spec_decode.draft_model:DraftModelProposer"
_CPU_MOE = "vllm.model_executor.layers.fused_moe.cpu_fused_moe"

KV_SCALES = Patch(
    name="kv-scales",
    group=Group.CORRECTNESS,
    why=(
        "With an fp8 KV cache, layers that reuse KV read it with their own k_scale and v_scale (ModelOpt writes "
        "1.0 there) instead of those it was written with; and TRITON_ATTN, which Gemma 4 needs, applies no scale "
        "at all once the query is fp8, which it always is on CUDA; waking from sleep mode sets all to 1. Checkpoints "
        "with scales other than 1 give wrong answers without a word."
    ),
    how=(
        "After loading, such layers take the scales of the layer whose KV they reuse; where a scale is not 1, the "
        "query stays in 16 bits, for which the kernel applies both. After sleep mode the scales are set again."
    ),
    retire="A release whose unified_attention multiplies by k_descale and v_descale for fp8 queries, too.",
    scope="Engines with a Gemma 4 as target or drafter and an fp8 KV cache.",
    related="#49262, open for the V1 runner: the same for MTP drafters",
    edits=(
        Edit(
            "vllm.model_executor.layers.attention.attention:Attention.process_weights_after_loading",
            kv_scales.process_weights_after_loading,
        ),
        Edit(
            "vllm.v1.worker.gpu_model_runner:GPUModelRunner.init_fp8_kv_scales",
            kv_scales.init_fp8_kv_scales,
        ),
    ),
    watches=(
        "vllm.model_executor.layers.attention.attention:Attention.forward",
        "vllm.model_executor.layers.quantization.kv_cache:BaseKVCacheMethod.process_weights_after_loading",
        "vllm.v1.attention.ops.triton_unified_attention:unified_attention",
        "vllm.v1.attention.ops.triton_unified_attention:kernel_unified_attention_2d",
    ),
)

DRAFT_PRODUCTS = Patch(
    name="draft-products",
    group=Group.CONVENIENCE,
    why="Marlin's NVFP4 GEMMs take several times as long for one to a few rows as reading their weights takes: 77 of "
    "the 105 us of an E4B layer on an H200 (the per-layer-input gate alone 23).",
    how="NVFP4 layers of a draft model get a second copy of their weight, in the order of a CUDA kernel for up to 128 "
    "rows, compiled by NVRTC; gelu(gate) * up is part of it, and from Hopper on a layer's per-layer input is one "
    "kernel or two, as measured. Larger batches stay on Marlin. Its bfloat16 layers, and an assistant's, take a kernel "
    "for up to 16 rows where it is faster than cuBLAS (Hopper, Blackwell B200). Of a target's layers only an o_proj "
    "with a pre_quant_scale takes the NVFP4 kernel (VLLM_GEMMA4_SPEC_SCALE_IN_PRODUCT).",
    retire="A vLLM kernel for small-batch NVFP4 GEMMs.",
    scope="Draft models and assistants that are a Gemma 4; o_proj layers with a pre_quant_scale of a Gemma 4 target.",
    related="none found",
    edits=(
        Edit(f"{_DRAFT_MODEL}._get_model", small_batch_layers.get_model),
        Edit("vllm.compilation.backends:VllmBackend.__call__", small_batch_layers.compiled),
    ),
    watches=(
        "vllm.model_executor.models.gemma4:Gemma4DecoderLayer.forward",
        "vllm.model_executor.models.gemma4:Gemma4MLP",
        "vllm.model_executor.layers.quantization.utils.marlin_utils_fp4:apply_fp4_marlin_linear",
        "vllm.model_executor.layers.quantization.utils.marlin_utils_fp4:prepare_fp4_layer_for_marlin",
    ),
    needs=("modelopt-nvfp4",),
)

PATCHES: tuple[Patch, ...] = (
    DRAFT_PRODUCTS,
    Patch(
        name="modelopt-nvfp4",
        group=Group.CORRECTNESS,
        why=(
            "0.19.1 refuses quant_algo NVFP4_AWQ, NVFP4_SVD and W4A16_NVFP4, does not find the experts of a Gemma 4 in "
            "MIXED_PRECISION, loads NaN block scales as they are, lets "
            "uninitialised scales of E4B layers that reuse KV into a maximum, overflows Marlin's scales where a "
            "tensor's are far apart (448 beside 1/512), takes bf16 experts for quantized "
            "ones, wants an input_scale of experts that calibration never reached, and has neither NVFP4 nor FP8 on a "
            "CPU. It ends in a KeyError at 26B-A4B's experts where compressed-tensors wrote them into one tensor, and "
            "serves a quantized checkpoint whose vision tower was left out with an untrained one."
        ),
        how=(
            "Subclasses of the NVFP4 and mixed configs choose subclasses of the linear methods, which add "
            "pre_quant_scale and the low-rank branch, repair what was loaded and emulate where vLLM has no kernel; "
            "also when weights are loaded again (reload_weights, update_weights), with the KV cache's scales and what "
            "no checkpoint has (stock multiplies a 26B's router by uninitialised memory then); weights "
            "that are refused leave the old ones. Where a Gemma 4's gate and up projections stream "
            "(VLLM_GEMMA4_SPEC_STREAM_GEMM) without branch, LoRA and a scale of down_proj, their GEMM gives "
            "gelu(gate) * up. "
            "Stacked experts are handed on one by one; what the headers rule "
            "out is refused before a process starts."
        ),
        retire="vLLM reads pre_quant_scale and svdquant_lora_*, and repairs or refuses NaN scales itself.",
        scope="Checkpoints in ModelOpt's NVFP4 forms, MIXED_PRECISION and FP8, whatever the model; tensors of every "
        "Gemma 4.",
        related="#35733 (emulation, in 0.20.0), #40708 (names of experts, in 0.21.0), #44371 (constants in a reload, "
        "after 0.23.0), #52501 (NaN scales refused, 0.30 to 0.32); none found for NVFP4_AWQ and NVFP4_SVD",
        edits=(
            Edit(f"{_QUANTIZATION}:ModelOptNvFp4Config", config.nvfp4_config),
            Edit(f"{_QUANTIZATION}:ModelOptMixedPrecisionConfig", mixed.mixed_config),
            Edit(f"{_FP8}.__init__", fp8.init),
            Edit(f"{_FP8}.create_weights", fp8.create_weights),
            Edit(f"{_FP8}.process_weights_after_loading", fp8.process_weights_after_loading),
            Edit(f"{_FP8}.apply", fp8.apply),
            Edit(
                f"{_QUANTIZATION}:ModelOptMxFp8Config.from_config",
                loading.refused_on_cpu,
                source=f"{_QUANTIZATION}:ModelOptQuantConfigBase.from_config",
            ),
            Edit(f"{_QUANTIZATION}:ModelOptFp8Config.get_supported_act_dtypes", fp8.activation_dtypes),
            Edit(
                "vllm.transformers_utils.model_arch_config_convertor:"
                "ModelArchConfigConvertorBase._normalize_quantization_config",
                loading.known_algorithm,
            ),
            Edit("vllm.config.vllm:VllmConfig._get_quantization_config", loading.quantization_config),
            Edit(
                f"{_LOADER}.default_loader:DefaultModelLoader.get_all_weights",
                loading.checked_weights,
            ),
            Edit(
                f"{_LOADER}.base_loader:process_weights_after_loading",
                nan_scales.reported,
                source=f"{_LOADER}.utils:process_weights_after_loading",
            ),
            Edit("vllm.v1.worker.gpu_worker:Worker.reload_weights", reload.with_config),
            Edit("vllm.v1.worker.gpu_worker:Worker.update_weights", reload.with_config),
            Edit(f"{_LOADER}.reload.layerwise:finalize_layerwise_processing", reload.finalize),
            Edit(f"{_LOADER}.reload.layerwise:initialize_online_processing", reload.initialize),
            Edit(
                f"{_LOADER}.reload.layerwise:materialize_layer",
                reload.materialize,
                source=f"{_LOADER}.reload.meta:materialize_layer",
            ),
        ),
        watches=(
            f"{_QUANTIZATION}:ModelOptQuantConfigBase",
            f"{_QUANTIZATION}:ModelOptNvFp4LinearMethod",
            f"{_QUANTIZATION}:ModelOptNvFp4FusedMoE",
            "vllm.model_executor.layers.quantization.utils.nvfp4_utils:select_nvfp4_linear_backend",
            "vllm.model_executor.layers.quantization.utils.nvfp4_utils:apply_nvfp4_linear",
            "vllm.model_executor.layers.quantization.utils.marlin_utils_fp4:nvfp4_marlin_process_scales",
            "vllm.model_executor.layers.quantization.utils.marlin_utils_fp4:_nvfp4_compute_scale_factor",
            "vllm.model_executor.layers.linear:LinearBase",
            "vllm.model_executor.layers.linear:UnquantizedLinearMethod",
            "vllm.model_executor.parameter:ModelWeightParameter",
            "vllm.model_executor.models.gemma4:Gemma4Model.load_weights",
            "vllm.model_executor.models.gemma4:Gemma4MLP",
            "vllm.model_executor.layers.activation:GeluAndMul",
            f"{_LOADER}.default_loader:DefaultModelLoader._prepare_weights",
            f"{_LOADER}.reload.layerwise:initialize_layerwise_reload",
            f"{_LOADER}.reload.layerwise:_layerwise_process",
            f"{_LOADER}.reload.types:LayerReloadingInfo",
            "vllm.v1.worker.gpu_model_runner:GPUModelRunner.reload_weights",
        ),
    ),
    KV_SCALES,
    Patch(
        name="compressed-nvfp4",
        group=Group.CORRECTNESS,
        why=(
            "0.19.1 has no compressed-tensors NVFP4 on a CPU, loads NaN block scales as they are, and overflows "
            "Marlin's scales where a tensor's are far apart."
        ),
        how=(
            "Subclasses of the two linear schemes and of the method for experts repair the scales and emulate "
            "where vLLM has no kernel."
        ),
        retire="vLLM emulates compressed-tensors NVFP4 on a CPU, and Marlin's scales keep their range.",
        scope="Checkpoints in compressed-tensors' NVFP4, whatever the model.",
        related="#35733 (emulation, in 0.20.0)",
        edits=(
            Edit(
                f"{_COMPRESSED}.compressed_tensors:CompressedTensorsW4A4Fp4",
                compressed_tensors.linear_scheme,
                source=f"{_COMPRESSED}.schemes.compressed_tensors_w4a4_nvfp4:CompressedTensorsW4A4Fp4",
            ),
            Edit(
                f"{_COMPRESSED}.compressed_tensors:CompressedTensorsW4A16Fp4",
                compressed_tensors.linear_scheme,
                source=f"{_COMPRESSED}.schemes.compressed_tensors_w4a16_nvfp4:CompressedTensorsW4A16Fp4",
            ),
            Edit(f"{_COMPRESSED}.compressed_tensors:CompressedTensorsConfig.from_config", loading.refused_on_cpu),
            Edit(
                f"{_COMPRESSED}.compressed_tensors_moe:CompressedTensorsW4A4Nvfp4MoEMethod",
                compressed_tensors.experts_method,
            ),
        ),
        watches=(
            f"{_COMPRESSED}.compressed_tensors:CompressedTensorsLinearMethod",
            f"{_COMPRESSED}.compressed_tensors_moe:CompressedTensorsMoEMethod",
        ),
    ),
    Patch(
        name="cpu-moe-gelu",
        group=Group.CORRECTNESS,
        why="On a CPU, 0.19.1's experts know silu and swigluoai only: 26B-A4B stops at an assertion.",
        how="Adds Gemma 4's gelu to the table of the path in torch and keeps it off the C++ kernel.",
        retire="vLLM's CPU experts support MoEActivation.GELU.",
        scope="Experts with gelu on the CPU platform; 0.19.1 stops at an assertion for all of them.",
        related="none found",
        edits=(
            Edit(f"{_CPU_MOE}:_CPU_MOE_ACT_FN", cpu_experts.with_gelu),
            Edit(
                f"{_CPU_MOE}:CPUFusedMOE.check_grouped_gemm",
                cpu_experts.native_activations_only,
            ),
        ),
        watches=(
            f"{_CPU_MOE}:CPUFusedMOE",
            f"{_CPU_MOE}:cpu_fused_moe_torch",
            "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method:UnquantizedFusedMoEMethod",
        ),
    ),
)
