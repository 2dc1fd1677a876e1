"""vLLM reads every Gemma 4 config in its normal form; a GGUF file of one ends in one line."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_gemma4_spec.errors import CheckpointError, stop
from vllm_gemma4_spec.hf_config.normal_form import normalized

GGUF = "a GGUF file; vLLM 0.19.1 reads no Gemma 4 from one: serve the checkpoint as safetensors"
_ARCHITECTURE = re.compile(rb"general\.architecture\x08\0{3}.{8}gemma4", re.DOTALL)  # key, type string, length, value


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
        except ValueError as error:
            if "gguf_file" in kwargs:
                _stop_for_gguf(Path(model) / kwargs["gguf_file"], error)
            raise
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


def speculators(original: Callable[..., Any]) -> Callable[..., Any]:
    """``maybe_override_with_speculators``, the first that opens what ``--model`` names.

    A GGUF file of a Gemma 4 ends here in transformers' words, in a traceback.

    Patch: ``config-form``. Evidence: ``tests/patching/test_stock.py::test_sizes_by_layer_are_not_read``. Related
    upstream change: #51744, fixed by #49797.
    """

    @functools.wraps(original)
    def wrapper(model: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(model, *args, **kwargs)
        except ValueError as error:
            _stop_for_gguf(model, error)
            raise

    return wrapper


def _stop_for_gguf(file: str | Path, error: ValueError) -> None:
    """Ends if ``error`` is what transformers says of a Gemma 4's GGUF file.

    On Python 3.10 it says ``Invalid version: 'N/A'`` of every file: it finds no version of the package that reads them.
    """
    if "GGUF model with architecture gemma4" in str(error) or _is_gemma4(Path(file)):
        stop(CheckpointError(f"{file}: {GGUF}"))


def _is_gemma4(file: Path) -> bool:
    """Whether this is a GGUF file whose architecture, one of its first keys, is Gemma 4."""
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        head = opened.read(1 << 16)
    return head.startswith(b"GGUF") and _ARCHITECTURE.search(head) is not None
