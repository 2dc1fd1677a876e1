"""Streams of /v1/responses with a JSON schema, a client's or that of a forced call, through vLLM's own server code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.chat import server, tokenizer
from tests.chat.server import MODEL, Server
from tests.requests.generator import SCHEMA
from tests.support.stock import without
from vllm_gemma4_spec.demo.data import GET_WEATHER
from vllm_gemma4_spec.requests.patches import RESPONSES_SCHEMA

TOOLS = [{"type": "function", "strict": None, **GET_WEATHER["function"]}]
CALL = '[{"name": "get_weather", "parameters": {"city": "Paris"}}]'
ASKED: dict[str, tuple[dict[str, Any], str]] = {
    "required": ({"tools": TOOLS, "tool_choice": "required"}, CALL),
    "named": (
        {"tools": TOOLS, "tool_choice": {"type": "function", "name": "get_weather"}},
        '{"city": "Paris"}',
    ),
    "text": (
        {"text": {"format": {"type": "json_schema", "name": "counted", "schema": SCHEMA}}},
        '{"name": "Anna", "count": 3}',
    ),
    "no schema": ({}, "It is warm."),
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    import vllm_gemma4_spec

    vllm_gemma4_spec.apply()
    yield server.run(Server(str(tokenizer.write_small(tmp_path_factory.mktemp("small")))).start())
    server.close()


def ask(served: Server, name: str, stream: bool) -> Any:
    """The response, and of a stream all its events."""
    from transformers import AutoTokenizer
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    fields, text = ASKED[name]
    served.script(AutoTokenizer.from_pretrained(served.folder).encode(text + "<turn|>", add_special_tokens=False))

    async def go() -> Any:
        request = ResponsesRequest(model=MODEL, input="What?", stream=stream, **fields)
        made = await served.app.state.openai_serving_responses.create_responses(request)
        return [event async for event in made] if stream else made

    return server.run(go())


@pytest.mark.parametrize("name", ASKED)
def test_a_stream_is_the_whole_answer(served: Server, name: str) -> None:
    whole, events = ask(served, name, False), ask(served, name, True)
    assert [e.type for e in events[:2]] == ["response.created", "response.in_progress"]
    assert [e.type for e in events].count("response.created") == 1
    assert events[-1].type == "response.completed"
    volatile = {"id", "created_at", "call_id", "usage"}

    def plain(response: Any) -> dict[str, Any]:
        made = response.model_dump(exclude=volatile)
        made["output"] = [{k: v for k, v in item.items() if k not in volatile} for item in made["output"]]
        return made

    assert plain(events[-1].response) == plain(whole)
    (item,) = whole.output
    if name == "text":
        assert json.loads(item.content[0].text) == {"name": "Anna", "count": 3}
    elif name == "no schema":
        assert item.content[0].text == "It is warm."
    else:
        assert (item.type, json.loads(item.arguments)) == ("function_call", {"city": "Paris"})
    assert (whole.text is None) == (name == "no schema")
    for event in events:
        json.loads(event.model_dump_json())


def test_stock_dies_before_the_first_event(served: Server) -> None:
    from pydantic import ValidationError

    with without(RESPONSES_SCHEMA), pytest.raises(ValidationError, match="schema"):
        ask(served, "required", True)


def test_another_models_stream_dies_as_in_stock(served: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    from pydantic import ValidationError

    monkeypatch.setattr(served.engine.model_config.hf_config, "model_type", "llama")
    with pytest.raises(ValidationError, match="schema"):
        ask(served, "required", True)
