"""Runs inside the process of vLLM's benchmark."""

from __future__ import annotations

import functools
from typing import Any


def leave_after_a_refusal() -> None:
    """uvicorn closes a connection after some of vLLM's errors without saying so. Kept, it would break the next request,
    which nothing is wrong with; so a connection that brought an error is not used again."""
    import aiohttp

    original = aiohttp.ClientResponse.start

    @functools.wraps(original)
    async def start(self: Any, connection: Any) -> Any:
        protocol = connection.protocol  # gone once the connection is back in the pool, which start may see to
        response = await original(self, connection)
        if response.status >= 400:
            protocol.close()
        return response

    aiohttp.ClientResponse.start = start  # type: ignore[method-assign]
