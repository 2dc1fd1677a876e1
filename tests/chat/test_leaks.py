"""What must not get out: prompts and answers into the log at INFO, paths and internals into errors for clients."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from tests.support.configs import GEMMA4, LLAMA, vllm_config
from tests.support.stock import without
from vllm_gemma4_spec.chat.patches import ERROR_PATHS
from vllm_gemma4_spec.registry import PATCHER

from . import server
from .scenarios import TOOLS
from .server import MODEL, Server, by

ASKED, ANSWERED = "Xylophone-4711", "Quokka-0815"
OUTPUT = (
    f'<|channel>thought\n{ANSWERED}<channel|>{ANSWERED}<|tool_call>call:get{{city:<|"|>{ANSWERED}<|"|>}}<tool_call|>'
)
SPECIMEN = re.compile(r"site-packages|Traceback|File \"|\.py\b|0x[0-9a-f]{6,}|vllm_gemma4_spec|/tmp/|/root/|/home/")


@pytest.fixture(scope="module")
def served(overlay: None, folder: Path) -> Server:
    PATCHER.apply([ERROR_PATHS])
    return server.run(Server(str(folder)).start())


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """Every message of every logger from INFO on; vLLM's do not propagate."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(f"{record.name} {record.getMessage()} {record.exc_text or ''}")

    handler, loggers = Keep(logging.INFO), [logging.getLogger(), logging.getLogger("vllm")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    logging.getLogger("vllm.plugins.gemma4_spec").info("the handler hears INFO")
    yield lines
    for logger, level in zip(loggers, levels, strict=True):
        logger.removeHandler(handler)
        logger.setLevel(level)


def post(served: Server, path: str, body: Any) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=served.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            content = body if isinstance(body, str) else json.dumps(body)
            return await client.post(path, content=content, headers={"content-type": "application/json"})

    return server.run(ask())


CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": f"What is {ASKED}?"}]}
REQUESTS = [
    ("/v1/chat/completions", CHAT | {"tools": TOOLS}),
    ("/v1/chat/completions", CHAT | {"tools": TOOLS, "stream": True}),
    ("/v1/responses", {"model": MODEL, "input": f"What is {ASKED}?"}),
    ("/v1/responses", {"model": MODEL, "input": f"What is {ASKED}?", "stream": True}),
    ("/v1/messages", CHAT | {"max_tokens": 99}),
]


def test_nothing_of_a_prompt_or_an_answer_is_logged_at_info(served: Server, encode: Any, logged: list[str]) -> None:
    for path, body in REQUESTS:
        served.script([*encode(OUTPUT), 106], cut=by(3))
        answer = post(served, path, body)
        assert answer.status_code == 200, answer.text
        assert body.get("stream") or ANSWERED in answer.text
    assert any("the handler hears INFO" in line for line in logged)
    words = (ASKED, ANSWERED, *map(str, (encode(ASKED), encode(ANSWERED))))
    assert not [line for line in logged if any(w in line for w in words)]


BAD: list[tuple[str, Any]] = [
    ("/v1/chat/completions", "{"),
    ("/v1/chat/completions", {}),
    ("/v1/chat/completions", CHAT | {"messages": []}),
    ("/v1/chat/completions", CHAT | {"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
    ("/v1/chat/completions", CHAT | {"messages": [{"role": "user", "content": "a " * 30000}]}),
    ("/v1/chat/completions", CHAT | {"model": "another"}),
    ("/v1/chat/completions", CHAT | {"n": 0}),
    ("/v1/chat/completions", CHAT | {"temperature": -1}),
    ("/v1/chat/completions", CHAT | {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "no"}}}),
    ("/v1/chat/completions", CHAT | {"tools": [{"type": "function"}]}),
    ("/v1/chat/completions", CHAT | {"tool_choice": "auto", "tools": []}),
    ("/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 10**6}),
    ("/v1/responses", {"model": MODEL}),
    ("/v1/responses", {"model": MODEL, "input": "x", "previous_response_id": "resp_none"}),
    ("/v1/messages", {"model": MODEL, "messages": "x"}),
]


@pytest.mark.parametrize("stream", [False, True])
def test_errors_carry_no_path_and_no_internals(served: Server, encode: Any, folder: Path, stream: bool) -> None:
    refused = 0
    for path, body in BAD:
        served.script([*encode("Hi."), 106], cut=by(1))
        answer = post(served, path, body if isinstance(body, str) else body | {"stream": stream})
        refused += answer.status_code >= 400 or "error" in answer.text
        assert answer.status_code < 500, (path, body, answer.text)
        assert not SPECIMEN.search(answer.text), (path, body, answer.text)
        assert str(folder) not in answer.text
    assert refused >= len(BAD) - 2


def told(path: str, model: Any = GEMMA4) -> str:
    """What the server's handler says of an invalid request to an endpoint that stands in ``path``."""
    from fastapi.exceptions import RequestValidationError
    from vllm.entrypoints.openai import api_server

    where: Any = {"file": path, "line": 7, "function": "create", "path": "POST /v1"}
    error = RequestValidationError([{"msg": "no"}], endpoint_ctx=where)
    state = SimpleNamespace(args=SimpleNamespace(log_error_stack=False), vllm_config=vllm_config(model, LLAMA))
    answer = asyncio.run(
        api_server.validation_exception_handler(SimpleNamespace(app=SimpleNamespace(state=state)), error)
    )
    return bytes(answer.body).decode()


def test_stock_tells_clients_where_it_is_installed() -> None:
    with without(ERROR_PATHS):
        assert "/somewhere/server.py" in told("/somewhere/server.py")
    assert "/somewhere/server.py" in told("/somewhere/server.py", LLAMA)
    ours = told("/somewhere/server.py")
    assert "/somewhere" not in ours
    assert "no" in ours
