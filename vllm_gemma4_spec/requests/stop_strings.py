"""The stop string that ends first in the text ends the answer, at its token, whatever a step delivers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm_gemma4_spec.scope import gemma4_model

# vLLM's detokenizer is imported where it is used: its import asks for this module.

# Attribute of an OutputProcessor that serves a Gemma 4, and of the classes that look token by token.
BY_TOKEN = "_gemma4_spec_by_token"


def engine_init(original: Callable[..., None]) -> Callable[..., None]:
    """``LLMEngine.__init__``, ``AsyncLLM.__init__``: the output processor is told whose output it is.

    Patch: ``stop-strings``. Evidence:
    ``tests/requests/test_requests_engine.py::test_stock_vllm_forgets_grammar_budget_and_stop_strings``. Related
    upstream change: none found.
    """

    @functools.wraps(original)
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        setattr(self.output_processor, BY_TOKEN, gemma4_model(vllm_config.model_config))

    return __init__


def add_request(original: Callable[..., None]) -> Callable[..., None]:
    """``OutputProcessor.add_request``: requests with stop strings are looked at token by token, no others are touched.

    Their detokenizer and log-probabilities become of a kind of their own.

    Patch: ``stop-strings``. Evidence:
    ``tests/requests/test_requests_engine.py::test_stock_vllm_forgets_grammar_budget_and_stop_strings``. Related
    upstream change: none found.
    """

    @functools.wraps(original)
    def wrapper(self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
        from vllm.v1.engine.detokenizer import BaseIncrementalDetokenizer

        original(self, request, *args, **kwargs)
        state = self.request_states.get(request.request_id)
        detokenizer = getattr(state, "detokenizer", None)
        if getattr(self, BY_TOKEN, False) and isinstance(detokenizer, BaseIncrementalDetokenizer) and detokenizer.stop:
            for part, method in ((detokenizer, update), (state.logprobs_processor, update_from_output)):
                part.__class__ = _by_token(part.__class__, method)

    return wrapper


@functools.cache
def _by_token(kind: Any, method: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Any:
    """``kind`` with ``method`` around its method of that name; ``kind`` itself if it has it already."""
    if hasattr(kind, BY_TOKEN):
        return kind
    name = method.__name__
    return type(kind.__name__, (kind,), {BY_TOKEN: True, name: method(getattr(kind, name))})


def update(original: Callable[..., str | None]) -> Callable[..., str | None]:
    """A detokenizer's ``update``: tokens that a step has after the stop string are taken off its list."""

    @functools.wraps(original)
    def wrapper(self: Any, new_token_ids: list[int], stop_terminated: bool) -> str | None:
        stop, ended = self.stop, None
        for at, token in enumerate(new_token_ids, 1):
            before = len(self.output_text)
            self.stop = []
            try:
                original(self, [token], stop_terminated and at == len(new_token_ids))
            finally:
                self.stop = stop
            if self.num_output_tokens() <= self.min_tokens:
                continue
            found = first_stop(self.output_text, before, stop)
            if found is not None:
                ended, end = found
                self.output_text = self.output_text[: end if self.include_stop_str_in_output else end - len(ended)]
                del new_token_ids[at:]
                break
        return ended

    return wrapper


def first_stop(text: str, seen: int, stop: list[str]) -> tuple[str, int] | None:
    """The stop string that ends first in ``text`` after its first ``seen`` characters, and where it ends.

    Of several that end there it is the first of the request.
    """
    from vllm.v1.engine.detokenizer import check_stop_strings

    if check_stop_strings(text, len(text) - seen, stop, False) is None:
        return None
    found = []
    for string in stop:
        match = check_stop_strings(text, len(text) - seen, [string], False)
        if match is not None:
            found.append((string, match[1] + len(string)))
    return min(found, key=lambda pair: pair[1])


def update_from_output(original: Callable[..., None]) -> Callable[..., None]:
    """``LogprobsProcessor.update_from_output``: log-probabilities of the tokens that are left."""

    @functools.wraps(original)
    def wrapper(self: Any, output: Any) -> None:
        logprobs = output.new_logprobs
        if logprobs is not None and len(logprobs.logprob_token_ids) > len(output.new_token_ids):
            output.new_logprobs = logprobs.slice_request(0, len(output.new_token_ids))
        original(self, output)

    return wrapper
