"""Says once when drafts are accepted no more often than by chance (``VLLM_GEMMA4_SPEC_CHECK=1``).

The target checks every draft, so a drafter that reads the wrong KV cache, or does not fit its target, changes
no answer: speculation only gets slower, and nothing says why.
"""

from __future__ import annotations

import functools
import logging
from collections import deque
from collections.abc import Callable
from typing import Any

from vllm_gemma4_spec import scope, settings

logger = logging.getLogger("vllm.plugins.gemma4_spec")
WATCH = "_gemma4_spec_acceptance"

WINDOW = 500  # drafts
# A drafter that reads nothing but guesses the language's commonest token is right about this often.
CHANCE = 0.05


class AcceptanceWatch:
    """The last :data:`WINDOW` drafts: whether each had its first token accepted."""

    def __init__(self) -> None:
        self._first: deque[bool] = deque(maxlen=WINDOW)
        self._hits = 0
        self._reported = False

    def add(self, num_accepted: int) -> None:
        """Count a draft of which the first ``num_accepted`` tokens were accepted; say so if too few are."""
        if len(self._first) == self._first.maxlen:
            self._hits -= self._first[0]
        self._first.append(num_accepted > 0)
        self._hits += num_accepted > 0
        full = len(self._first) == self._first.maxlen
        if full and not self._reported and self._hits < CHANCE * len(self._first):
            self._reported = True
            logger.warning(
                "vllm-gemma4-spec: of the last %d drafts %d had their first token accepted, no more than by chance. "
                "Answers are right, but speculation only costs time: is the drafter the target's own "
                "(tokenizer, fine-tuning, quantization)? Said once.",
                len(self._first),
                self._hits,
            )


def make_spec_decoding_stats(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Scheduler.make_spec_decoding_stats``: it is told of every draft and how much of it was accepted.

    Patch: ``acceptance-watch``. Evidence:
    ``tests/spec_decode/test_invariants.py::test_stock_says_nothing_about_acceptance``. Related upstream change: none
    found.
    """
    if not settings.CHECK.on():
        return original

    @functools.wraps(original)
    def wrapper(
        self: Any, spec_decoding_stats: Any, num_draft_tokens: int, num_accepted_tokens: int, **rest: Any
    ) -> Any:
        if num_draft_tokens and scope.gemma4_speculation(self.vllm_config):
            watch = self.__dict__.setdefault(WATCH, AcceptanceWatch())
            watch.add(num_accepted_tokens)
        return original(self, spec_decoding_stats, num_draft_tokens, num_accepted_tokens, **rest)

    return wrapper
