"""/v1/responses: output items and stream events made from the parser's pieces.

vLLM's own converter of deltas to events knows one call per answer and no change back from content to
reasoning, so the events are made here. Streamed and plain answers share the items, ids included.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from typing import Any, Protocol

from openai.types.responses import (
    ResponseContentPartAddedEvent,
    ResponseContentPartDoneEvent,
    ResponseFunctionCallArgumentsDeltaEvent,
    ResponseFunctionCallArgumentsDoneEvent,
    ResponseFunctionToolCall,
    ResponseFunctionToolCallItem,
    ResponseOutputItemAddedEvent,
    ResponseOutputItemDoneEvent,
    ResponseOutputMessage,
    ResponseOutputText,
    ResponseReasoningItem,
    ResponseReasoningSummaryPartAddedEvent,
    ResponseReasoningSummaryPartDoneEvent,
    ResponseReasoningSummaryTextDeltaEvent,
    ResponseReasoningSummaryTextDoneEvent,
    ResponseReasoningTextDeltaEvent,
    ResponseReasoningTextDoneEvent,
    ResponseTextDeltaEvent,
    ResponseTextDoneEvent,
)
from openai.types.responses.response_reasoning_item import Content as ReasoningText
from vllm.entrypoints.chat_utils import make_tool_call_id
from vllm.entrypoints.openai.responses.context import SimpleContext
from vllm.entrypoints.openai.responses.protocol import (
    ResponseReasoningPartAddedEvent,
    ResponseReasoningPartDoneEvent,
)
from vllm.utils import random_uuid

from vllm_gemma4_spec.chat.machine import Piece
from vllm_gemma4_spec.chat.requests import Plan
from vllm_gemma4_spec.chat.responses_input import parsers_of
from vllm_gemma4_spec.chat.tokens import vocabulary

_UNNUMBERED = -1  # vLLM numbers the events as it sends them


class _Item(Protocol):
    def begin(self) -> Iterator[Any]: ...

    def end(self) -> Iterator[Any]: ...

    def item(self) -> Any: ...


class _Reasoning:
    """``summary``: the client asked for one, and gets all of the reasoning; many clients show nothing else."""

    def __init__(self, index: int, summary: bool = False) -> None:
        self._summary = summary
        self._id = f"rs_{random_uuid()}"
        self._at: dict[str, Any] = {
            "item_id": self._id,
            "output_index": index,
            "content_index": 0,
            "sequence_number": _UNNUMBERED,
        }
        self._texts: list[str] = []

    def _part(self) -> ReasoningText:
        return ReasoningText(type="reasoning_text", text="".join(self._texts))

    def _of_summary(self, event: Any, kind: str, **fields: Any) -> Any:
        at = {**self._at, "type": f"response.reasoning_summary_{kind}", "summary_index": 0, **fields}
        del at["content_index"]
        return event(**at)

    def _summary_part(self) -> dict[str, str]:
        return {"type": "summary_text", "text": "".join(self._texts)}

    def begin(self) -> Iterator[Any]:
        yield _added(self._at, ResponseReasoningItem(type="reasoning", id=self._id, summary=[], status="in_progress"))
        yield ResponseReasoningPartAddedEvent(type="response.reasoning_part.added", part=self._part(), **self._at)
        if self._summary:
            yield self._of_summary(ResponseReasoningSummaryPartAddedEvent, "part.added", part=self._summary_part())

    def delta(self, text: str) -> Iterator[Any]:
        self._texts.append(text)
        yield ResponseReasoningTextDeltaEvent(type="response.reasoning_text.delta", delta=text, **self._at)
        if self._summary:
            yield self._of_summary(ResponseReasoningSummaryTextDeltaEvent, "text.delta", delta=text)

    def end(self) -> Iterator[Any]:
        part = self._part()
        yield ResponseReasoningTextDoneEvent(type="response.reasoning_text.done", text=part.text, **self._at)
        yield ResponseReasoningPartDoneEvent(type="response.reasoning_part.done", part=part, **self._at)
        if self._summary:
            yield self._of_summary(ResponseReasoningSummaryTextDoneEvent, "text.done", text=part.text)
            yield self._of_summary(ResponseReasoningSummaryPartDoneEvent, "part.done", part=self._summary_part())
        yield _done(self._at, self.item())

    def item(self) -> ResponseReasoningItem:
        summary: Any = [self._summary_part()] if self._summary else []
        return ResponseReasoningItem(
            type="reasoning", id=self._id, summary=summary, content=[self._part()], status="completed"
        )


class _Text:
    def __init__(self, index: int) -> None:
        self._id = f"msg_{random_uuid()}"
        self._at: dict[str, Any] = {
            "item_id": self._id,
            "output_index": index,
            "content_index": 0,
            "sequence_number": _UNNUMBERED,
        }
        self._texts: list[str] = []
        self._logprobs: list[Any] | None = None

    def _part(self) -> ResponseOutputText:
        return ResponseOutputText(
            type="output_text", text="".join(self._texts), annotations=[], logprobs=self._logprobs
        )

    def _message(self, content: list[Any], status: Any) -> ResponseOutputMessage:
        return ResponseOutputMessage(type="message", id=self._id, role="assistant", content=content, status=status)

    def begin(self) -> Iterator[Any]:
        yield _added(self._at, self._message([], "in_progress"))
        part = ResponseOutputText(type="output_text", text="", annotations=[], logprobs=[])
        yield ResponseContentPartAddedEvent(type="response.content_part.added", part=part, **self._at)

    def delta(self, text: str, logprobs: list[Any] | None, streamed: list[Any]) -> Any:
        self._texts.append(text)
        if logprobs is not None:
            self._logprobs = (self._logprobs or []) + logprobs
        return ResponseTextDeltaEvent(type="response.output_text.delta", delta=text, logprobs=streamed, **self._at)

    def end(self) -> Iterator[Any]:
        part = self._part()
        yield ResponseTextDoneEvent(type="response.output_text.done", text=part.text, logprobs=[], **self._at)
        yield ResponseContentPartDoneEvent(type="response.content_part.done", part=part, **self._at)
        yield _done(self._at, self.item())

    def item(self) -> ResponseOutputMessage:
        return self._message([self._part()], "completed")


class _Call:
    def __init__(self, index: int, name: str) -> None:
        self._id = f"fc_{random_uuid()}"
        self._at: dict[str, Any] = {"item_id": self._id, "output_index": index, "sequence_number": _UNNUMBERED}
        self._fields = {"type": "function_call", "id": self._id, "call_id": make_tool_call_id(), "name": name}
        self._arguments: list[str] = []
        self.cut = False

    def begin(self) -> Iterator[Any]:
        yield _added(self._at, ResponseFunctionToolCallItem(arguments="", status="in_progress", **self._fields))

    def delta(self, json: str) -> Any:
        self._arguments.append(json)
        return ResponseFunctionCallArgumentsDeltaEvent(
            type="response.function_call_arguments.delta", delta=json, **self._at
        )

    def end(self) -> Iterator[Any]:
        item = self.item()
        # The event's type has no name in this openai release; vLLM sends it all the same.
        at = {**self._at, "name": item.name}
        yield ResponseFunctionCallArgumentsDoneEvent(
            type="response.function_call_arguments.done", arguments=item.arguments, **at
        )
        yield _done(self._at, item)

    def item(self) -> ResponseFunctionToolCall:
        return ResponseFunctionToolCall(
            arguments="".join(self._arguments), status="incomplete" if self.cut else "completed", **self._fields
        )


def _added(at: dict[str, Any], item: Any) -> Any:
    return ResponseOutputItemAddedEvent(
        type="response.output_item.added",
        item=item,
        output_index=at["output_index"],
        sequence_number=_UNNUMBERED,
    )


def _done(at: dict[str, Any], item: Any) -> Any:
    return ResponseOutputItemDoneEvent(
        type="response.output_item.done",
        item=item,
        output_index=at["output_index"],
        sequence_number=_UNNUMBERED,
    )


class _Output:
    """The items of one answer, one after the other, and the events that announce them."""

    def __init__(self, serving: Any, request: Any, tokenizer: Any) -> None:
        self._special = vocabulary(tokenizer).special
        self._serving = serving
        self._request = request
        self._summary = getattr(request.reasoning, "summary", None) is not None
        self._tokenizer = tokenizer
        self._items: list[_Item] = []
        self._open: _Item | None = None

    def items(self) -> list[Any]:
        return [item.item() for item in self._items]

    def read(self, pieces: list[Piece], output: Any) -> Iterator[Any]:
        """The events of new pieces of ``output`` (``CompletionOutput`` with the tokens they came from)."""
        at = 0
        for piece in pieces:
            # Text has the logprobs of its tokens; control tokens before it have none to show.
            tokens = [i for i in range(at, at + len(piece)) if output.token_ids[i] not in self._special]
            at += len(piece)
            if piece.kind == "reasoning":
                yield from self._begin(_Reasoning, functools.partial(_Reasoning, summary=self._summary))
                assert isinstance(self._open, _Reasoning)
                yield from self._open.delta(piece.text)
            elif piece.kind == "content":
                yield from self._begin(_Text, _Text)
                assert isinstance(self._open, _Text)
                yield self._open.delta(piece.text, *self._logprobs(output, tokens))
            elif piece.kind == "call":
                yield from self._calls(piece)

    def _calls(self, piece: Piece) -> Iterator[Any]:
        for event in piece.calls:
            if event.name:
                yield from self.close()
                yield from self._add(_Call(len(self._items), event.name))
            assert isinstance(self._open, _Call)
            self._open.cut |= event.cut
            if event.text:
                yield self._open.delta(event.text)

    def _begin(self, kind: type, make: Callable[[int], Any]) -> Iterator[Any]:
        if not isinstance(self._open, kind):
            yield from self.close()
            yield from self._add(make(len(self._items)))

    def _add(self, item: _Item) -> Iterator[Any]:
        self._open = item
        self._items.append(item)
        yield from item.begin()

    def close(self) -> Iterator[Any]:
        """End the item that is open."""
        if self._open is not None:
            yield from self._open.end()
        self._open = None

    def _logprobs(self, output: Any, tokens: list[int]) -> tuple[list[Any] | None, list[Any]]:
        if not self._request.is_include_output_logprobs() or output.logprobs is None:
            return None, []
        arguments = {
            "token_ids": [output.token_ids[i] for i in tokens],
            "logprobs": [output.logprobs[i] for i in tokens],
            "tokenizer": self._tokenizer,
            "top_logprobs": self._request.top_logprobs,
        }
        return (
            self._serving._create_response_logprobs(**arguments),
            self._serving._create_stream_response_logprobs(**arguments),
        )


class _ParsedText(str):
    """The text of a whole output, and the items it became."""

    items: list[Any]


def _attach(context: SimpleContext, output: _Output) -> None:
    """Leave the items with the context: vLLM hands its text to :func:`output_items`."""
    text = _ParsedText(context._accumulated_text)
    text.items = output.items()
    context._accumulated_text = text


def _plan(serving: Any, request: Any, context: Any, tokenizer: Any) -> Plan | None:
    parsers = parsers_of(serving) if isinstance(context, SimpleContext) else None
    return None if parsers is None else Plan.of(parsers, request, tokenizer)


def streaming_events(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``OpenAIServingResponses._process_simple_streaming_events``.

    Patch: ``chat-output``. Evidence: ``tests/chat/test_serving.py::test_stock_is_wrong``. Related upstream change:
    #41991, #52430; a parser on token ids is in 0.24.0.
    """

    @functools.wraps(original)
    async def wrapper(
        self: Any,
        request: Any,
        sampling_params: Any,
        result_generator: AsyncIterator[Any],
        context: Any,
        model_name: str,
        tokenizer: Any,
        request_metadata: Any,
        created_time: int,
        _increment_sequence_number_and_return: Callable[[Any], Any],
    ) -> AsyncGenerator[Any, None]:
        plan = _plan(self, request, context, tokenizer)
        if plan is None:
            async for event in original(
                self,
                request,
                sampling_params,
                result_generator,
                context,
                model_name,
                tokenizer,
                request_metadata,
                created_time,
                _increment_sequence_number_and_return,
            ):
                yield event
            return
        choice, answer = None, _Output(self, request, tokenizer)
        async for current in result_generator:
            result = current.last_output
            if result is None or not result.outputs:
                continue
            output = result.outputs[0]
            self._raise_if_error(output.finish_reason, request.request_id)
            choice = choice or plan.choice(result.prompt_token_ids)
            for event in answer.read(choice.pieces(output), output):
                yield _increment_sequence_number_and_return(event)
        for event in answer.close():
            yield _increment_sequence_number_and_return(event)
        _attach(context, answer)

    return wrapper


