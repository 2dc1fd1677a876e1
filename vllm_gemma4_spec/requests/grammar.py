"""A grammar that knows where in the output it begins and ends."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar


class PositionedGrammar(StructuredOutputGrammar):
    """A backend's grammar for the tokens from the end of the reasoning to the end of the sequence.

    vLLM fills bitmasks, validates drafts and advances a grammar token by token or step by step; each of these calls may
    now reach across the token that ends the reasoning. Tokens up to and with it are free, and so are those after an end
    of sequence (``ignore_eos``). The backend's grammar sees what lies between, and nothing else.

    Args:
        inner: the backend's grammar, at its beginning.
        end_of_reasoning: id of the token after which it begins; None: it begins with the first token.
        eos: id of the token that ends the sequence, in every backend the tokenizer's.
        words: int32 words of a bitmask.
    """

    def __init__(self, inner: StructuredOutputGrammar, end_of_reasoning: int | None, eos: int, words: int) -> None:
        self._inner = inner
        self._end_of_reasoning = end_of_reasoning
        self._eos = eos
        self._words = words
        self._begun = end_of_reasoning is None
        self._taken = 0  # tokens that the backend's grammar has accepted
        self._ended = False  # an end of sequence has come since
        self._end_is_free = False  # the backend did not see the end itself
        self._free = 0  # tokens that it did not see after them: those after the end, or from the end on

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        """Advance by ``tokens``; False if the backend rejects one, which ends the advance before it."""
        return all(self._accept(request_id, token) for token in tokens)

    def _accept(self, request_id: str, token: int) -> bool:
        if not self._begun:
            self._begun = token == self._end_of_reasoning
            return True
        if self._ended:
            self._free += 1
            return True
        if self._inner.accept_tokens(request_id, [token]):
            self._taken += 1
            self._ended = token == self._eos
            return True
        # Of what the backend rejects: outlines puts the end of sequence into a mask and does not accept it.
        if token != self._eos or not self._allows(token):
            return False
        self._free = 1
        self._ended = self._end_is_free = True
        return True

    def _allows(self, token: int) -> bool:
        mask = torch.zeros(1, self._words, dtype=torch.int32)
        self._inner.fill_bitmask(mask, 0)
        return bool(mask[0, token // 32] >> token % 32 & 1)

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        """The longest prefix of ``tokens`` that would be accepted; nothing is advanced."""
        if self._ended:
            return tokens
        if self._begun:
            return self._inner.validate_tokens(tokens)
        if self._end_of_reasoning not in tokens:
            return tokens
        begin = tokens.index(self._end_of_reasoning) + 1
        return tokens[:begin] + self._inner.validate_tokens(tokens[begin:])

    def rollback(self, num_tokens: int) -> None:
        free = min(num_tokens, self._free)
        taken = min(num_tokens - free, self._taken)
        self._free -= free
        if self._end_is_free and not self._free:
            self._ended = self._end_is_free = False
        if taken:
            self._inner.rollback(taken)
            self._taken -= taken
            self._ended = False
        if num_tokens > free + taken:  # the end of reasoning is among them
            self._begun = self._end_of_reasoning is None

    def fill_bitmask(self, bitmask: Any, batch_index: int) -> None:
        """
        Args:
            bitmask: int32 tensor, (rows, vocabulary / 32).
            batch_index: its row for the next token.
        """
        if self._begun and not self._ended:
            self._inner.fill_bitmask(bitmask, batch_index)
        else:
            bitmask[batch_index].fill_(-1)

    def is_terminated(self) -> bool:
        return self._ended

    def reset(self) -> None:
        raise NotImplementedError("vLLM 0.19.1 resets no grammar, and xgrammar's would stay terminated")
