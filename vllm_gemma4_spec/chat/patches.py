"""Chat output of Gemma 4. The reasons in full: docs/explanation/chat-output.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_gemma4_spec.patching.patch import Edit, Group, Lazy, Patch

if TYPE_CHECKING:
    from vllm_gemma4_spec.chat import (
        completions,
        errors,
        messages,
        responses,
        responses_input,
        seen_detokenizer,
        startup,
    )
else:  # a wrapper's module is imported only after the module of vLLM that it patches
    completions = Lazy("vllm_gemma4_spec.chat.completions")
    errors = Lazy("vllm_gemma4_spec.chat.errors")
    messages = Lazy("vllm_gemma4_spec.chat.messages")
    responses = Lazy("vllm_gemma4_spec.chat.responses")
    responses_input = Lazy("vllm_gemma4_spec.chat.responses_input")
    seen_detokenizer = Lazy("vllm_gemma4_spec.chat.seen_detokenizer")
    startup = Lazy("vllm_gemma4_spec.chat.startup")

_CHAT = "vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat"
_BATCH = "vllm.entrypoints.openai.chat_completion.batch_serving:OpenAIServingChatBatch"
_MESSAGES = "vllm.entrypoints.anthropic.serving:AnthropicServingMessages"
_SERVING = "vllm.entrypoints.openai.engine.serving:OpenAIServing"
_RENDER = "vllm.entrypoints.serve.render.serving:OpenAIServingRender"
_TOKENIZATION = "vllm.entrypoints.serve.tokenize.serving:OpenAIServingTokenization"
_SERVING_RESPONSES = "vllm.entrypoints.openai.responses.serving:OpenAIServingResponses"

CHAT_OUTPUT = Patch(
    name="chat-output",
    group=Group.CORRECTNESS,
    why=(
        "The parsers named gemma4 look for control tokens in text, one per delta. With speculation a delta holds "
        "several tokens: `<|channel>` and `thought` leak into answers and tool calls come out as text. What clients "
        "send back loses reasoning and names of tools, and switches of thinking do nothing."
    ),
    how=(
        "One state machine on token ids per choice, fed before vLLM's generators; they get deltas and messages "
        "ready made; its text is the one that stop strings are searched in. Requests are completed before templates "
        "see them. Active only where the parsers of the server are gemma4 (either or both)."
    ),
    retire="vLLM's own parsers on token ids (vllm/parser/gemma4.py), released after 0.19.",
    scope="Servers whose reasoning or tool parser is gemma4.",
    related="#41991, #52430; a parser on token ids is in 0.24.0",
    edits=(
        Edit(f"{_RENDER}.__init__", startup.render_init),
        Edit(f"{_RENDER}.preprocess_chat", startup.preprocess_chat),
        Edit(f"{_RENDER}.render_chat", startup.history_errors),
        Edit(f"{_BATCH}.render_batch_chat_request", startup.render_batch),
        Edit(f"{_TOKENIZATION}.create_tokenize", startup.history_errors),
        Edit(f"{_SERVING}._parse_tool_calls_from_content", completions.parsed_calls),
        Edit(f"{_CHAT}.chat_completion_stream_generator", completions.stream_generator),
        Edit(f"{_CHAT}.chat_completion_full_generator", completions.full_generator),
        Edit(f"{_BATCH}.chat_completion_full_generator_batch", completions.batch_full_generator),
        Edit("vllm.v1.engine.detokenizer:IncrementalDetokenizer.from_new_request", seen_detokenizer.from_new_request),
        Edit("vllm.entrypoints.openai.api_server:build_app", responses_input.build_app),
        Edit(f"{_SERVING_RESPONSES}.create_responses", startup.history_errors),
        Edit(f"{_SERVING_RESPONSES}._make_request", responses_input.make_request),
        Edit(f"{_MESSAGES}.create_messages", messages.create_messages),
        Edit(f"{_MESSAGES}.count_tokens", messages.count_tokens),
        Edit(f"{_MESSAGES}._convert_anthropic_to_openai_request", messages.convert_request),
        Edit(f"{_MESSAGES}.messages_full_converter", messages.full_converter),
        Edit(f"{_MESSAGES}.message_stream_converter", messages.stream_converter),
        Edit(f"{_SERVING_RESPONSES}._process_simple_streaming_events", responses.streaming_events),
        Edit(f"{_SERVING_RESPONSES}.responses_full_generator", responses.full_generator),
        Edit(f"{_SERVING_RESPONSES}._make_response_output_items", responses.output_items),
    ),
    watches=(
        "vllm.reasoning.gemma4_reasoning_parser:Gemma4ReasoningParser",
        "vllm.tool_parsers.gemma4_tool_parser:Gemma4ToolParser",
        "vllm.entrypoints.openai.responses.context:SimpleContext",
        "vllm.v1.engine.detokenizer:BaseIncrementalDetokenizer",
    ),
)

ERROR_PATHS = Patch(
    name="error-paths",
    group=Group.CONVENIENCE,
    why="With a current FastAPI, the answer to a request that does not validate says in which file of the server the "
    "endpoint stands: where Python is installed, and what.",
    how="The handler of validation errors drops the file from the error before it is written; the rest stays.",
    retire="A release that writes its own message for validation errors.",
    scope="Servers of engines with a Gemma 4 as target or drafter.",
    related="none found",
    edits=(
        Edit(
            "vllm.entrypoints.openai.api_server:validation_exception_handler",
            errors.validation_exception_handler,
            source="vllm.entrypoints.openai.server_utils:validation_exception_handler",
        ),
    ),
    watches=("vllm.entrypoints.openai.api_server:build_app",),
)

PATCHES: tuple[Patch, ...] = (CHAT_OUTPUT, ERROR_PATHS)
