"""Stop strings, when text and control tokens travel together.

The engine decides when a stop string has matched, and cuts its own text there; it does not say at which
token. So the newest characters are held back here until they cannot be part of a match any more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple


class Item(NamedTuple):
    """A piece of ordinary text (``token`` is -1) or one control token, with its text as the engine sees it."""

    text: str
    token: int = -1


class StopGuard:
    """Holds back the last ``max(len(stop)) - 1`` characters of the engine's text."""

    def __init__(self, stop: Sequence[str], include: bool) -> None:
        self._width = max(len(s) for s in stop) - 1
        self._include = include
        self._items: deque[Item] = deque()
        self._held = 0  # characters in _items
        self._controls = 0  # control tokens in _items
        self._given = 0  # characters let through
        self._matched: str | None = None
        self._engine_length = 0

    def stopped(self, matched: str, engine_length: int) -> None:
        """The tokens still to come are the last, and ``matched`` is among their text or what is held.

        Args:
            matched: the stop string.
            engine_length: characters of text that the engine gave out in all; it may have ignored earlier
                occurrences (``min_tokens``), so the one nearest to its own cut is taken.
        """
        self._matched = matched
        self._engine_length = engine_length

    @property
    def holds_controls(self) -> bool:
        """Not only text is held back."""
        return self._controls > 0

    def push_text(self, text: str) -> str:
        """Take text while only text is held and no stop string has matched; returns what is certain now."""
        while self._items:
            text = self._items.pop().text + text
        sure = max(len(text) - self._width, 0)
        self._given += sure
        self._held = len(text) - sure
        if self._held:
            self._items.append(Item(text[sure:]))
        return text[:sure]

    def push(self, item: Item) -> list[Item]:
        """Take one item; returns those that are certain now."""
        self._items.append(item)
        self._held += len(item.text)
        self._controls += item.token >= 0
        sure = self._held
        if self._matched is not None:
            begin = self._engine_length - (len(self._matched) if self._include else 0)
            sure = min(sure, begin - self._given)
        return self._take(sure - self._width)

    def finish(self) -> list[Item]:
        """The output has ended: everything held, up to the stop string that matched, if one did."""
        matched = self._matched
        if not matched:
            return self._take(self._held, all_of_it=True)
        text = "".join(item.text for item in self._items)
        cuts = []
        at = text.find(matched)
        while at >= 0:
            cuts.append(at + (len(matched) if self._include else 0))
            at = text.find(matched, at + 1)
        wanted = self._engine_length - self._given
        return self._take(min(cuts, key=lambda cut: abs(cut - wanted)) if cuts else self._held)

    def _take(self, count: int, all_of_it: bool = False) -> list[Item]:
        out = []
        while self._items and (count > 0 or all_of_it):
            item = self._items.popleft()
            if len(item.text) > count and not all_of_it:
                if item.token >= 0:  # a control token is let through as a whole
                    self._items.appendleft(item)
                    break
                self._items.appendleft(Item(item.text[count:]))
                item = Item(item.text[:count])
            out.append(item)
            count -= len(item.text)
            self._held -= len(item.text)
            self._given += len(item.text)
            self._controls -= item.token >= 0
        return out
