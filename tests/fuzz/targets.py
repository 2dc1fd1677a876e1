"""Every fuzz target: what it takes, and its share of the cases."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """``module:function`` is given arbitrary bytes and raises where an invariant breaks.

    ``share`` of the cases goes to it, the more the faster it is; inputs have at most ``longest`` bytes.
    """

    module: str
    function: str
    share: float
    longest: int = 128

    @property
    def name(self) -> str:
        return self.function.replace("_", "-")

    def load(self) -> Callable[[bytes], None]:
        found: Callable[[bytes], None] = getattr(importlib.import_module(f"tests.fuzz.{self.module}"), self.function)
        return found


TARGETS = {
    t.name: t
    for t in (
        Target("chat", "machine", 0.016, 64),
        Target("chat", "forced", 0.012, 64),
        Target("chat", "arguments", 0.15, 96),
        Target("chat", "stop_strings", 0.02, 64),
        Target("chat", "guard", 0.13, 96),
        Target("chat", "text", 0.1, 64),
        Target("files", "header", 0.14, 300),
        Target("files", "checkpoint", 0.02, 200),
        Target("files", "quantization", 0.17, 120),
        Target("files", "settings", 0.2, 64),
        Target("files", "plan", 0.002, 120),
        Target("files", "lines", 0.04, 200),
    )
}
