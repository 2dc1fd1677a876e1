"""Patches for image, video and audio inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_gemma4_spec.patching.patch import Edit, Group, Lazy, Patch

if TYPE_CHECKING:
    from vllm_gemma4_spec.multimodal import embedder, image_attention, image_sizes, image_turns
else:  # a wrapper's module is imported only after the module of vLLM that it patches
    embedder = Lazy("vllm_gemma4_spec.multimodal.embedder")
    image_attention = Lazy("vllm_gemma4_spec.multimodal.image_attention")
    image_sizes = Lazy("vllm_gemma4_spec.multimodal.image_sizes")
    image_turns = Lazy("vllm_gemma4_spec.multimodal.image_turns")

_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_MM = "vllm.model_executor.models.gemma4_mm"
_EMBEDDER = f"{_MM}:Gemma4MultimodalEmbedder"

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

IMAGE_TURNS = Patch(
    name="image-turns",
    group=Group.CONVENIENCE,
    why="An image that may not be cut waits, and with it every request behind it, while decoding requests leave fewer "
    "tokens of a step than it has.",
    how="In the step after one without room for an image, as many of the latest decoding requests as necessary sit "
    "out, never twice in a row.",
    retire="A scheduler that keeps tokens back for inputs that must be computed whole.",
    scope="Engines with a Gemma 4 as target.",
    related="none found",
    edits=(Edit("vllm.v1.core.sched.scheduler:Scheduler.schedule", image_turns.schedule),),
    watches=("vllm.v1.core.sched.async_scheduler:AsyncScheduler", f"{_RUNNER}._update_states"),
)

IMAGE_SIZES = Patch(
    name="image-sizes",
    group=Group.CORRECTNESS,
    why="For images of extreme aspect ratios vLLM's own arithmetic gives more tokens than the vision tower makes, and "
    "images of two resolutions in one step, as mm_processor_kwargs of a request can ask for, are no single tensor: "
    "either ends the engine. A max_soft_tokens that Gemma 4 does not have ends the server.",
    how="Tokens are counted with the image processor's own function; each resolution goes through the tower by itself, "
    "an image at a time; a wrong max_soft_tokens is refused with status 400.",
    retire="vLLM 0.21.0 clamps the count, 0.22.1 batches by resolution.",
    scope="The model Gemma 4 with its towers.",
    related="none found by number; fixed in 0.21.0 and 0.22.1",
    edits=(
        Edit(f"{_MM}:Gemma4ProcessingInfo._compute_num_soft_tokens", image_sizes.compute_num_soft_tokens),
        Edit(f"{_MM}:Gemma4MultiModalProcessor._call_hf_processor", image_sizes.call_hf_processor),
        Edit(f"{_MM}:Gemma4ForConditionalGeneration.embed_multimodal", image_sizes.embed_multimodal),
    ),
    watches=(
        f"{_MM}:Gemma4ProcessingInfo.get_image_repl",
        f"{_MM}:Gemma4ForConditionalGeneration._process_image_input",
    ),
)

PATCHES: tuple[Patch, ...] = (EMBEDDER_NORM, IMAGE_ATTENTION, IMAGE_TURNS, IMAGE_SIZES)
