"""An image that must be computed whole gets a step of its own size, soon, under any load.

Decoding requests come first in a step. While they leave fewer tokens than the image has, its request would wait, and
with it every request behind it, until enough of them have ended.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

# Attributes of a scheduler: the request whose image the last step had no room for; whether that step held others back.
SHORT = "_gemma4_spec_image_without_room"
_HELD = "_gemma4_spec_held_back"


@dataclass(frozen=True)
class WithoutRoom:
    """``tokens`` of ``request``, up to the end of an image, must be computed in one step."""

    request: Any
    tokens: int


def schedule(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Scheduler.schedule``: after a step without room for an image, some decoding requests sit one step out.

    Never twice in a row, so each of them decodes in every second step at least. The scheduler and the runner know
    running requests that a step leaves out: a long prompt's chunk leaves others out, too.

    Patch: ``image-turns``. Evidence:
    ``tests/multimodal/test_image_turns.py::test_stock_lets_all_wait_behind_an_image``. Related upstream change: none
    found.
    """

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        short: WithoutRoom | None = self.__dict__.pop(SHORT, None)
        held = _to_hold_back(self, short) if short is not None and not self.__dict__.get(_HELD) else []
        if not held:
            self.__dict__.pop(_HELD, None)
            return original(self, *args, **kwargs)
        setattr(self, _HELD, True)
        before, most = self.running, self.max_num_running_reqs
        self.running = [request for request in before if request not in held]
        self.max_num_running_reqs = most - len(held)
        try:
            return original(self, *args, **kwargs)
        finally:
            now = {request.request_id for request in [*self.running, *held]}
            came = [request for request in self.running if request not in before]
            self.running = [request for request in before if request.request_id in now] + came
            self.max_num_running_reqs = most

    return wrapper


def _to_hold_back(scheduler: Any, short: WithoutRoom) -> Sequence[Any]:
    """The latest decoding requests that must sit out for ``short`` to be computed; none if that does not help."""
    request, running = short.request, scheduler.running
    if request in running:
        ahead = running[: running.index(request)]
    elif (
        request.request_id in scheduler.requests
        and len(running) < scheduler.max_num_running_reqs
        and scheduler.kv_cache_manager.can_fit_full_sequence(request)
    ):
        ahead = running
    else:
        return []
    most = scheduler.scheduler_config.long_prefill_token_threshold or scheduler.max_num_scheduled_tokens
    tokens = [min(most, r.num_tokens_with_spec + r.num_output_placeholders - r.num_computed_tokens) for r in ahead]
    left, held = scheduler.max_num_scheduled_tokens - sum(tokens), []
    for other, its in zip(reversed(ahead), reversed(tokens), strict=True):
        if left >= short.tokens:
            break
        if other.num_computed_tokens >= other.num_prompt_tokens:
            held.append(other)
            left += its
    if left < short.tokens:
        return []
    if scheduler.scheduler_config.async_scheduling:
        for other in held:
            other.spec_token_ids = []  # placeholders of drafts that the runner keeps for the very next step only
    return held