def full_generator(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``OpenAIServingResponses.responses_full_generator``.

    Patch: ``chat-output``. Evidence: ``tests/chat/test_serving.py::test_stock_is_wrong``. Related upstream change:
    #41991, #52430; a parser on token ids is in 0.24.0.
    """

    @functools.wraps(original)
    async def wrapper(
        self: Any,
        request: Any,
        sampling_params: Any,
        result_generator: AsyncIterator[Any],
        context: Any,
        model_name: str,
        tokenizer: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        plan = _plan(self, request, context, tokenizer)

        async def parsed() -> AsyncGenerator[Any, None]:
            assert plan is not None
            async for current in result_generator:
                yield current
            # After a stream the items are there already.
            if context.final_output is not None and not isinstance(context._accumulated_text, _ParsedText):
                result = context.final_output
                answer = _Output(self, request, tokenizer)
                pieces = plan.choice(result.prompt_token_ids).pieces(result.outputs[0])
                for _ in answer.read(pieces, result.outputs[0]):
                    pass
                _attach(context, answer)

        results = result_generator if plan is None else parsed()
        return await original(self, request, sampling_params, results, context, model_name, tokenizer, *args, **kwargs)

    return wrapper


def output_items(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``OpenAIServingResponses._make_response_output_items``.

    Patch: ``chat-output``. Evidence: ``tests/chat/test_serving.py::test_stock_is_wrong``. Related upstream change:
    #41991, #52430; a parser on token ids is in 0.24.0.
    """

    @functools.wraps(original)
    def wrapper(self: Any, request: Any, final_output: Any, tokenizer: Any) -> Any:
        if not isinstance(final_output.text, _ParsedText):
            return original(self, request, final_output, tokenizer)
        if self.enable_log_outputs and self.request_logger:
            self.request_logger.log_outputs(
                request_id=request.request_id,
                outputs=str(final_output.text),
                output_token_ids=final_output.token_ids,
                finish_reason=final_output.finish_reason,
                is_streaming=False,
                delta=False,
            )
        return final_output.text.items

    return wrapper
