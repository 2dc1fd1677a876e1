"""Stop strings are searched in content: not in reasoning, a mark, a label or a call.

The engine decides when one has matched. ``seen_detokenizer.py`` has it search the text that a
:class:`~vllm_gemma4_spec.chat.events.SeenText` makes of the output; it does not say at which token, so the newest
characters are held back here until they cannot be part of a match any more.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_gemma4_spec.chat.events import Event, Kind, SeenText


class StopGuard:
    """Holds back the last ``max(len(stop)) - 1`` characters of the text that is newest.

    What comes before a change of kind is certain: no stop string matches across.
    """

    def __init__(self, stop: Sequence[str], include: bool) -> None:
        self._width = max(map(len, stop)) - 1
        self._include = include
        self._seen = SeenText()
        self._length = 0  # characters of the seen text, as far as it was let through
        self._text = ""  # held, all of `kind`
        self._kind: Kind = "content"
        self._matched: str | None = None
        self._engine_length = 0
        self._last: list[Event] = []  # everything since it matched

    def stopped(self, matched: str, engine_length: int) -> None:
        """The events still to come are the last, and ``matched`` is in their text or in what is held.

        Args:
            matched: the stop string.
            engine_length: characters of seen text that the engine gave out in all; it may have ignored earlier
                occurrences (``min_tokens``), so the one nearest to its own cut is taken.
        """
        self._matched = matched
        self._engine_length = engine_length

    def takes(self, kind: Kind) -> bool:
        """Nothing but text of ``kind`` is held, and no stop string has matched: :meth:`push_text` may be called.

        An output may begin with content, too.
        """
        if self._matched is not None:
            return False
        return self._kind == kind and (self._seen.kind or "content") == kind

    def push_text(self, text: str) -> str:
        """Take text of the kind that came last, as :meth:`push` would; returns what is certain now."""
        if self._kind == "reasoning":
            return text  # no stop string is searched in it
        if text and self._seen.kind is None:
            self._seen.kind = "content"
        text = self._text + text
        sure = len(text) - self._width
        if sure <= 0:
            self._text = text
            return ""
        self._text = text[sure:]
        self._length += sure
        return text[:sure]

    def push(self, event: Event) -> list[Event]:
        """Take one event; returns those that are certain now."""
        if self._matched is not None:
            self._last.append(event)
            return []
        out = []
        if event.kind != self._seen.kind:
            if self._text:
                out.append(Event(self._kind, self._text))
                self._length += len(self._text)
                self._text = ""
            self._length += self._seen.kind is not None
            self._seen.kind = event.kind
        if event.kind == "call":
            out.append(event)
            return out
        self._kind = event.kind
        text = self.push_text(event.text)
        if text:
            out.append(Event(event.kind, text))
        return out

    def finish(self) -> list[Event]:
        """The output has ended: everything held, up to the stop string that matched, if one did."""
        held = [Event(self._kind, self._text)] if self._text else []
        if self._matched is None:
            return held
        held += self._last
        # The events of `_last` may begin with a change of kind; those held are of the kind that came last.
        seen = SeenText()
        seen.kind = self._seen.kind
        texts = [seen.add(event) for event in held]
        begin = self._nearest("".join(texts))
        end = begin + (len(self._matched) if self._include else 0)
        return _until(held, texts, end, calls_at_end=not self._include)

    def _nearest(self, text: str) -> int:
        """Where the occurrence that the engine found begins in ``text``."""
        assert self._matched is not None
        wanted = self._engine_length - self._length - (len(self._matched) if self._include else 0)
        begins = []
        at = text.find(self._matched)
        while at >= 0:
            begins.append(at)
            at = text.find(self._matched, at + 1)
        return min(begins, key=lambda begin: abs(begin - wanted)) if begins else len(text)


def _until(events: list[Event], texts: list[str], end: int, calls_at_end: bool) -> list[Event]:
    """The events in the first ``end`` characters of ``texts``; reasoning and calls have none of their own.

    Args:
        calls_at_end: also those that stand just there.
    """
    out = []
    at = 0
    for event, text in zip(events, texts, strict=True):
        at += len(text)
        if event.kind == "content":
            own = event.text[: max(0, len(event.text) - (at - end))] if at > end else event.text
            if own:
                out.append(event._replace(text=own))
        elif at < end or (at == end and calls_at_end):
            out.append(event)
    return out
