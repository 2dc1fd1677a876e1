"""Streams of ``/v1/responses`` whose text has a JSON schema: a client's own, or that of a forced tool choice."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable
from typing import Any

from vllm_gemma4_spec.scope import gemma4_model


def responses_stream_generator(original: Callable[..., AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
    """``OpenAIServingResponses.responses_stream_generator``: the text's format is put into the events ready made.

    The original writes a response as ``schema_`` and reads it back as ``schema``, which ends the stream before its
    first event. The sampling parameters have been made by then: the format is only repeated to the client.

    Patch: ``responses-schema``. Evidence: ``tests/requests/test_responses.py::test_stock_dies_before_the_first_event``.
    Related upstream change: none found.
    """

    @functools.wraps(original)
    async def wrapper(self: Any, request: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        text = request.text
        if text is None or text.format is None or not gemma4_model(self.model_config):
            async for event in original(self, request, *args, **kwargs):
                yield event
            return
        async for event in original(self, request.model_copy(update={"text": None}), *args, **kwargs):
            response = getattr(event, "response", None)
            if response is not None:
                response.text = text
            yield event

    return wrapper
