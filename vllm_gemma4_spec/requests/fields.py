"""What speculation does to every field of a request; ``docs/reference/compatibility.md`` is generated from it.

A field of vLLM 0.19.1 that is not listed here, or one listed here that is gone, fails
``tests/requests/test_fields.py``, which also follows each claim to its test.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import Enum
from pathlib import Path


class Verdict(str, Enum):
    """What becomes of a field when an engine speculates."""

    SAME = "same with speculation"
    REFUSED = "refused"
    UNTOUCHED = "not touched by it"


@dataclass(frozen=True)
class Field:
    """``shown``: the test of SAME (``folder/file::test`` of ``tests``), the error of REFUSED, the why of UNTOUCHED."""

    verdict: Verdict
    shown: str


def _same(test: str) -> Field:
    return Field(Verdict.SAME, test)


def _refused(error: str) -> Field:
    return Field(Verdict.REFUSED, error)


def _untouched(why: str) -> Field:
    return Field(Verdict.UNTOUCHED, why)


RANDOM = _same("requests/test_random_requests::test_answers_are_those_of_plain_decoding")
FEATURES = _same("engine/test_request_features::test_an_answer_is_that_of_plain_decoding")
DISTRIBUTION = _same("engine/test_sampling::test_speculative_sampling_has_the_targets_distribution")
POSITIONS = _same("requests/test_requests_engine::test_every_answer_is_that_of_plain_decoding")
SERVER = _same("requests/test_requests_server::test_every_endpoint_answers_identically_with_speculation")
DEMO = _same("chat/test_demo_server::test_streamed_is_whole_and_speculation_changes_nothing")
NO_BIAS = _refused("min_p and logit_bias sampling parameters are not yet supported with speculative decoding")
NO_STORE = _refused("VLLM_ENABLE_RESPONSES_API_STORE")
PROMPT = _untouched("decides what the prompt is, before the engine sees the request")
SHAPE = _untouched("decides how a finished answer is written, after the engine")
ROUTING = _untouched("decides when and where a request runs, or what it is called; greedy answers do not depend on it")
INTERNAL = _untouched("set by vLLM from other fields, not by a client")
IGNORED = _untouched("accepted and not read by vLLM 0.19.1")
GREEDY = _untouched("has no effect on greedy answers, and none on the distribution: see temperature")

SAMPLING_PARAMS: dict[str, Field] = {
    "n": RANDOM,
    "presence_penalty": RANDOM,
    "frequency_penalty": RANDOM,
    "repetition_penalty": RANDOM,
    "temperature": DISTRIBUTION,
    "top_p": DISTRIBUTION,
    "top_k": DISTRIBUTION,
    "min_p": NO_BIAS,
    "seed": FEATURES,
    "stop": RANDOM,
    "stop_token_ids": RANDOM,
    "ignore_eos": RANDOM,
    "max_tokens": RANDOM,
    "min_tokens": RANDOM,
    "logprobs": RANDOM,
    "prompt_logprobs": RANDOM,
    "flat_logprobs": RANDOM,
    "detokenize": RANDOM,
    "skip_special_tokens": RANDOM,
    "spaces_between_special_tokens": RANDOM,
    "include_stop_str_in_output": RANDOM,
    "output_kind": DEMO,
    "skip_clone": INTERNAL,
    "output_text_buffer_length": INTERNAL,
    "_eos_token_id": INTERNAL,
    "_all_stop_token_ids": INTERNAL,
    "structured_outputs": POSITIONS,
    "logit_bias": NO_BIAS,
    "allowed_token_ids": RANDOM,
    "extra_args": _untouched("read by plugins and KV connectors, not by sampling"),
    "bad_words": RANDOM,
    "_bad_words_token_ids": INTERNAL,
    "skip_reading_prefix_cache": RANDOM,
    "thinking_token_budget": POSITIONS,
    "repetition_detection": RANDOM,
}


def _sampling(*names: str) -> dict[str, Field]:
    return {name: SAMPLING_PARAMS[name] for name in names}


_COMMON = {
    **_sampling("n", "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "top_k"),
    **_sampling("min_p", "seed", "stop", "stop_token_ids", "ignore_eos", "max_tokens", "min_tokens", "prompt_logprobs"),
    **_sampling("skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output", "logit_bias"),
    **_sampling("structured_outputs", "allowed_token_ids", "repetition_detection"),
    "logprobs": SERVER,
    "response_format": SERVER,
    "model": ROUTING,
    "priority": ROUTING,
    "request_id": ROUTING,
    "user": IGNORED,
    "stream": SERVER,
    "stream_options": SERVER,
    "use_beam_search": _same("requests/test_requests_engine::test_beam_search_is_that_of_plain_decoding"),
    "length_penalty": _same("requests/test_requests_engine::test_beam_search_is_that_of_plain_decoding"),
    "truncate_prompt_tokens": PROMPT,
    "echo": SHAPE,
    "add_special_tokens": PROMPT,
    "return_tokens_as_token_ids": SHAPE,
    "return_token_ids": SHAPE,
    "cache_salt": ROUTING,
    "kv_transfer_params": SAMPLING_PARAMS["extra_args"],
    "vllm_xargs": SAMPLING_PARAMS["extra_args"],
}
_MULTIMODAL = {"media_io_kwargs": PROMPT, "mm_processor_kwargs": PROMPT}

CHAT_COMPLETIONS: dict[str, Field] = {
    **_COMMON,
    **_MULTIMODAL,
    "messages": PROMPT,
    "top_logprobs": SERVER,
    "max_completion_tokens": SAMPLING_PARAMS["max_tokens"],
    "tools": DEMO,
    "tool_choice": SERVER,
    "reasoning_effort": PROMPT,
    "thinking_token_budget": SERVER,
    "include_reasoning": SERVER,
    "parallel_tool_calls": _untouched("drops calls from a finished answer, after the engine"),
    "bad_words": SAMPLING_PARAMS["bad_words"],
    "add_generation_prompt": PROMPT,
    "continue_final_message": SERVER,
    "documents": PROMPT,
    "chat_template": PROMPT,
    "chat_template_kwargs": SERVER,
}

COMPLETIONS: dict[str, Field] = {
    **_COMMON,
    "prompt": PROMPT,
    "suffix": _refused("suffix is not currently supported"),
    "prompt_embeds": _refused("--enable-prompt-embeds"),
}

RESPONSES: dict[str, Field] = {
    **_sampling("temperature", "top_p", "top_k", "repetition_penalty", "seed", "stop", "ignore_eos", "logit_bias"),
    **_sampling("skip_special_tokens", "include_stop_str_in_output", "structured_outputs"),
    **{name: _COMMON[name] for name in ("model", "stream", "user", "request_id", "priority", "cache_salt")},
    **{name: _COMMON[name] for name in ("vllm_xargs", "kv_transfer_params")},
    **_MULTIMODAL,
    "background": NO_STORE,
    "include": SERVER,
    "input": PROMPT,
    "instructions": PROMPT,
    "max_output_tokens": SAMPLING_PARAMS["max_tokens"],
    "max_tool_calls": IGNORED,
    "metadata": SHAPE,
    "parallel_tool_calls": CHAT_COMPLETIONS["parallel_tool_calls"],
    "previous_response_id": PROMPT,
    "prompt": _refused("prompt template is not supported"),
    "reasoning": PROMPT,
    "service_tier": IGNORED,
    "store": ROUTING,
    "text": SERVER,
    "tool_choice": SERVER,
    "tools": SERVER,
    "top_logprobs": SERVER,
    "truncation": PROMPT,
    "prompt_cache_key": IGNORED,
    "enable_response_messages": SHAPE,
    "previous_input_messages": PROMPT,
}

MESSAGES: dict[str, Field] = {
    **_sampling("temperature", "top_p", "top_k", "max_tokens"),
    "model": ROUTING,
    "messages": PROMPT,
    "metadata": IGNORED,
    "stop_sequences": SERVER,
    "stream": SERVER,
    "system": PROMPT,
    "tool_choice": SERVER,
    "tools": SERVER,
    "kv_transfer_params": SAMPLING_PARAMS["extra_args"],
}

# Class of vLLM -> its fields.
MODELS: dict[str, dict[str, Field]] = {
    "vllm.sampling_params:SamplingParams": SAMPLING_PARAMS,
    "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionRequest": CHAT_COMPLETIONS,
    "vllm.entrypoints.openai.completion.protocol:CompletionRequest": COMPLETIONS,
    "vllm.entrypoints.openai.responses.protocol:ResponsesRequest": RESPONSES,
    "vllm.entrypoints.anthropic.protocol:AnthropicMessagesRequest": MESSAGES,
}
HEADINGS = dict(
    zip(MODELS, ("`SamplingParams`", "chat completions", "completions", "responses", "messages"), strict=True)
)


START, END = "<!-- generated: make fields -->\n", "<!-- end of what is generated -->"


def page() -> str:
    """The section of ``docs/reference/compatibility.md``."""
    lines = []
    for verdict in Verdict:
        lines += [f"**{verdict.value.capitalize()}**", "", "| request | fields | shown by |", "|---|---|---|"]
        for model, fields in MODELS.items():
            by_reason: dict[str, list[str]] = {}
            for name, field in fields.items():
                if field.verdict is verdict:
                    by_reason.setdefault(field.shown, []).append(f"`{name}`")
            shown = {r: f"`tests/{r.replace('::', '.py::')}`" if verdict is Verdict.SAME else r for r in by_reason}
            lines += [f"| {HEADINGS[model]} | {', '.join(names)} | {shown[r]} |" for r, names in by_reason.items()]
        lines.append("")
    return "\n".join(lines)


def write(path: Path) -> None:
    """Put :func:`page` between the marks of a page."""
    before, _, rest = path.read_text().partition(START)
    path.write_text(f"{before}{START}\n{page()}{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
