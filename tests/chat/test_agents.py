"""Agents of five turns with tools on scripted answers: nothing is lost on the way there and back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.clients import agent_loops as agents

from . import server
from . import tokenizer as tokenizers_
from .server import Server, by
from .test_server_e2e import http


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("agent", [agents.on_responses, agents.on_messages], ids=lambda f: f.__name__)
def test_five_turns(both: Server, encode: Any, agent: Any, stream: bool) -> None:
    def scripts() -> Iterator[str]:
        for city in agents.CITIES:
            called = f'<|tool_call>call:get_weather{{city:<|"|>{city}<|"|>}}<tool_call|>'
            yield f"<|channel>thought\nI look.<channel|>{called}<|tool_response>"
            yield f"<|channel>thought\nI read.<channel|>It is sunny in {city}.<turn|>"

    script = scripts()

    def post(path: str, body: dict[str, Any], headers: dict[str, str]) -> httpx.Response:
        both.script(encode(next(script)), cut=by(3))

        async def ask() -> httpx.Response:
            async with http(both) as client:
                answer: httpx.Response = await client.post(path, json=body | {"model": server.MODEL}, headers=headers)
                return answer

        return server.run(ask())

    assert agent(post, stream) == [
        agents.Turn([("get_weather", {"city": city})], f"It is sunny in {city}.", "I look.I read.")
        for city in agents.CITIES
    ]
    prompt = both.engine.tokenizer.decode(both.engine.prompts[-1])
    assert "unknown" not in prompt
    if tokenizers_.artifacts() is not None:
        assert "<|think|>" in prompt
        for text in ("call:get_weather{", "response:get_weather{", agents.RESULT):
            assert prompt.count(text) == 5
