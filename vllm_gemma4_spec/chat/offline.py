"""Reasoning, content and tool calls of outputs that ``LLM.chat`` or ``LLM.generate`` returned."""

from __future__ import annotations

from typing import Any

from vllm_gemma4_spec.chat.machine import Options, OutputParser, Tools
from vllm_gemma4_spec.chat.results import Choice, Message
from vllm_gemma4_spec.chat.tokens import vocabulary


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
        # The stop strings that did not match are of no consequence once the output is whole.
        stop = (completion.stop_reason,) if isinstance(completion.stop_reason, str) else ()
        options = Options(
            tools=Tools.AUTO if tools else Tools.OFF,
            special_text=not skip_special_tokens,
            stop=stop,
            include_stop=include_stop_str_in_output,
        )
        parser = OutputParser(known, options, output.prompt_token_ids or ())
        messages.append(Choice(parser, calls_finish=True).message(completion))
    return messages
