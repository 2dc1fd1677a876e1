"""/v1/chat/completions and /v1/messages: the parser behind vLLM's own generators.

vLLM builds the chunks, the usage, the logprobs and the finish; only what goes into ``reasoning``,
``content`` and ``tool_calls`` comes from here. The engine's outputs reach vLLM's generators with their
parse attached (to the token list when streamed, to the text otherwise), and the reasoning parser that the
generators ask hands that parse back.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

from vllm.entrypoints.chat_utils import make_tool_call_id
from vllm.entrypoints.openai.engine.protocol import DeltaFunctionCall, DeltaMessage, DeltaToolCall, FunctionCall

from vllm_gemma4_spec.chat.events import Kind
from vllm_gemma4_spec.chat.machine import Piece
from vllm_gemma4_spec.chat.requests import Parsers, Plan
from vllm_gemma4_spec.chat.results import Choice, Message


class ParsedText(str):
    """The text of a whole output, which stands in for its content, and its parse."""

    message: Message


class _Handover:
    """Takes the place of a reasoning parser in vLLM's generators and hands the parse over."""

    def __init__(self, all_tokens: bool = False) -> None:
        self._all_tokens = all_tokens  # a chunk for every token, also where there is no text
        self._messages: dict[Kind, DeltaMessage] = {}
        self._call: DeltaToolCall | None = None

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        return False  # the generators shall ask for every delta

    def extract_reasoning_streaming(
        self, previous_text: str, current_text: str, delta_text: str, previous: Any, current: Any, delta: Piece
    ) -> DeltaMessage | None:
        kind = delta.kind
        if kind is None:
            return DeltaMessage() if self._all_tokens and delta else None
        if kind == "call":
            first, last = delta.calls[0], delta.calls[-1]
            if first.name or first.call != last.call:
                return _call_message(delta)
            return self._more_arguments(first.call, "".join([event.text for event in delta.calls]))
        # vLLM makes JSON of a delta before it asks for the next, and a new message costs more than the parse.
        message = self._messages.get(kind)
        if message is None:
            message = self._messages[kind] = DeltaMessage(**{kind: delta.text})
        else:
            message.__dict__[kind] = delta.text  # setattr() would have pydantic look for hooks
        return message

    def _more_arguments(self, index: int, json: str) -> DeltaMessage:
        """The arguments of one call go on; the message is used again, as that of a text."""
        message, call = self._messages.get("call"), self._call
        if message is None or call is None:
            call = self._call = DeltaToolCall(index=index, function=DeltaFunctionCall(arguments=json))
            message = self._messages["call"] = DeltaMessage(tool_calls=[call])
        else:
            call.__dict__["index"] = index
            call.function.__dict__["arguments"] = json
            message.__dict__["tool_calls"] = [call]  # vLLM puts a list of its own there
        return message

    def extract_reasoning(self, model_output: ParsedText, request: Any) -> tuple[str | None, ParsedText | None]:
        message = model_output.message
        # The content stays attached while calls are to be taken from it; see `parsed_calls`.
        if message.content or message.tool_calls or not message.reasoning:
            return message.reasoning or None, model_output
        return message.reasoning, None


def _call_message(piece: Piece) -> DeltaMessage:
    """The calls of one piece as a delta."""
    names: dict[int, str] = {}  # of the calls that begin here
    arguments: dict[int, list[str]] = {}
    for event in piece.calls:
        if event.name:
            names[event.call] = event.name
        arguments.setdefault(event.call, []).append(event.text)
    calls = []
    for index, texts in arguments.items():
        call = DeltaToolCall(index=index, function=DeltaFunctionCall(arguments="".join(texts)))
        if index in names:
            call.id, call.type, call.function.name = make_tool_call_id(), "function", names[index]
        calls.append(call)
    return DeltaMessage(tool_calls=calls)


