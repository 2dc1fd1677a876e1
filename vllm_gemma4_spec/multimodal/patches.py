"""Patches for image, video and audio inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_gemma4_spec.patching.patch import Edit, Group, Lazy, Patch

if TYPE_CHECKING:
    from vllm_gemma4_spec.multimodal import embedder, image_attention
else:  # a wrapper's module is imported only after the module of vLLM that it patches
    embedder = Lazy("vllm_gemma4_spec.multimodal.embedder")
    image_attention = Lazy("vllm_gemma4_spec.multimodal.image_attention")

_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_EMBEDDER = "vllm.model_executor.models.gemma4_mm:Gemma4MultimodalEmbedder"

EMBEDDER_NORM = Patch(
    name="embedder-norm",
    group=Group.CORRECTNESS,
    why="Soft tokens of images, video and audio are projected and then normalised; transformers, and so the "
    "checkpoints, normalise first. Embeddings are wrong by as much as they are large, with and without speculation.",
    how="The embedder normalises before its projection.",
    retire="vLLM #40411, merged after 0.19.1.",
    scope="Gemma 4's own class.",
    related="#40411; in 0.20.0",
    edits=(Edit(f"{_EMBEDDER}.__init__", embedder.embedder_init),),
    watches=(f"{_EMBEDDER}.forward",),
)

IMAGE_ATTENTION = Patch(
    name="image-attention",
    group=Group.CORRECTNESS,
    why="31B and 26B-A4B were trained with images that attend both ways in sliding layers "
    "(use_bidirectional_attention); 0.19.1 attends causally there, so answers to images are not transformers'.",
    how="TRITON_ATTN is given the positions of each image, in sliding layers and only in steps that compute one; such "
    "a step runs without a full CUDA graph, and each image with its window as a sequence of its own, because with "
    "positions of images the kernel walks a whole context. The scheduler never cuts an image. Other backends stay "
    "causal and say so.",
    retire="vLLM #40534 with #47217, merged after 0.19.1, and a scheduler that keeps cached images whole, too.",
    scope="Targets whose config is a multimodal Gemma 4's and says use_bidirectional_attention: vision.",
    related="#40106, #40534 (in 0.20.0), #47217 (in 0.26.0)",
    edits=(
        Edit(
            "vllm.v1.core.sched.scheduler:Scheduler._try_schedule_encoder_inputs",
            image_attention.try_schedule_encoder_inputs,
        ),
        Edit(f"{_RUNNER}.initialize_attn_backend", image_attention.initialize_attn_backend),
        Edit(f"{_RUNNER}._determine_batch_execution_and_padding", image_attention.determine_batch_execution),
        Edit(f"{_RUNNER}._build_attention_metadata", image_attention.build_attention_metadata),
    ),
    watches=(
        f"{_RUNNER}.execute_model",
        "vllm.v1.core.sched.scheduler:Scheduler.schedule",
        "vllm.v1.attention.backends.triton_attn:TritonAttentionMetadata",
        "vllm.v1.attention.backends.triton_attn:TritonAttentionImpl.forward",
        "vllm.v1.attention.ops.triton_unified_attention:unified_attention",
        "vllm.v1.attention.ops.triton_unified_attention:kernel_unified_attention_2d",
        "vllm.multimodal.inputs:PlaceholderRange.extract_embeds_range",
    ),
)

PATCHES: tuple[Patch, ...] = (EMBEDDER_NORM, IMAGE_ATTENTION)
