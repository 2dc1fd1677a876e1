"""Token ids to text, piece by piece, between control tokens."""

from __future__ import annotations

import codecs
from typing import Any

from tokenizers.decoders import DecodeStream

from vllm_gemma4_spec.chat.tokens import Vocabulary


class TextStream:
    """Decodes ordinary tokens one at a time; the pieces join to what decoding them together gives.

    A character whose bytes are spread over several tokens comes out with its last byte. Bytes that never
    become a character come out as U+FFFD, at :meth:`flush` at the latest.
    """

    # Decodes what came since the last token with a text of its own: bytes, or other tokens.
    _stream: Any = None
    _pending: tuple[int, ...] = ()  # fed to a DecodeStream, but no text yet

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary

    @property
    def waits(self) -> bool:
        """A character may be open."""
        return self._stream is not None

    def push(self, token_id: int) -> str:
        """The text that ``token_id`` completes; empty if a character is still open."""
        known = self._vocabulary
        text = known.texts[token_id]
        if text is not None:
            return text if self._stream is None else self.flush() + text
        if known.one_by_one:
            self._stream = self._stream or codecs.getincrementaldecoder("utf-8")("replace")
            return str(self._stream.decode(known.byte(token_id)))
        self._stream = self._stream or DecodeStream(skip_special_tokens=False)
        try:
            text = self._stream.step(known.core, token_id)
        except Exception:
            # DecodeStream gives up where a byte spoils a character it has already given out
            # (vLLM issue 17448): start over with that byte, as vLLM's own detokenizer does.
            text = self.flush()
            self._stream = DecodeStream(skip_special_tokens=False)
            return text + (self._stream.step(known.core, token_id) or self._hold(token_id))
        if text is None:
            return self._hold(token_id)
        self._pending = ()
        return str(text)

    def _hold(self, token_id: int) -> str:
        self._pending += (token_id,)
        # A character has four bytes at most: what is still open after more will never be one, and
        # DecodeStream would decode it all again with every token.
        return self.flush() if len(self._pending) > 4 else ""

    def cut(self) -> str:
        """The text of what was not given out yet where the output was cut: no character is half shown."""
        return self.flush().rstrip("\ufffd")

    def flush(self) -> str:
        """The text of an unfinished character, and a fresh start for the next token."""
        stream, pending = self._stream, self._pending
        self._stream, self._pending = None, ()
        if pending:
            return str(self._vocabulary.core.decode(list(pending), skip_special_tokens=False))
        return str(stream.decode(b"", final=True)) if isinstance(stream, codecs.IncrementalDecoder) else ""