def _split(output: Any, pieces: list[Piece]) -> list[Any]:
    """One ``CompletionOutput`` per piece, the first of them ``output`` itself; the last has the finish."""
    out = [output, *(replace(output, text="", logprobs=None) for _ in pieces[1:])]
    logprobs, at = output.logprobs, 0
    finish, stop = output.finish_reason, output.stop_reason
    for piece, part in zip(pieces, out, strict=True):
        end = at + len(piece)
        part.token_ids = piece
        part.logprobs = None if logprobs is None else logprobs[at:end]
        part.finish_reason = part.stop_reason = None
        at = end
    out[-1].finish_reason, out[-1].stop_reason = finish, stop
    return out


class _Streamed:
    """``RequestOutput`` s of deltas, every choice's outputs replaced by its pieces.

    A chunk has one piece: clients that look for content only where there is no reasoning, as in vLLM's own
    example, would miss some otherwise. An async iterator and no generator: those cost microseconds to begin and
    to end.
    """

    def __init__(self, results: AsyncIterator[Any], plan: Plan, keep_text: bool) -> None:
        self._results = results
        self._plan = plan
        self._keep_text = keep_text
        self._choices: dict[int, Choice] = {}

    def __aiter__(self) -> _Streamed:
        return self

    async def __anext__(self) -> Any:
        result = await anext(self._results)
        outputs: list[Any] = []
        for output in result.outputs:
            choice = self._choices.get(output.index)
            if choice is None:
                choice = self._choices[output.index] = self._plan.choice(result.prompt_token_ids)
            pieces = choice.pieces(output)
            if not self._keep_text:
                output.text = ""  # vLLM would join all texts anew with every delta
            if output.finish_reason is not None:
                output.finish_reason = choice.finish_reason(output.finish_reason)
            if len(pieces) == 1:  # nearly always, so it counts what this costs
                output.token_ids = pieces[0]
                outputs.append(output)
            else:
                outputs += _split(output, pieces)
        result.outputs = outputs  # deltas are made for this reader alone
        return result


async def _whole(results: AsyncIterator[Any], plan: Plan, messages: dict[int, Message]) -> AsyncGenerator[Any, None]:
    """The last ``RequestOutput``, its texts replaced by contents; ``messages`` gets the parse per choice."""
    last = None
    async for result in results:
        last = result
    if last is None:
        return
    last = copy.copy(last)
    outputs = []
    for output in last.outputs:
        message = plan.choice(last.prompt_token_ids).message(output)
        messages[output.index] = message
        text = ParsedText(message.content)
        text.message = message
        outputs.append(replace(output, text=text, finish_reason=message.finish_reason))
    last.outputs = outputs
    yield last


def _echoable(conversation: list[Any]) -> list[Any]:
    """Gemma 4's templates get contents in parts; vLLM's stream can echo a string only (its plain answer joins)."""
    if not conversation or not isinstance(conversation[-1].get("content"), list):
        return conversation
    text = "\n".join(part["text"] for part in conversation[-1]["content"])
    return [*conversation[:-1], {**conversation[-1], "content": text}]


