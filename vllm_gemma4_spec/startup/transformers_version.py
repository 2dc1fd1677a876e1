"""A release of transformers whose Gemma 4 configs vLLM cannot read ends the start with one line."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm_gemma4_spec.errors import Gemma4SpecError, stop
from vllm_gemma4_spec.patching.version import require_transformers


def get_head_size(original: Callable[[Any], int]) -> Callable[[Any], int]:
    """``Gemma4ModelArchConfigConvertor.get_head_size``, the first to read a Gemma 4 config's head sizes.

    Patch: ``transformers-version``. Evidence:
    ``tests/startup/test_transformers_version.py::test_stock_asks_for_no_release``. Related upstream change: #51744,
    fixed by #49797.
    """

    @functools.wraps(original)
    def wrapper(self: Any) -> int:
        try:
            require_transformers()
        except Gemma4SpecError as error:
            stop(error)
        return original(self)

    return wrapper
