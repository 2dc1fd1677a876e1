"""Choices made from bytes: what a fuzzer mutates, or what a seeded generator gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class Source:
    """Reads ``data`` once, front to back; after its end every choice is the first one."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def byte(self) -> int:
        at = self._at
        self._at = at + 1
        return self._data[at] if at < len(self._data) else 0

    def below(self, n: int) -> int:
        return self.byte() % n

    def pick(self, choices: Sequence[T]) -> T:
        return choices[self.byte() % len(choices)]

    @property
    def left(self) -> int:
        return max(0, len(self._data) - self._at)

    def rest(self) -> bytes:
        data, self._at = self._data[self._at :], len(self._data)
        return data

    def cuts(self, length: int, most: int = 6) -> list[int]:
        """Places to cut a sequence of ``length`` at, sorted; they may coincide, and lie at its ends."""
        count = self.below(most + 1)
        return sorted((self.byte() << 8 | self.byte()) % (length + 1) for _ in range(count))

    def json(self, keys: Sequence[str], scalars: Sequence[Any], depth: int = 5) -> Any:
        """A JSON value; half of what stands in it is wrong for where it stands."""
        kind = self.below(8 if depth > 0 and self.left else 5)
        if kind < 4:
            return self.pick(scalars)
        if kind == 4:
            return self.pick(("", 0, -1, 1.5, True, None, float("inf"), float("nan"), 10**30, "\x00", "é" * 40))
        if kind == 5:
            return [self.json(keys, scalars, depth - 1) for _ in range(self.below(5))]
        return {self.pick(keys): self.json(keys, scalars, depth - 1) for _ in range(self.below(8))}


def pieces(sequence: Sequence[Any], cuts: Sequence[int]) -> list[Any]:
    """``sequence`` in parts; empty ones too."""
    return [sequence[a:b] for a, b in zip([0, *cuts], [*cuts, len(sequence)], strict=True)]
