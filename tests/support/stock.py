"""vLLM with one patch left out, in this process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import vllm_gemma4_spec
from vllm_gemma4_spec import settings
from vllm_gemma4_spec.patching.engine import Patcher
from vllm_gemma4_spec.patching.patch import Patch
from vllm_gemma4_spec.registry import PATCHER

LEAVE_OUT = "GEMMA4_TESTS_LEAVE_OUT"


@contextlib.contextmanager
def without(patch: Patch) -> Iterator[None]:
    """All patches but ``patch``, also for engines that start inside; afterwards all."""
    from vllm.distributed import cleanup_dist_env_and_memory

    vllm_gemma4_spec.apply()
    PATCHER.passed_over.add(patch.name)  # not its switch: other patches may need it
    PATCHER.undo([patch])
    try:
        yield
    finally:
        PATCHER.passed_over.discard(patch.name)
        cleanup_dist_env_and_memory()  # of an engine that never came up
        vllm_gemma4_spec.apply()


def modules_around(function: Any) -> list[str]:
    """Of a patched function and all that it wraps, the outermost first."""
    names = []
    while function is not None:
        names.append(function.__globals__["__name__"])
        function = getattr(function, "__wrapped__", None)
    return names


def pytest_configure() -> None:
    """As a pytest plugin (``-p tests.support.stock``): nothing ever applies the patch that the variable names."""
    name = os.environ[LEAVE_OUT]
    (left_out,) = [p for p in PATCHER.known if p.name == name]
    original = Patcher.apply

    def apply(self: Patcher, patches: list[Patch] | None = None) -> None:
        if patches is None:
            patches = [p for p in self.known if settings.patch_switch(p.name).on()]
        original(self, [p for p in patches if p is not left_out])

    Patcher.apply = apply  # type: ignore[method-assign]
