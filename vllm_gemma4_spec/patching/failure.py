"""A patch that failed after the start: what is on stays on, and the process ends where nothing can swallow that.

Patches are applied by import hooks. vLLM imports some modules inside ``try`` (models while it inspects them, backends
while it looks for one), so an error that a hook raises may be logged and forgotten, and the process would go on without
the patch. So it is kept here, and raised again by :func:`gate`, which stands before an engine or a worker is made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm_gemma4_spec.errors import Gemma4SpecError, stop

_failures: list[Gemma4SpecError] = []  # the first is the cause of the others


def keep(error: Gemma4SpecError) -> None:
    """Remember ``error`` for the next gate."""
    _failures.append(error)


def forget() -> None:
    """All patches were undone: nothing is half on any more."""
    _failures.clear()


def first() -> Gemma4SpecError | None:
    """The first failure of this process; None if there is none."""
    return _failures[0] if _failures else None


def gate(original: Callable[..., Any]) -> Callable[..., Any]:
    """``original``, which is not called once a patch has failed: the process ends with that one line instead.

    Patch: ``patch-failures``. Evidence:
    ``tests/patching/test_failures.py::test_stock_makes_an_engine_whatever_has_failed``. Related upstream change: none
    found.
    """

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if _failures:
            stop(_failures[0])
        return original(*args, **kwargs)

    return wrapper
