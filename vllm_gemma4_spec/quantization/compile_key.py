"""What this package's layers put into the key of vLLM's compile cache, beside what vLLM puts there by itself."""

from __future__ import annotations

import hashlib
from typing import Any

_KEY = "vllm_gemma4_spec_nvfp4"


def add(additional_config: Any, words: str) -> None:
    """One layer's words. A graph compiled with others is not reused.

    Args:
        additional_config: of a ``VllmConfig``; left as it is where it is no dict.
    """
    if isinstance(additional_config, dict):
        before = additional_config.get(_KEY, "")
        additional_config[_KEY] = hashlib.sha256(f"{before} {words}".encode()).hexdigest()[:16]
