"""Stop strings of a request are searched in its content, not in the text of all tokens.

The engine's detokenizer searches them, with every step (``seen_detokenizer.py``). It is told by the stop strings
themselves how the output is parsed: they travel with the request's sampling parameters, which it is made from.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vllm_gemma4_spec.chat.requests import Plan


class SeenStops(list[str]):
    """A request's stop strings, and how its outputs are parsed."""

    plan: Plan

    @classmethod
    def of(cls, stops: Iterable[str], plan: Plan) -> SeenStops:
        made = cls(stops)
        made.plan = plan._replace(options=plan.options._replace(stop=()))
        return made

    def __deepcopy__(self, memo: Any) -> SeenStops:
        return self.of(self, self.plan)  # a tokenizer is not to be copied
