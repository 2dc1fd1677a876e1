"""/v1/messages: the switches of a request that vLLM's own type drops, and the stop sequence that ended an answer."""

from __future__ import annotations

import functools
import json
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from typing import Any, NamedTuple

from vllm_gemma4_spec.chat.history import HistoryError
from vllm_gemma4_spec.chat.requests import Parsers

_IN_RESULTS = ("text", "image")  # vLLM drops others without a word
_THINKING = {"enabled": True, "adaptive": True, "disabled": False}


class _Asked(NamedTuple):
    """What a request asks for beyond vLLM's type.

    Attributes:
        template: arguments of the chat template.
        parallel: several calls may be made.
        stops: it has stop sequences.
    """

    template: dict[str, Any]
    parallel: bool
    stops: bool


_ASKED: ContextVar[_Asked | None] = ContextVar("gemma4_messages_asked", default=None)


async def _asked(request: Any, raw_request: Any) -> _Asked:
    body = await raw_request.json() if raw_request is not None else {}
    template = body.get("chat_template_kwargs") or {}
    if not isinstance(template, dict):
        raise HistoryError("chat_template_kwargs: not an object")
    template = dict(template)
    thinking = body.get("thinking")
    if thinking is not None:
        kind = thinking.get("type") if isinstance(thinking, dict) else thinking
        if not isinstance(kind, str) or kind not in _THINKING:
            raise HistoryError(f"thinking.type: {kind!r} is none of {', '.join(_THINKING)}")
        template.setdefault("enable_thinking", _THINKING[kind])
    _check_results(body.get("messages") or ())
    choice = body.get("tool_choice") or {}
    return _Asked(template, not choice.get("disable_parallel_tool_use"), bool(body.get("stop_sequences")))


def _check_results(messages: Any) -> None:
    """
    Raises:
        HistoryError: a tool result has a block that cannot be shown to the model.
    """
    for i, message in enumerate(messages):
        blocks = message["content"]
        for n, block in enumerate(blocks if isinstance(blocks, list) else ()):
            parts = block.get("content") if block["type"] == "tool_result" else None
            for k, part in enumerate(parts if isinstance(parts, list) else ()):
                if part.get("type") not in _IN_RESULTS:
                    where = f"messages[{i}].content[{n}].content[{k}]"
                    raise HistoryError(f"{where}: a result has no {part.get('type')!r} ({', '.join(_IN_RESULTS)})")


def _with_what_is_asked(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    async def wrapper(self: Any, request: Any, raw_request: Any = None) -> Any:
        if Parsers.of(self.reasoning_parser_cls, self.tool_parser) is None:
            return await original(self, request, raw_request)
        try:
            token = _ASKED.set(await _asked(request, raw_request))
            try:
                return await original(self, request, raw_request)
            finally:
                _ASKED.reset(token)
        except ValueError as error:  # the endpoint would make an error of the server's of it
            return self.create_error_response(error)

    return wrapper


def create_messages(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``AnthropicServingMessages.create_messages``.

    Patch: ``chat-output``. Evidence: ``tests/chat/test_serving.py::test_stock_is_wrong``. Related upstream change:
    #41991, #52430; a parser on token ids is in 0.24.0.
    """
    return _with_what_is_asked(original)


def count_tokens(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``AnthropicServingMessages.count_tokens``.

    Patch: ``chat-output``. Evidence: ``tests/chat/test_serving.py::test_stock_is_wrong``. Related upstream change:
    #41991, #52430; a parser on token ids is in 0.24.0.
    """
    return _with_what_is_asked(original)


def convert_request(original: Any) -> Any:
    """Wraps ``AnthropicServingMessages._convert_anthropic_to_openai_request``.

    Patch: ``chat-output``. Evidence: ``tests/chat/test_serving.py::test_stock_is_wrong``. Related upstream change:
    #41991, #52430; a parser on token ids is in 0.24.0.
    """
    inner = original.__func__

    @functools.wraps(inner)
    def wrapper(cls: Any, anthropic_request: Any) -> Any:
        request = inner(cls, anthropic_request)
        asked = _ASKED.get()
        if asked is not None:
            request.chat_template_kwargs = asked.template or None
            request.parallel_tool_calls = asked.parallel
        return request

    return classmethod(wrapper)


def full_converter(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``AnthropicServingMessages.messages_full_converter``.

    Patch: ``chat-output``. Evidence: ``tests/chat/test_serving.py::test_stock_is_wrong``. Related upstream change:
    #41991, #52430; a parser on token ids is in 0.24.0.
    """

    @functools.wraps(original)
    def wrapper(self: Any, generator: Any) -> Any:
        result = original(self, generator)
        choice = generator.choices[0]
        if _ASKED.get() is not None and choice.finish_reason == "stop" and isinstance(choice.stop_reason, str):
            result.stop_reason, result.stop_sequence = "stop_sequence", choice.stop_reason
        return result

    return wrapper


class _Watched:
    """Lines of a chat's stream on their way; remembers the stop string that ended it."""

    stop: str | None = None

    def __init__(self, lines: AsyncIterator[str]) -> None:
        self._lines = lines

    def __aiter__(self) -> _Watched:
        return self

    async def __anext__(self) -> str:
        line = await anext(self._lines)
        if '"stop_reason":"' in line:  # in a text its quotes would have backslashes
            for choice in json.loads(line[len("data: ") :])["choices"]:
                if choice.get("finish_reason") == "stop":
                    self.stop = choice["stop_reason"]
        return line


def stream_converter(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``AnthropicServingMessages.message_stream_converter``.

    Patch: ``chat-output``. Evidence: ``tests/chat/test_serving.py::test_stock_is_wrong``. Related upstream change:
    #41991, #52430; a parser on token ids is in 0.24.0.
    """

    @functools.wraps(original)
    def wrapper(self: Any, generator: AsyncIterator[str]) -> AsyncIterator[str]:
        asked = _ASKED.get()
        if asked is None or not asked.stops:
            return original(self, generator)
        watched = _Watched(generator)
        return _with_stop(original(self, watched), watched)

    return wrapper


async def _with_stop(events: AsyncIterator[str], watched: _Watched) -> AsyncIterator[str]:
    async for event in events:
        if watched.stop is not None and event.startswith("event: message_delta\n"):
            head, _, data = event.partition("data: ")
            body = json.loads(data)
            body["delta"].update(stop_reason="stop_sequence", stop_sequence=watched.stop)
            event = f"{head}data: {json.dumps(body)}\n\n"
        yield event
