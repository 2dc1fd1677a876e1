"""Drafting over several KV cache groups: every draft layer gets its own group's blocks and slots."""
