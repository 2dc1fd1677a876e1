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
        self._width = max(map(len, stop)) - 1
        self._include = include
        self._items: deque[Item] = deque()  # held; the last of them is a control token
        self._length = 0  # characters in them
        self._text = ""  # held, and newer than they
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
    def takes_text(self) -> bool:
        """Nothing but text is held, and no stop string has matched: :meth:`push_text` may be called."""
        return not self._items and self._matched is None

    def push_text(self, text: str) -> str:
        """Take text, as :meth:`push` would; returns what is certain now."""
        text = self._text + text
        sure = len(text) - self._width
        if sure <= 0:
            self._text = text
            return ""
        self._text = text[sure:]
        self._given += sure
        return text[:sure]

    def push(self, item: Item) -> list[Item]:
        """Take one item; returns those that are certain now."""
        if item.token < 0:
            self._text += item.text
        else:
            for held in (Item(self._text), item) if self._text else (item,):
                self._items.append(held)
                self._length += len(held.text)
            self._text = ""
        sure = self._length + len(self._text)
        if self._matched is not None:
            begin = self._engine_length - (len(self._matched) if self._include else 0)
            sure = min(sure, begin - self._given)
        return self._take(sure - self._width)

    def finish(self) -> list[Item]:
        """The output has ended: everything held, up to the stop string that matched, if one did."""
        held = [*self._items, Item(self._text)]
        if not self._matched:
            return held
        text = "".join(item.text for item in held)
        cuts = []
        at = text.find(self._matched)
        while at >= 0:
            cuts.append(at + (len(self._matched) if self._include else 0))
            at = text.find(self._matched, at + 1)
        wanted = self._engine_length - self._given
        return self._take(min(cuts, key=lambda cut: abs(cut - wanted)) if cuts else len(text))

    def _take(self, count: int) -> list[Item]:
        """Let ``count`` characters through, and the control tokens before the last of them."""
        out = []
        while count > 0 and self._items:
            item = self._items.popleft()
            if len(item.text) > count:
                # A control token is let through as a whole or not at all.
                cut = count if item.token < 0 else 0
                self._items.appendleft(Item(item.text[cut:], item.token))
                item, count = Item(item.text[:cut]), cut
            out.append(item)
            count -= len(item.text)
            self._length -= len(item.text)
            self._given += len(item.text)
        if count > 0:
            out.append(Item(self._text[:count]))
            self._text = self._text[count:]
            self._given += len(out[-1].text)
        return out
