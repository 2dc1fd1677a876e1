"""Wrappers around ``StructuredOutputManager``: each request's grammar begins where its reasoning ends."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm.reasoning.gemma4_reasoning_parser import Gemma4ReasoningParser

from vllm_gemma4_spec.requests.channel import PromptReader
from vllm_gemma4_spec.scope import gemma4_model

# Attribute of a manager: its PromptReader, None without Gemma 4's reasoning parser, absent outside the scope.
READER = "_gemma4_spec_reader"
# Attribute of a StructuredOutputRequest: id of the token that its grammar waits for, or None.
WAITS_FOR = "_gemma4_spec_waits_for"


def manager_init(original: Callable[..., None]) -> Callable[..., None]:
    """``StructuredOutputManager.__init__``: in a Gemma 4 engine, be ready to read prompts.

    Patch: ``grammar-positions``. Evidence:
    ``tests/requests/test_requests_engine.py::test_stock_vllm_forgets_grammar_budget_and_stop_strings``. Related
    upstream change: #44297, #44993, #50938.
    """

    @functools.wraps(original)
    def __init__(self: Any, vllm_config: Any) -> None:
        original(self, vllm_config)
        reasoner = self.reasoner
        if not gemma4_model(vllm_config.model_config):
            return
        if isinstance(reasoner, Gemma4ReasoningParser):
            setattr(self, READER, PromptReader(reasoner, self.tokenizer))
        elif reasoner is None:
            setattr(self, READER, None)

    return __init__


def grammar_init(original: Callable[..., None]) -> Callable[..., None]:
    """``grammar_init``: decide from the prompt what the grammar waits for, and leave the waiting to it.

    The manager's own flag, which holds for whole steps, says from the start that reasoning has ended.

    Patch: ``grammar-positions``. Evidence:
    ``tests/requests/test_requests_engine.py::test_stock_vllm_forgets_grammar_budget_and_stop_strings``. Related
    upstream change: #44297, #44993, #50938.
    """

    @functools.wraps(original)
    def wrapper(self: Any, request: Any) -> None:
        structured = request.structured_output_request
        reader = getattr(self, READER, None)
        if structured is not None and reader is not None and not self.enable_in_reasoning:
            # An embedded prompt cannot be read: it waits, as in vLLM.
            prompt = request.prompt_token_ids
            over = structured.reasoning_ended or (prompt is not None and reader.reasoning_is_over(prompt))
            setattr(structured, WAITS_FOR, None if over else self.reasoner.end_token_id)
            structured.reasoning_ended = True
        original(self, request)

    return wrapper


def create_grammar(original: Callable[..., Any]) -> Callable[..., Any]:
    """``_create_grammar``, in a thread of its own: the backend's grammar, put where it belongs.

    Patch: ``grammar-positions``. Evidence:
    ``tests/requests/test_requests_engine.py::test_stock_vllm_forgets_grammar_budget_and_stop_strings``. Related
    upstream change: #44297, #44993, #50938.
    """

    @functools.wraps(original)
    def wrapper(self: Any, request: Any) -> Any:
        grammar = original(self, request)
        if not hasattr(self, READER):
            return grammar
        # Its base class lies in the package whose import asks for this wrapper.
        from vllm_gemma4_spec.requests.grammar import PositionedGrammar

        waits_for = getattr(request.structured_output_request, WAITS_FOR, None)
        words = self.backend.allocate_token_bitmask(1).shape[1]
        return PositionedGrammar(grammar, waits_for, self.tokenizer.eos_token_id, words)

    return wrapper
