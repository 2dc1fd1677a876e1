"""Stop strings of a request are searched in what its user sees, not in the text of all tokens.

The engine's detokenizer searches them, with every step. It is told by the stop strings themselves how the output is
parsed: they travel with the request's sampling parameters, which it is made from.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from vllm.v1.engine.detokenizer import BaseIncrementalDetokenizer

from vllm_gemma4_spec.chat.events import SeenText
from vllm_gemma4_spec.chat.machine import OutputParser
from vllm_gemma4_spec.chat.requests import Parsers, Plan


class SeenStops(list[str]):
    """A request's stop strings, and how its outputs are parsed."""

    plan: Plan

    @classmethod
    def of(cls, stops: Iterable[str], plan: Plan) -> SeenStops:
        made = cls(stops)
        made.plan = plan._replace(options=plan.options._replace(stop=()))
        return made

    def __deepcopy__(self, memo: Any) -> SeenStops:
        return self.of(self, self.plan)  # a tokenizer is not to be copied


class SeenDetokenizer(BaseIncrementalDetokenizer):
    """A detokenizer whose text is that of a :class:`SeenText`; searching and cutting are vLLM's own."""

    def __init__(self, request: Any, plan: Plan) -> None:
        """
        Args:
            request: ``EngineCoreRequest``.
            plan: without stop strings.
        """
        super().__init__(request)
        self._parser = OutputParser(plan.vocabulary, plan.options, request.prompt_token_ids or ())
        self._seen = SeenText()

    def decode_next(self, next_token_id: int) -> str:
        return self._seen.add_all(self._parser.feed(next_token_id))


def from_new_request(original: Any) -> Any:
    """Wraps ``IncrementalDetokenizer.from_new_request``."""
    inner: Callable[..., Any] = original.__func__

    @functools.wraps(inner)
    def wrapper(cls: Any, tokenizer: Any, request: Any) -> Any:
        stops = request.sampling_params.stop
        if isinstance(stops, SeenStops) and tokenizer is not None:
            return SeenDetokenizer(request, stops.plan)
        return inner(cls, tokenizer, request)

    return classmethod(wrapper)


def render_batch(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``OpenAIServingChatBatch.render_batch_chat_request``: the stop strings of a batch, as of one request."""

    @functools.wraps(original)
    async def wrapper(self: Any, request: Any) -> Any:
        parsers = Parsers.of(self.reasoning_parser_cls, self.tool_parser)
        if parsers is not None and parsers.reasoning and request.stop:
            plan = Plan.of(parsers, request, self.renderer.tokenizer)
            request.stop = SeenStops.of(plan.options.stop, plan)
        return await original(self, request)

    return wrapper


def single_request(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``BatchChatCompletionRequest.to_chat_completion_request``, which makes new stop strings of the batch's."""

    @functools.wraps(original)
    def wrapper(self: Any, messages: Any) -> Any:
        request = original(self, messages)
        if isinstance(self.stop, SeenStops):
            request.stop = self.stop
        return request

    return wrapper
