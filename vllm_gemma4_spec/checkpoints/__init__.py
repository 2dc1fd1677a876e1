"""Checkpoints that ModelOpt writes: read, judged, mended and made. torch and safetensors only, never vLLM."""
