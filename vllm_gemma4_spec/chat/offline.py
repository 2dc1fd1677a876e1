"""Reasoning, content and tool calls of outputs that ``LLM.chat`` or ``LLM.generate`` returned."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vllm_gemma4_spec.chat.detokenize import TextStream
from vllm_gemma4_spec.chat.machine import Options, OutputParser, Tools
from vllm_gemma4_spec.chat.results import Choice, Message
from vllm_gemma4_spec.chat.tokens import Vocabulary, vocabulary


def parse_output(
    output: Any,
    tokenizer: Any,
    *,
    tools: bool = True,
    skip_special_tokens: bool = True,
    include_stop_str_in_output: bool = False,
) -> list[Message]:
    """Parse one ``RequestOutput``, as the servers do; one message per completion, in order.

    Args:
        output: ``vllm.RequestOutput`` with its prompt token ids.
        tokenizer: ``llm.get_tokenizer()``.
        tools: read tool calls; without, what stands in them is content.
        skip_special_tokens: as in the request's ``SamplingParams``.
        include_stop_str_in_output: as in the request's ``SamplingParams``.

    Raises:
        TokenizerError: the tokenizer is not Gemma 4's.

    Example::

        for output in llm.chat(conversations, params, tools=tools):
            (message,) = parse_output(output, llm.get_tokenizer())
    """
    known = vocabulary(tokenizer)
    messages = []
    for completion in output.outputs:
        options = Options(
            tools=Tools.AUTO if tools else Tools.OFF,
            special_text=not skip_special_tokens,
            include_stop=include_stop_str_in_output,
        )
        choice = Choice(OutputParser(known, options, output.prompt_token_ids or ()), calls_finish=True)
        tail = ""
        if isinstance(completion.stop_reason, str):
            completion, tail = _stopped(completion, known, options)
        messages.append(choice.message(completion, tail))
    return messages


def _stopped(completion: Any, known: Vocabulary, options: Options) -> tuple[Any, str]:
    """A completion whose tokens end before the one in which the engine cut its text, and the text of that one.

    ``LLM`` searches stop strings in all text, which knows nothing of marks and labels.
    """
    stream, texts, at = TextStream(known), [], 0
    for token in completion.token_ids:
        if token in known.special:
            texts.append(stream.flush() + (known.special[token] if options.special_text else ""))
        else:
            texts.append(stream.push(token))
    whole, stop = "".join(texts) + stream.flush(), completion.stop_reason
    shown = len(stop) if options.include_stop else 0
    ends = [i + shown for i in range(len(whole)) if whole.startswith(stop, i)]
    # The engine may have ignored earlier occurrences (`min_tokens`).
    end = min(ends, key=lambda i: abs(i - len(completion.text)), default=len(whole))
    for count, text in enumerate(texts):
        if at + len(text) > end:
            return replace(completion, token_ids=completion.token_ids[:count]), text[: end - at]
        at += len(text)
    return completion, ""
