"""What an engine's output becomes: pieces of one kind each, and whole messages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm_gemma4_spec.chat.machine import OutputParser, Piece


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
        if piece.kind == "reasoning":
            self.reasoning += piece.text
        elif piece.kind == "content":
            self.content += piece.text
        arguments: list[str] = []
        for event in piece.calls:
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
        parser, token_ids = self._parser, output.token_ids
        if output.finish_reason is None:
            return parser.read(token_ids)
        if isinstance(output.stop_reason, str):
            parser.stopped(output.stop_reason, self._engine_length)
        elif output.finish_reason == "stop" and token_ids and output.stop_reason in (None, token_ids[-1]):
            # The last token is no text: the end of sequence, or one of `stop_token_ids`. Beam search names the end
            # of sequence and has taken it off.
            return parser.read(token_ids[:-1], ended=True, last=token_ids[-1])
        return parser.read(token_ids, ended=True, cut=output.finish_reason != "stop")

    def _pieces_with(self, output: Any, tail: str) -> list[Piece]:
        return self._parser.read(output.token_ids) + self._parser.read_text(tail)

    def finish_reason(self, engine: str | None) -> str | None:
        """The finish reason for the client, given the engine's."""
        if engine in ("stop", "length") and self._calls_finish and self._parser.calls_whole:
            return "tool_calls"
        return engine

    def message(self, output: Any, tail: str = "") -> Message:
        """Parse a whole output at once; ``tail`` is text behind its last token."""
        message = Message()
        for piece in self._pieces_with(output, tail) if tail else self.pieces(output):
            message.add(piece)
        message.finish_reason = self.finish_reason(output.finish_reason)
        return message
