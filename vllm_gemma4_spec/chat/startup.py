"""At start-up and before generation: check the tokenizer, keep the request's own ``skip_special_tokens``."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

from vllm import envs

from vllm_gemma4_spec.chat.requests import Parsers
from vllm_gemma4_spec.chat.tokens import TokenizerError, vocabulary


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
        if tokenizer is not None and Parsers.of(self.reasoning_parser, self.tool_parser) is not None:
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

    vLLM's text parsers need the control tokens in the text, so there they set ``skip_special_tokens`` to
    False whatever the request says. The parser on token ids needs no text: the request keeps its own.

    Patch: ``chat-output``. Evidence: ``tests/chat/test_serving.py::test_stock_is_wrong``. Related upstream change:
    #41991, #52430; a parser on token ids is in 0.24.0.
    """

    @functools.wraps(original)
    async def wrapper(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        own = getattr(request, "skip_special_tokens", None)
        result = await original(self, request, *args, **kwargs)
        parsers = Parsers.of(self.reasoning_parser, self.tool_parser)
        # The experimental context of /v1/responses still parses text.
        if own is not None and parsers is not None and not envs.VLLM_USE_EXPERIMENTAL_PARSER_CONTEXT:
            request.skip_special_tokens = own
        return result

    return wrapper
