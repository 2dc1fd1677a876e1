"""Gemma 4's MTP assistants: four layers with queries alone, which read the target's own KV cache."""
