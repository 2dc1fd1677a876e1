"""What an engine's output becomes: pieces of one kind each, and whole messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_gemma4_spec.chat.machine import Event, Kind, OutputParser


@dataclass(slots=True)
class Piece:
    """Consecutive events of one kind, and how many tokens brought them about.

    A token that brings nothing about counts for the piece that follows; one that ends a piece and begins the
    next counts for the first. ``kind`` is None where all tokens of a delta brought nothing about.
    """

    kind: Kind | None = None
    tokens: int = 0
    events: list[Event] = field(default_factory=list)

    @property
    def text(self) -> str:
        return self.events[0].text if len(self.events) == 1 else "".join(e.text for e in self.events)


@dataclass
class ToolCall:
    """One call; ``arguments`` is a JSON object, what was read of it if the call was ``cut``."""

    name: str
    arguments: str = ""
    cut: bool = False


@dataclass
class Message:
    """One whole output. ``finish_reason`` is ``tool_calls`` where every call was read to its end."""

    reasoning: str = ""
    content: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, piece: Piece) -> None:
        if piece.kind is Kind.REASONING:
            self.reasoning += piece.text
        elif piece.kind is Kind.CONTENT:
            self.content += piece.text
        arguments: list[str] = []
        for event in piece.events if piece.kind is Kind.CALL else ():
            if event.name:
                self._arguments(arguments)
                self.tool_calls.append(ToolCall(event.name))
            arguments.append(event.text)
            self.tool_calls[-1].cut |= event.cut
        self._arguments(arguments)

    def _arguments(self, texts: list[str]) -> None:
        if texts:
            self.tool_calls[-1].arguments += "".join(texts)
            texts.clear()


class Choice:
    """One choice of a request: its parser, fed with the engine's ``CompletionOutput`` s as they come."""

    def __init__(self, parser: OutputParser, calls_finish: bool) -> None:
        """
        Args:
            parser: fresh.
            calls_finish: whole calls make the finish reason ``tool_calls`` (not so for a named function).
        """
        self._parser = parser
        self._calls_finish = calls_finish
        self._engine_length = 0

    def pieces(self, output: Any) -> list[Piece]:
        """Parse the next part of the output; at least one piece, in order.

        Args:
            output: ``CompletionOutput`` with the new tokens only (or all at once).
        """
        self._engine_length += len(output.text)
        parser, token_ids, finish = self._parser, output.token_ids, output.finish_reason
        last: int | None = None
        if finish is not None:
            if isinstance(output.stop_reason, str):
                parser.stopped(output.stop_reason, self._engine_length)
            elif finish == "stop" and token_ids:
                # The last token is no text: the end of sequence, or one of `stop_token_ids`.
                last, token_ids = token_ids[-1], token_ids[:-1]
        plain = parser.plain(token_ids)
        if plain is None:
            pieces, quiet = self._fed(token_ids)
        else:
            pieces, quiet = [Piece(plain[0].kind if plain else None, len(token_ids), plain)], 0
        if finish is not None:
            events = parser.finish(last)
            quiet += last is not None
            if events:
                self._append(pieces, events, quiet)
                quiet = 0
        pieces[-1].tokens += quiet
        return pieces

    def _fed(self, token_ids: Sequence[int]) -> tuple[list[Piece], int]:
        """The pieces of tokens fed one by one, and how many of the last brought nothing about."""
        pieces, quiet = [Piece()], 0
        for token in token_ids:
            events = self._parser.feed(token)
            if events:
                self._append(pieces, events, quiet + 1)
                quiet = 0
            else:
                quiet += 1
        return pieces, quiet

    @staticmethod
    def _append(pieces: list[Piece], events: list[Event], tokens: int) -> None:
        piece = pieces[-1]
        for event in events:
            if piece.kind is not event.kind:
                if piece.kind is not None:
                    piece = Piece()
                    pieces.append(piece)
                piece.kind = event.kind
            piece.events.append(event)
            piece.tokens += tokens
            tokens = 0

    def finish_reason(self, engine: str | None) -> str | None:
        """The finish reason for the client, given the engine's."""
        if engine in ("stop", "length") and self._calls_finish and self._parser.calls_whole:
            return "tool_calls"
        return engine

    def message(self, output: Any) -> Message:
        """Parse a whole output at once."""
        message = Message()
        for piece in self.pieces(output):
            message.add(piece)
        message.finish_reason = self.finish_reason(output.finish_reason)
        return message
