"""vLLM reads every Gemma 4 config in its normal form."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_gemma4_spec.errors import CheckpointError, stop
from vllm_gemma4_spec.hf_config.normal_form import normalized

GGUF = "a GGUF file; vLLM 0.19.1 reads no Gemma 4 from one: serve the checkpoint as safetensors"


def parse(original: Callable[..., tuple[dict[str, Any], Any]]) -> Callable[..., tuple[dict[str, Any], Any]]:
    """``HFConfigParser.parse``: targets, drafters and assistants come through here, before any override.

    ``vllm serve`` ends with one line for a config that contradicts itself.

    Patch: ``config-form``. Evidence: ``tests/patching/test_stock.py::test_sizes_by_layer_are_not_read``. Related
    upstream change: #51744, fixed by #49797.
    """

    @functools.wraps(original)
    def wrapper(self: Any, model: str | Path, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], Any]:
        try:
            found = original(self, model, *args, **kwargs)
        except ValueError as error:  # transformers' words for a GGUF file of an architecture that it cannot read
            if "gguf_file" not in kwargs or "architecture gemma4" not in str(error):
                raise
            file = Path(model) / kwargs["gguf_file"]
            stop(CheckpointError(f"{file}: {GGUF}"))
        written, config = found
        try:
            plain = normalized(written, str(Path(model) / "config.json"))
        except CheckpointError as error:
            stop(error)
        if plain == written:
            return found
        made = type(config).from_dict(plain)
        made.name_or_path = config.name_or_path
        return plain, made

    return wrapper
