"""How far a request's reasoning has come, token by token."""

from __future__ import annotations

from collections.abc import Sequence


class Thinking:
    """Counts the tokens of a channel, and says which token must come next once the budget is spent.

    vLLM's own processor keeps this per step. It counts what was generated, not what the prompt has in an open channel.

    Args:
        budget: tokens that may stand between the start and the end of reasoning.
        start, end: token ids that delimit it, as in ``--reasoning-config``.
        prompt: token ids.
    """

    __slots__ = ("_budget", "_count", "_end", "_forced", "_inside", "_start", "_tail", "_width")

    def __init__(self, budget: int, start: Sequence[int], end: Sequence[int], prompt: Sequence[int]) -> None:
        self._budget, self._start, self._end = budget, tuple(start), tuple(end)
        self._width = max(len(self._start), len(self._end))
        self._tail: tuple[int, ...] = tuple(prompt[len(prompt) - self._width + 1 :]) if self._width > 1 else ()
        self._inside = _last(prompt, self._start) > _last(prompt, self._end)
        self._count = 0  # generated since the start of reasoning
        self._forced = 0 if self._inside and budget <= 0 else -1  # which token of the end comes next, or -1

    def copy(self) -> Thinking:
        other = object.__new__(Thinking)
        for name in self.__slots__:
            setattr(other, name, getattr(self, name))
        return other

    @property
    def wanted(self) -> int | None:
        """Id of the token that must come next, or None."""
        return self._end[self._forced] if self._forced >= 0 else None

    def may_end_within(self, ahead: int) -> bool:
        """Whether a token may have to come after any 0 to ``ahead`` further ones; False for less than 0."""
        spent = self._count if self._inside else 0
        return ahead >= 0 and (self._forced >= 0 or spent + ahead >= self._budget)

    def push(self, token: int) -> None:
        """Go on by one token of the output."""
        self._tail = (*self._tail, token)[-self._width :]
        if self._forced >= 0:
            self._forced += 1
            if self._forced == len(self._end):
                self._forced, self._inside = -1, False
            return
        if self._tail[-len(self._start) :] == self._start:
            self._inside, self._count = True, 0
        elif self._tail[-len(self._end) :] == self._end:
            self._inside = False
        elif self._inside:
            self._count += 1
        if self._inside and self._count >= self._budget:
            self._forced = 0


def _last(tokens: Sequence[int], wanted: tuple[int, ...]) -> int:
    """Where ``wanted`` begins for the last time in ``tokens``, or -1."""
    for at in range(len(tokens) - len(wanted), -1, -1):
        if tuple(tokens[at : at + len(wanted)]) == wanted:
            return at
    return -1
