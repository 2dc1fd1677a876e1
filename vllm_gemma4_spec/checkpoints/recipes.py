"""The recipes of ``quantize``; apart from what runs them, which imports torch."""

from __future__ import annotations

# recipe -> attribute of modelopt.torch.quantization. w4a16 leaves activations alone (ModelOpt 0.45 and later); mixed
# has attention in FP8 and the rest in NVFP4.
RECIPES = {
    "nvfp4": "NVFP4_DEFAULT_CFG",
    "awq-lite": "NVFP4_AWQ_LITE_CFG",
    "awq-clip": "NVFP4_AWQ_CLIP_CFG",
    "awq-full": "NVFP4_AWQ_FULL_CFG",
    "svdquant": "NVFP4_SVDQUANT_DEFAULT_CFG",
    "w4a16": "W4A16_NVFP4_CFG",
    "mixed": "NVFP4_DEFAULT_CFG",
}
