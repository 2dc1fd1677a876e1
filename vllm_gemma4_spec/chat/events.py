"""What a parser finds in an output, and what of it a user sees as text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

Kind = Literal["reasoning", "content", "call"]


class Event(NamedTuple):
    """A piece of output. For a call, ``call`` counts from 0; its first event has ``name`` and no text,
    the texts of the others join to its arguments as one JSON object; ``cut`` comes last, if the call was
    not read to its end."""

    kind: Kind
    text: str
    call: int = -1
    name: str = ""
    cut: bool = False


BOUNDARY = "\ufffc"  # OBJECT REPLACEMENT CHARACTER: something else stands here


class SeenText:
    """The text of an answer, in which stop strings are searched.

    It is the content: :data:`BOUNDARY` stands where reasoning or a call does, so that no stop string matches across.
    Reasoning, channel marks, labels and the syntax of calls are not in it.
    """

    kind: Kind | None = None  # of the last event

    def add(self, event: Event) -> str:
        """The text that ``event`` adds."""
        text = event.text if event.kind == "content" else ""
        if event.kind != self.kind:
            text = text if self.kind is None else BOUNDARY + text
            self.kind = event.kind
        return text

    def add_all(self, events: Iterable[Event]) -> str:
        return "".join(map(self.add, events))
