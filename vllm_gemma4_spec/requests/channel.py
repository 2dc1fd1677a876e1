"""Whether a prompt leaves the model a reasoning channel to open."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.reasoning.gemma4_reasoning_parser import Gemma4ReasoningParser

HEADER = "model\n"  # what follows <|turn> where the model is to answer


class PromptReader:
    """Reads the end of a prompt, with the token ids of a server's tokenizer."""

    def __init__(self, reasoner: Gemma4ReasoningParser, tokenizer: Any) -> None:
        self._reasoner = reasoner
        self._think = reasoner.vocab["<|think|>"]
        self._results_end = reasoner.vocab["<tool_response|>"]
        self._header: list[int] = tokenizer.encode(HEADER, add_special_tokens=False)

    def reasoning_is_over(self, prompt: Sequence[int]) -> bool:
        """Whether the answer begins with content: the prompt has closed the channel, or leaves none to open.

        The model opens a channel only where ``<|think|>`` asks it to, and then first thing in its turn or after
        a tool's results.

        Args:
            prompt: token ids.
        """
        if self._reasoner.is_reasoning_end(prompt):
            return True
        at = next(
            (
                i
                for i in range(len(prompt) - 1, -1, -1)
                if prompt[i]
                in (
                    self._reasoner.start_token_id,
                    self._reasoner.new_turn_token_id,
                    self._reasoner.tool_response_token_id,
                )
            ),
            None,
        )
        if at is not None and prompt[at] == self._reasoner.start_token_id:
            return False
        if at is None or self._think not in prompt:
            return True
        rest = list(prompt[at + 1 :])
        if prompt[at] == self._reasoner.new_turn_token_id:
            return rest != self._header[: len(rest)]
        return bool(rest) and rest[-1] != self._results_end
