"""Right chat output for Gemma 4: one parser on token ids behind every endpoint.

:func:`parse_output` does for ``LLM.chat`` what the servers do. See ``docs/explanation/chat-output.md``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_gemma4_spec.chat.offline import parse_output
    from vllm_gemma4_spec.chat.results import Message, ToolCall

__all__ = ["Message", "ToolCall", "parse_output"]


def __getattr__(name: str) -> Any:
    """On first use: the list of patches is read where there are no tokenizers, too."""
    if name == "parse_output":
        from vllm_gemma4_spec.chat.offline import parse_output

        return parse_output
    if name in __all__:
        from vllm_gemma4_spec.chat import results

        return getattr(results, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
