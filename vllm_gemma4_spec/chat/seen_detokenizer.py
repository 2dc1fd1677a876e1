"""The detokenizer of requests with stop strings.

Its imports stand in functions: vLLM's own module asks for the wrapper when it is imported, by whoever comes first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_gemma4_spec.chat.requests import Plan


@functools.cache
def _seen_detokenizer() -> Callable[[Any, Plan], Any]:
    from vllm.v1.engine.detokenizer import BaseIncrementalDetokenizer

    from vllm_gemma4_spec.chat.events import SeenText
    from vllm_gemma4_spec.chat.machine import OutputParser

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

    return SeenDetokenizer


def from_new_request(original: Any) -> Any:
    """Wraps ``IncrementalDetokenizer.from_new_request``.

    Patch: ``chat-output``. Evidence: ``tests/chat/test_serving.py::test_stock_is_wrong``. Related upstream change:
    #41991, #52430; a parser on token ids is in 0.24.0.
    """
    inner: Callable[..., Any] = original.__func__

    @functools.wraps(inner)
    def wrapper(cls: Any, tokenizer: Any, request: Any) -> Any:
        from vllm_gemma4_spec.chat.seen import SeenStops

        stops = request.sampling_params.stop
        if isinstance(stops, SeenStops) and tokenizer is not None:
            return _seen_detokenizer()(request, stops.plan)
        return inner(cls, tokenizer, request)

    return classmethod(wrapper)
