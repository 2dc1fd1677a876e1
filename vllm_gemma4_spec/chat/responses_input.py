"""/v1/responses: what a request says of the conversation so far."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from vllm.entrypoints.utils import create_error_response

from vllm_gemma4_spec.chat.history import HistoryError, from_items, readable_items
from vllm_gemma4_spec.chat.requests import Parsers


def parsers_of(serving: Any) -> Parsers | None:
    """Of an ``OpenAIServingResponses``."""
    parser = getattr(serving, "parser", None)
    return None if parser is None else Parsers.of(parser.reasoning_parser_cls, parser.tool_parser_cls)


class ReadableItems:
    """ASGI middleware: the items of a request, before vLLM's types are asked whether they know them."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if not self._concerned(scope):
            return await self._app(scope, receive, send)
        messages = [await receive()]
        while messages[-1].get("more_body"):
            messages.append(await receive())
        if messages[-1]["type"] == "http.request":
            body = b"".join(message.get("body", b"") for message in messages)
            try:
                messages = [{"type": "http.request", "body": _readable(body), "more_body": False}]
            except HistoryError as error:
                refusal = create_error_response(error)
                return await JSONResponse(refusal.model_dump(), refusal.error.code)(scope, receive, send)

        async def replay() -> Any:
            return messages.pop(0) if messages else await receive()

        return await self._app(scope, replay, send)

    def _concerned(self, scope: Any) -> bool:
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].endswith("/v1/responses"):
            return False
        return parsers_of(getattr(scope["app"].state, "openai_serving_responses", None)) is not None


def _readable(body: bytes) -> bytes:
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return body  # vLLM has an answer to that
    if not isinstance(request, dict) or not isinstance(request.get("input"), list):
        return body
    return json.dumps({**request, "input": readable_items(request["input"])}).encode()


def build_app(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``build_app``: the middleware stands behind all others, so behind the check of API keys as well.

    Patch: ``chat-output``. Evidence: ``tests/chat/test_serving.py::test_stock_is_wrong``. Related upstream change:
    #41991, #52430; a parser on token ids is in 0.24.0.
    """

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        app = original(*args, **kwargs)
        app.user_middleware.append(Middleware(ReadableItems))
        if app.middleware_stack is not None:  # SageMaker's bootstrap, the last thing vLLM does, has built it
            app.middleware_stack = app.build_middleware_stack()
        return app

    return wrapper


def make_request(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``OpenAIServingResponses._make_request``.

    vLLM makes a message of every item, so one answer comes back as several turns and a result is not found next to its
    call; of a stored response it keeps the text alone. It takes messages as they are, so it is given those.

    Patch: ``chat-output``. Evidence: ``tests/chat/test_serving.py::test_stock_is_wrong``. Related upstream change:
    #41991, #52430; a parser on token ids is in 0.24.0.
    """

    @functools.wraps(original)
    async def wrapper(self: Any, request: Any, prev_response: Any) -> Any:
        if parsers_of(self) is None or (prev_response is None and isinstance(request.input, str)):
            return await original(self, request, prev_response)
        before = []
        if prev_response is not None:
            before = list(self.msg_store.get(prev_response.id) or ())
            if before and prev_response.instructions and before[0].get("content") == prev_response.instructions:
                del before[0]  # instructions are of one response only
            before = from_items(prev_response.output, before)
        items = request.input
        asked = [{"role": "user", "content": items}] if isinstance(items, str) else items
        request.input = from_items(asked, before)
        try:
            return await original(self, request, None)
        finally:
            request.input = items

    return wrapper