def stream_generator(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``OpenAIServingChat.chat_completion_stream_generator``.

    Patch: ``chat-output``. Evidence: ``tests/chat/test_serving.py::test_stock_is_wrong``. Related upstream change:
    #41991, #52430; a parser on token ids is in 0.24.0.
    """

    @functools.wraps(original)
    def wrapper(
        self: Any,
        request: Any,
        result_generator: AsyncIterator[Any],
        request_id: str,
        model_name: str,
        conversation: Any,
        tokenizer: Any,
        request_metadata: Any,
        reasoning_parser: Any = None,
    ) -> Any:
        parsers = Parsers.of(self.reasoning_parser_cls, self.tool_parser)
        if parsers is not None:
            plan = Plan.of(parsers, request, tokenizer)
            # Only its log of outputs needs the text.
            result_generator = _Streamed(result_generator, plan, keep_text=self.enable_log_outputs)
            reasoning_parser = _Handover(all_tokens=bool(request.logprobs))
            conversation = _echoable(conversation) if request.echo else conversation
            if request.tools:  # otherwise vLLM would look for calls in the text itself
                request = request.model_copy(update={"tool_choice": "none"})
        return original(
            self,
            request,
            result_generator,
            request_id,
            model_name,
            conversation,
            tokenizer,
            request_metadata,
            reasoning_parser,
        )

    return wrapper


def full_generator(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``OpenAIServingChat.chat_completion_full_generator``.

    Patch: ``chat-output``. Evidence: ``tests/chat/test_serving.py::test_stock_is_wrong``. Related upstream change:
    #41991, #52430; a parser on token ids is in 0.24.0.
    """

    @functools.wraps(original)
    async def wrapper(
        self: Any,
        request: Any,
        result_generator: AsyncIterator[Any],
        request_id: str,
        model_name: str,
        conversation: Any,
        tokenizer: Any,
        request_metadata: Any,
        reasoning_parser: Any = None,
    ) -> Any:
        parsers = Parsers.of(self.reasoning_parser_cls, self.tool_parser)
        messages: dict[int, Message] = {}
        if parsers is not None:
            plan = Plan.of(parsers, request, tokenizer)
            result_generator = _whole(result_generator, plan, messages)
            reasoning_parser = _Handover()
            # vLLM's branch for `auto` is the one that takes content and calls alike.
            request = request.model_copy(update={"tool_choice": "auto" if plan.parses_calls else "none"})
        response = await original(
            self,
            request,
            result_generator,
            request_id,
            model_name,
            conversation,
            tokenizer,
            request_metadata,
            reasoning_parser,
        )
        for choice in getattr(response, "choices", ()) if messages else ():
            # That branch also says `tool_calls` where a call was cut or a function was named.
            choice.finish_reason = messages[choice.index].finish_reason or "stop"
            if plan.forces_calls and choice.message.content is None:
                choice.message.content = ""  # as vLLM answers a forced tool choice
        return response

    return wrapper


def parsed_calls(original: staticmethod[..., Any]) -> staticmethod[..., Any]:
    """Wraps ``OpenAIServing._parse_tool_calls_from_content``: calls that came with the content are taken.

    Patch: ``chat-output``. Evidence: ``tests/chat/test_serving.py::test_stock_is_wrong``. Related upstream change:
    #41991, #52430; a parser on token ids is in 0.24.0.
    """
    inner = original.__func__

    @functools.wraps(inner)
    def wrapper(
        request: Any, tokenizer: Any, enable_auto_tools: bool, tool_parser_cls: Any, content: Any = None
    ) -> Any:
        if not isinstance(content, ParsedText):
            return inner(request, tokenizer, enable_auto_tools, tool_parser_cls, content)
        message = content.message
        calls = [FunctionCall(id=make_tool_call_id(), name=c.name, arguments=c.arguments) for c in message.tool_calls]
        return calls, message.content if message.content or not calls else None

    return staticmethod(wrapper)


def batch_full_generator(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``OpenAIServingChatBatch.chat_completion_full_generator_batch``.

    Patch: ``chat-output``. Evidence: ``tests/chat/test_serving.py::test_stock_is_wrong``. Related upstream change:
    #41991, #52430; a parser on token ids is in 0.24.0.
    """

    @functools.wraps(original)
    async def wrapper(
        self: Any,
        request: Any,
        generators: list[Any],
        request_id: str,
        model_name: str,
        all_conversations: Any,
        tokenizer: Any,
        request_metadata: Any,
        reasoning_parser: Any = None,
    ) -> Any:
        # The endpoint knows no tools, so a tool parser alone leaves it as it is.
        parsers = Parsers.of(self.reasoning_parser_cls, self.tool_parser)
        if parsers is not None and parsers.reasoning:
            plan = Plan.of(parsers, request, tokenizer)
            generators = [_whole(g, plan, {}) for g in generators]
            reasoning_parser = _Handover()
        return await original(
            self,
            request,
            generators,
            request_id,
            model_name,
            all_conversations,
            tokenizer,
            request_metadata,
            reasoning_parser,
        )

    return wrapper
