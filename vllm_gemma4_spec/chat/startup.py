"""At start-up and before generation: check the tokenizer, keep the request's own ``skip_special_tokens``."""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from vllm import envs

from vllm_gemma4_spec.chat.history import HistoryError, prepare
from vllm_gemma4_spec.chat.requests import Parsers, Plan
from vllm_gemma4_spec.chat.seen import SeenStops
from vllm_gemma4_spec.chat.tokens import TokenizerError, vocabulary

logger = logging.getLogger("vllm.plugins.gemma4_spec")


def render_init(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``OpenAIServingRender.__init__``, which every server runs.

    Raises:
        TokenizerError: a parser named ``gemma4`` was asked for and the tokenizer is not Gemma 4's.

    Patch: ``chat-output``. Evidence: ``tests/chat/test_serving.py::test_stock_is_wrong``. Related upstream change:
    #41991, #52430; a parser on token ids is in 0.24.0.
    """

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        tokenizer = self.renderer.tokenizer
        parsers = Parsers.of(self.reasoning_parser, self.tool_parser)
        _say_what_is_in_force(self, parsers)
        if tokenizer is not None and parsers is not None:
            try:
                vocabulary(tokenizer)
            except TokenizerError as error:
                # A user's mistake ends the command with one line; a custom server gets the exception.
                if os.path.basename(sys.argv[0]) == "vllm":
                    raise SystemExit(f"vllm-gemma4-spec: {error}") from None
                raise

    return wrapper


def preprocess_chat(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``OpenAIServingRender.preprocess_chat``.

    What was said before is checked, and thinking switched as the request says. vLLM's text parsers need the control
    tokens in the text, so there they set ``skip_special_tokens`` to False whatever the request says. The parser on
    token ids needs no text: the request keeps its own.

    Patch: ``chat-output``. Evidence: ``tests/chat/test_serving.py::test_stock_is_wrong``. Related upstream change:
    #41991, #52430; a parser on token ids is in 0.24.0.
    """

    @functools.wraps(original)
    async def wrapper(
        self: Any,
        request: Any,
        messages: list[Any],
        default_template: str | None,
        default_template_content_format: Any,
        default_template_kwargs: dict[str, Any] | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        parsers = Parsers.of(self.reasoning_parser, self.tool_parser)
        if parsers is not None:
            prepare(messages)
            default_template_kwargs = _template_arguments(self, request, default_template_kwargs)
        own = getattr(request, "skip_special_tokens", None)
        result = await original(
            self,
            request,
            messages,
            default_template,
            default_template_content_format,
            default_template_kwargs,
            *args,
            **kwargs,
        )
        # The experimental context of /v1/responses still parses text.
        if own is not None and parsers is not None and not envs.VLLM_USE_EXPERIMENTAL_PARSER_CONTEXT:
            request.skip_special_tokens = own
            stop = getattr(request, "stop", None)
            if stop:  # all of them: vLLM refuses one that is empty
                plan = Plan.of(parsers, request, self.renderer.tokenizer)
                request.stop = SeenStops.of([stop] if isinstance(stop, str) else stop, plan)
        return result

    return wrapper


def render_batch(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``OpenAIServingChatBatch.render_batch_chat_request``: conversations are checked before vLLM copies them
    and loses parts that it does not know.

    Patch: ``chat-output``. Evidence: ``tests/chat/test_serving.py::test_stock_is_wrong``. Related upstream change:
    #41991, #52430; a parser on token ids is in 0.24.0.
    """

    @functools.wraps(original)
    async def wrapper(self: Any, request: Any) -> Any:
        render = self.openai_serving_render
        if Parsers.of(render.reasoning_parser, render.tool_parser) is not None:
            for i, messages in enumerate(request.messages):
                prepare(messages, f"messages[{i}]")
        return await original(self, request)

    return history_errors(wrapper)


def history_errors(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``OpenAIServingRender.render_chat``, ``OpenAIServingTokenization.create_tokenize`` and
    ``OpenAIServingResponses.create_responses``: what is wrong with a history is an answer, not an error that the server
    logs with its stack.

    Patch: ``chat-output``. Evidence: ``tests/chat/test_serving.py::test_stock_is_wrong``. Related upstream change:
    #41991, #52430; a parser on token ids is in 0.24.0.
    """

    @functools.wraps(original)
    async def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return await original(self, *args, **kwargs)
        except HistoryError as error:
            return self.create_error_response(error)

    return wrapper


def _template_arguments(render: Any, request: Any, given: dict[str, Any] | None) -> dict[str, Any]:
    """The arguments of the template that the request's own ``chat_template_kwargs`` go before.

    ``/v1/responses`` passes neither the server's nor the request's own; they are here as well.
    """
    arguments = dict(render.default_chat_template_kwargs if given is None else given)
    reasoning = getattr(request, "reasoning", None)
    effort = getattr(request, "reasoning_effort", None) or getattr(reasoning, "effort", None)
    if effort is not None:
        arguments["enable_thinking"] = effort != "none"
    if given is None:
        own = getattr(request, "chat_template_kwargs", None) or {}
        if not isinstance(own, dict):
            raise HistoryError("chat_template_kwargs: not an object")
        arguments |= own
    return arguments


def _say_what_is_in_force(render: Any, parsers: Parsers | None) -> None:
    """One line at INFO for a Gemma 4: which parser reads its output, and which flags are missing."""
    if not str(getattr(render.model_config.hf_config, "model_type", "")).startswith("gemma4") and parsers is None:
        return
    reasoning, tools = render.reasoning_parser, render.tool_parser
    names = [parser.__name__ for parser in (reasoning, tools) if parser is not None]
    if parsers is None and names:
        logger.info(
            "chat output: read by %s and not by the parser gemma4, so as vLLM does by itself", " and ".join(names)
        )
        return
    missing = []
    if reasoning is None:
        missing.append("--reasoning-parser gemma4 (without it, reasoning is part of the answer)")
    if tools is None:
        missing.append("--enable-auto-tool-choice --tool-call-parser gemma4 (without them, tool calls are text)")
    logger.info(
        "chat output: %s%s",
        f"read from token ids, for {' and '.join(names)}" if names else "no parser reads it",
        f"; missing: {', '.join(missing)}" if missing else "",
    )
