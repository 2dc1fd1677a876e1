"""LoRA adapters on Gemma 4."""
