"""What a server and a request want, in the parser's terms; and whether the parser is in charge at all."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from vllm.reasoning.gemma4_reasoning_parser import Gemma4ReasoningParser
from vllm.tool_parsers.gemma4_tool_parser import Gemma4ToolParser

from vllm_gemma4_spec.chat.machine import Options, OutputParser, Tools
from vllm_gemma4_spec.chat.results import Choice
from vllm_gemma4_spec.chat.tokens import Vocabulary, vocabulary


class Parsers(NamedTuple):
    """Which of the parsers named ``gemma4``, or subclasses of them, a server was started with."""

    reasoning: bool
    tools: bool

    @classmethod
    @functools.cache
    def of(cls, reasoning_parser: Any, tool_parser: Any) -> Parsers | None:
        """None if neither is ``gemma4`` or made from it, or one of them is another model's: then vLLM is left as it
        is."""
        reasoning, tools = _is_a(reasoning_parser, Gemma4ReasoningParser), _is_a(tool_parser, Gemma4ToolParser)
        others = (reasoning_parser is not None and not reasoning) or (tool_parser is not None and not tools)
        return None if others or not (reasoning or tools) else cls(reasoning, tools)


def _is_a(parser: Any, base: type) -> bool:
    return isinstance(parser, type) and issubclass(parser, base)


class Plan(NamedTuple):
    """How the outputs of one request are parsed."""

    vocabulary: Vocabulary
    options: Options

    @classmethod
    def of(cls, parsers: Parsers, request: Any, tokenizer: Any) -> Plan:
        """
        Args:
            parsers: of the server.
            request: ``ChatCompletionRequest``, ``BatchChatCompletionRequest`` or ``ResponsesRequest``.
            tokenizer: of the server.
        """
        tools, name = _tools(request) if parsers.tools else (Tools.OFF, "")
        stop = getattr(request, "stop", None) or ()
        options = Options(
            reasoning=parsers.reasoning,
            include_reasoning=getattr(request, "include_reasoning", True),
            tools=tools,
            tool_name=name,
            # None means the default, as in vLLM's own filter; only an explicit False is a limit there too.
            parallel_calls=getattr(request, "parallel_tool_calls", True) is not False,
            special_text=not getattr(request, "skip_special_tokens", True),
            stop=tuple(filter(None, [stop] if isinstance(stop, str) else stop)),
            include_stop=getattr(request, "include_stop_str_in_output", False),
        )
        return cls(vocabulary(tokenizer), options)

    @property
    def parses_calls(self) -> bool:
        return self.options.tools is not Tools.OFF

    @property
    def forces_calls(self) -> bool:
        return self.options.tools in (Tools.REQUIRED, Tools.NAMED)

    def choice(self, prompt_token_ids: Sequence[int] | None) -> Choice:
        """A fresh parser for one choice."""
        parser = OutputParser(self.vocabulary, self.options, prompt_token_ids or ())
        return Choice(parser, calls_finish=self.options.tools is not Tools.NAMED)


def _tools(request: Any) -> tuple[Tools, str]:
    choice = getattr(request, "tool_choice", None)
    if not getattr(request, "tools", None) or choice == "none":
        return Tools.OFF, ""
    if choice == "required":
        return Tools.REQUIRED, ""
    if choice is None or isinstance(choice, str):
        return Tools.AUTO, ""
    name = getattr(getattr(choice, "function", choice), "name", None)
    return (Tools.NAMED, name) if isinstance(name, str) else (Tools.AUTO, "")
