"""Right chat output for Gemma 4: one parser on token ids behind every endpoint.

:func:`parse_output` does for ``LLM.chat`` what the servers do. See ``docs/explanation/chat-output.md``.
"""

from __future__ import annotations

from vllm_gemma4_spec.chat.offline import parse_output
from vllm_gemma4_spec.chat.results import Message, ToolCall

__all__ = ["Message", "ToolCall", "parse_output"]
