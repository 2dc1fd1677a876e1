"""What an error tells a client."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any

from vllm_gemma4_spec import scope


def validation_exception_handler(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """``validation_exception_handler``: without the file of the endpoint, which FastAPI puts into its message.

    Patch: ``error-paths``. Evidence: ``tests/chat/test_leaks.py::test_stock_tells_clients_where_it_is_installed``.
    Related upstream change: none found.
    """

    @functools.wraps(original)
    async def wrapper(req: Any, exc: Any) -> Any:
        if scope.gemma4_engine(getattr(req.app.state, "vllm_config", None)):
            exc.endpoint_file = None
        return await original(req, exc)

    return wrapper
