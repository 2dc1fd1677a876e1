"""Checkpoints that ModelOpt writes: read, judged, repaired and made. torch and safetensors only, never vLLM."""

BLOCK = 16  # columns that share an NVFP4 block scale
