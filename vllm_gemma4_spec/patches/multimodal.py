"""Patches for image, video and audio inputs."""

from __future__ import annotations

from vllm_gemma4_spec.patching.patch import Edit, Group, Patch

_EMBEDDER = "vllm.model_executor.models.gemma4_mm:Gemma4MultimodalEmbedder"

EMBEDDER_NORM = Patch(
    name="embedder-norm",
    group=Group.CORRECTNESS,
    why="Soft tokens of images, video and audio are projected and then normalised; transformers, and so the "
    "checkpoints, normalise first. Embeddings are wrong by as much as they are large, with and without speculation.",
    how="The embedder normalises before its projection.",
    retire="vLLM #40411, merged after 0.19.1.",
    edits=(Edit(f"{_EMBEDDER}.__init__", "vllm_gemma4_spec.multimodal.embedder:embedder_init"),),
    watches=(f"{_EMBEDDER}.forward",),
)

PATCHES: tuple[Patch, ...] = (EMBEDDER_NORM,)
