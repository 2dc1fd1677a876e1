"""Whether an answer begins with content, by how its prompt ends."""

from __future__ import annotations

import pytest

from tests.support import engine as _engine  # sets the environment
from tests.support import scripted

assert _engine

ASKED = "<|turn>system\n<|think|><turn|>\n<|turn>user\nAnna<turn|>\n"
PLAIN = "<|turn>user\nAnna<turn|>\n"


@pytest.mark.parametrize(
    ("prompt", "over"),
    [
        (ASKED + "<|turn>model\n", False),
        (PLAIN + "<|turn>model\n", True),  # nobody asked for reasoning
        (ASKED + "<|turn>model\nBen", True),  # the answer has begun
        (ASKED + "<|turn>model\n<|channel>thought\nBen", False),
        (PLAIN + "<|turn>model\n<|channel>thought\nBen", False),  # open all the same
        (ASKED + "<|turn>model\n<|channel>thought\nBen<channel|>", True),
        (ASKED + "<|turn>model\n<|tool_response>Ben<tool_response|>", False),
        (ASKED + "<|turn>model\n<|tool_response>Ben<tool_response|>Ben", True),
        ("Anna", True),
    ],
)
def test_a_prompt_leaves_a_channel_to_open_or_does_not(prompt: str, over: bool) -> None:
    from vllm.reasoning.gemma4_reasoning_parser import Gemma4ReasoningParser

    from vllm_gemma4_spec.requests.channel import PromptReader

    tokenizer = scripted.tokenizer()
    reader = PromptReader(Gemma4ReasoningParser(tokenizer), tokenizer)
    assert reader.reasoning_is_over(tokenizer.encode(prompt, add_special_tokens=False)) is over
