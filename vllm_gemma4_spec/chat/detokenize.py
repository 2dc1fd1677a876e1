"""Token ids to text, piece by piece, between control tokens."""

from __future__ import annotations

import codecs
from typing import Any

from tokenizers.decoders import DecodeStream

from vllm_gemma4_spec.chat.tokens import Vocabulary


class TextStream:
    """Decodes ordinary tokens one at a time; the pieces join to what decoding them together gives.

    A character whose bytes are spread over several tokens comes out with its last byte. Bytes that never
    become a character come out as U+FFFD, at :meth:`flush` at the latest: nothing is dropped.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._texts = vocabulary.texts
        self._core = vocabulary.core
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        # Decodes what came since the last token with a text of its own: bytes, or other tokens.
        self._stream: Any = None
        self._pending: list[int] = []  # fed to a DecodeStream, but no text yet

    @property
    def waits(self) -> bool:
        """A character may be open."""
        return self._stream is not None

    def push(self, token_id: int) -> str:
        """The text that ``token_id`` completes; empty if a character is still open."""
        text = self._texts.get(token_id) or self._vocabulary.text(token_id)
        if text is not None:
            return text if self._stream is None else self.flush() + text
        if self._vocabulary.one_by_one:
            self._stream = self._bytes
            return self._bytes.decode(self._vocabulary.byte(token_id))
        if self._stream is None:
            self._stream = DecodeStream(skip_special_tokens=False)
        try:
            text = self._stream.step(self._core, token_id)
        except Exception:
            # DecodeStream gives up where a byte spoils a character it has already given out
            # (vLLM issue 17448): start over with that byte, as vLLM's own detokenizer does.
            text = self.flush()
            self._stream = DecodeStream(skip_special_tokens=False)
            return text + (self._stream.step(self._core, token_id) or self._hold(token_id))
        if text is None:
            return self._hold(token_id)
        self._pending.clear()
        return str(text)

    def _hold(self, token_id: int) -> str:
        self._pending.append(token_id)
        # A character has four bytes at most: what is still open after more will never be one, and
        # DecodeStream would decode it all again with every token.
        return self.flush() if len(self._pending) > 4 else ""

    def flush(self) -> str:
        """The text of an unfinished character, and a fresh start for the next token."""
        text = self._bytes.decode(b"", final=True)
        if self._pending:
            text += self._core.decode(self._pending, skip_special_tokens=False)
        self._pending.clear()
        self._stream = None
        return text
