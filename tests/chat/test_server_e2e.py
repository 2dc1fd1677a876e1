"""The whole server in this process, asked by the OpenAI and Anthropic clients.

Real: routes, request validation, serving, server-sent events, the clients' own parsing. Played: the tokens.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import httpx
import openai
import pytest

from vllm_gemma4_spec.chat.patches import CHAT_OUTPUT
from vllm_gemma4_spec.registry import PATCHER

from . import server
from .scenarios import FEW, SCENARIOS, TOOLS, Scenario
from .server import MODEL, Server, all_at_once, by
from .test_serving import USER, differences, expected, one

# Newer releases of the Anthropic client are built on httpx2 and take no other client.
anthropic_httpx = getattr(anthropic._base_client, "httpx2", httpx)

CUTS = {"1": by(1), "3": by(3), "all": all_at_once}
ARGUMENTS = '{city:<|"|>Zürich "x"<|"|>,n:[1,{a:true}]}'
WANTED = {"city": 'Zürich "x"', "n": [1, {"a": True}]}
OUTPUT = (
    "First. <|channel>thought\nHm, 中.<channel|>Second."
    f"<|tool_call>call:get{ARGUMENTS}<tool_call|><|tool_call>call:set-it{{}}<tool_call|><|tool_response>"
)


@pytest.fixture(scope="module")
def served(overlay: None, both: Server) -> Server:
    return both


def http(served: Server, library: Any = httpx) -> Any:
    return library.AsyncClient(transport=library.ASGITransport(served.app), base_url="http://test")


@pytest.mark.parametrize("cut", CUTS)
def test_openai_chat_completions(served: Server, encode: Any, cut: str) -> None:
    served.script(encode(OUTPUT), cut=CUTS[cut])

    async def ask() -> tuple[Any, Any]:
        client = openai.AsyncOpenAI(api_key="-", base_url="http://test/v1", http_client=http(served))
        request: dict[str, Any] = {"model": MODEL, "messages": USER, "tools": TOOLS}
        whole = await client.chat.completions.create(**request)
        async with client.chat.completions.stream(**request) as stream:
            async for _ in stream:
                pass
            return whole, await stream.get_final_completion()

    whole, streamed = server.run(ask())
    for response in (whole, streamed):
        (choice,) = response.choices
        assert choice.message.content == "First. Second."
        assert choice.finish_reason == "tool_calls"
        calls = choice.message.tool_calls
        assert [(c.function.name, json.loads(c.function.arguments)) for c in calls] == [("get", WANTED), ("set-it", {})]
    assert whole.choices[0].message.reasoning == "Hm, 中."


@pytest.mark.parametrize("cut", CUTS)
def test_openai_responses(served: Server, encode: Any, cut: str) -> None:
    served.script(encode(OUTPUT), cut=CUTS[cut])
    tools = [{"type": "function", **tool["function"]} for tool in TOOLS]

    async def ask() -> tuple[Any, list[Any]]:
        client = openai.AsyncOpenAI(api_key="-", base_url="http://test/v1", http_client=http(served))
        request: dict[str, Any] = {"model": MODEL, "input": "Hi", "tools": tools}
        whole = await client.responses.create(**request)
        stream = await client.responses.create(**request, stream=True)
        return whole, [event async for event in stream]

    whole, events = server.run(ask())
    assert [e.sequence_number for e in events] == list(range(len(events)))
    (final,) = [e.response for e in events if e.type == "response.completed"]
    wanted = [
        ("message", "First. "),
        ("reasoning", "Hm, 中."),
        ("message", "Second."),
        ("function_call", ("get", WANTED)),
        ("function_call", ("set-it", {})),
    ]
    assert items(whole.output) == wanted
    assert items(final.output) == wanted
    assert items([e.item for e in events if e.type == "response.output_item.done"]) == wanted
    assert followed(events) == wanted
    assert [i.id for i in final.output] == [e.item.id for e in events if e.type == "response.output_item.added"]
    assert whole.usage.output_tokens == final.usage.output_tokens == len(encode(OUTPUT))


def items(output: list[Any]) -> list[tuple[str, Any]]:
    out: list[tuple[str, Any]] = []
    for item in output:
        if item.type == "function_call":
            out.append((item.type, (item.name, json.loads(item.arguments))))
        else:
            out.append((item.type, "".join(part.text for part in item.content)))
    return out


def followed(events: list[Any]) -> list[tuple[str, Any]]:
    """What a client that reads deltas only has at the end; every item is opened and closed in turn."""
    out: list[tuple[str, Any]] = []
    text, name, open_item = "", "", None
    for event in events:
        if event.type == "response.output_item.added":
            assert open_item is None
            assert event.output_index == len(out)
            open_item, text, name = event.item.id, "", getattr(event.item, "name", "")
        elif event.type.endswith(".delta"):
            assert event.item_id == open_item
            text += event.delta
        elif event.type == "response.output_item.done":
            assert event.item.id == open_item
            open_item = None
            out.append((event.item.type, (name, json.loads(text)) if name else text))
    assert open_item is None
    return out


def test_responses_incomplete_and_logprobs(served: Server, encode: Any) -> None:
    tokens = encode("<|channel>thought\nHm.<channel|>Yes, yes.")
    served.script(tokens, cut=by(2))

    async def ask() -> tuple[Any, list[Any]]:
        client = openai.AsyncOpenAI(api_key="-", base_url="http://test/v1", http_client=http(served))
        request: dict[str, Any] = {"model": MODEL, "input": "Hi", "max_output_tokens": len(tokens)}
        request |= {"include": ["message.output_text.logprobs"], "top_logprobs": 1}
        whole = await client.responses.create(**request)
        stream = await client.responses.create(**request, stream=True)
        return whole, [event async for event in stream]

    whole, events = server.run(ask())
    assert whole.status == "incomplete"
    assert items(whole.output) == [("reasoning", "Hm."), ("message", "Yes, yes.")]
    logprobs = whole.output[1].content[0].logprobs
    assert "".join(p.token for p in logprobs) == "Yes, yes."
    streamed = [p for e in events if e.type == "response.output_text.delta" for p in e.logprobs]
    assert [p.token for p in streamed] == [p.token for p in logprobs]


@pytest.mark.parametrize("cut", CUTS)
def test_anthropic_messages(served: Server, encode: Any, cut: str) -> None:
    served.script(encode(OUTPUT), cut=CUTS[cut])
    tools = [
        {"name": t["function"]["name"], "description": "-", "input_schema": t["function"]["parameters"]} for t in TOOLS
    ]

    async def ask() -> tuple[Any, Any]:
        client = anthropic.AsyncAnthropic(
            api_key="-", base_url="http://test", http_client=http(served, anthropic_httpx)
        )
        request: dict[str, Any] = {"model": MODEL, "max_tokens": 500, "messages": USER, "tools": tools}
        whole = await client.messages.create(**request)
        async with client.messages.stream(**request) as stream:
            return whole, await stream.get_final_message()

    whole, streamed = server.run(ask())
    wanted = [("tool_use", ("get", WANTED)), ("tool_use", ("set-it", {}))]
    # The plain answer has one text and one thinking block; the stream keeps the order of the model.
    assert blocks(whole) == [("thinking", "Hm, 中."), ("text", "First. Second."), *wanted]
    assert blocks(streamed) == [("text", "First. "), ("thinking", "Hm, 中."), ("text", "Second."), *wanted]
    for message in (whole, streamed):
        assert message.stop_reason == "tool_use"
        assert message.usage.output_tokens == len(encode(OUTPUT))


def blocks(message: Any) -> list[tuple[str, Any]]:
    out: list[tuple[str, Any]] = []
    for block in message.content:
        if block.type == "tool_use":
            out.append((block.type, (block.name, block.input)))
        else:
            out.append((block.type, getattr(block, block.type)))
    return out


@pytest.mark.parametrize(
    "scenario",
    [pytest.param(s, marks=[] if s.name in FEW else pytest.mark.slow) for s in SCENARIOS],
    ids=[s.name for s in SCENARIOS],
)
def test_every_endpoint_says_the_same(served: Server, scenario: Scenario, encode: Any, plain: Any) -> None:
    """/v1/responses and /v1/messages, streamed and not, against the reference."""
    tokens = scenario.tokens(encode, plain)
    scenario = scenario.cut_at(len(tokens))
    served.script(tokens, cut=by(3))

    async def ask() -> AsyncIterator[tuple[str, dict[str, Any]]]:
        # Neither endpoint takes template arguments; the prompt then differs, and with it what is expected.
        asked = set(scenario.request) - {"tools", "stop", "max_tokens", "tool_choice", "chat_template_kwargs"}
        if scenario.after_tool:
            return
        more = {"skip_special_tokens", "ignore_eos", "include_stop_str_in_output", "parallel_tool_calls"}
        if not asked - more - {"include_reasoning"}:
            for stream in (False, True):
                yield "responses", await responses(served, scenario, stream)
        if not asked:
            for stream in (False, True):
                yield "messages", await messages(served, scenario, stream)

    async def all_of_them() -> None:
        async for endpoint, got in ask():
            want = expected(served.engine.tokenizer, scenario, tokens, served.engine.prompts[-1])
            want["usage"] = None
            want["finish_reason"] = None
            assert differences({**got, "usage": None, "finish_reason": None}, want) == {}, endpoint

    server.run(all_of_them())


@pytest.mark.parametrize("parallel", [True, False], ids=["", "one call only"])
def test_a_call_cut_at_every_place(served: Server, encode: Any, parallel: bool) -> None:
    """By ``max_tokens``: the same in every API, streamed and not, with the end that each has for it."""
    tokens = encode(
        'Ok. <|tool_call>call:get{city:<|"|>Paris 日<|"|>,o:{l:[1,true],"k":"v w"}}<tool_call|>'
        "<|tool_call>call:set-it{n:2}<tool_call|>"
    )

    async def ask(scenario: Scenario) -> dict[str, dict[str, Any]]:
        got = {}
        for stream in (False, True):
            got[f"chat {stream}"] = await one(served, scenario, tokens, by(3), stream)
            got[f"responses {stream}"] = await responses(served, scenario, stream)
            if parallel:
                got[f"messages {stream}"] = await messages(served, scenario, stream)
        return got

    more = {} if parallel else {"parallel_tool_calls": False}
    for length in range(1, len(tokens) + 1):
        scenario = Scenario("", (), {"tools": TOOLS, "max_tokens": length, **more})
        for api, got in server.run(ask(scenario)).items():
            want = expected(served.engine.tokenizer, scenario, tokens, served.engine.prompts[-1])
            ends = {"chat": want["finish_reason"], "responses": "incomplete"}
            ends["messages"] = "tool_use" if want["finish_reason"] == "tool_calls" else "max_tokens"
            assert got.get("ended", got.get("finish_reason")) == ends[api.split()[0]], (api, length)
            want |= {"usage": None, "finish_reason": None}
            assert differences({"usage": None, "finish_reason": None, **got}, want) == {}, (api, length)


def raw_items(output: list[dict[str, Any]], ended: str = "") -> dict[str, Any]:
    answer: dict[str, Any] = {"reasoning": "", "content": "", "calls": [], "ended": ended}
    for item in output:
        if item["type"] == "function_call":
            answer["calls"].append([item["name"], item["arguments"]])
        else:
            key = "reasoning" if item["type"] == "reasoning" else "content"
            answer[key] += "".join(part["text"] for part in item["content"])
    return answer


async def responses(served: Server, scenario: Scenario, stream: bool) -> dict[str, Any]:
    request = {k: v for k, v in scenario.request.items() if k != "chat_template_kwargs"}
    tools = [{"type": "function", **tool["function"]} for tool in request.pop("tools", [])]
    if "max_tokens" in request:
        request["max_output_tokens"] = request.pop("max_tokens")
    body = {"model": MODEL, "input": "Hi", "stream": stream, **request, **({"tools": tools} if tools else {})}
    async with http(served) as client:
        reply = await client.post("/v1/responses", json=body)
    assert reply.status_code == 200, reply.text
    if not stream:
        return raw_items(reply.json()["output"], reply.json()["status"])
    events = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
    done = [e["item"] for e in events if e["type"] == "response.output_item.done"]
    (final,) = [e["response"] for e in events if e["type"] == "response.completed"]
    assert raw_items(done) == raw_items(final["output"])
    return raw_items(done, final["status"])


async def messages(served: Server, scenario: Scenario, stream: bool) -> dict[str, Any]:
    request = {k: v for k, v in scenario.request.items() if k == "max_tokens"}
    tools = [t["function"] for t in scenario.request.get("tools", [])]
    if tools:
        request["tools"] = [{"name": t["name"], "input_schema": t["parameters"]} for t in tools]
        request["tool_choice"] = {"type": scenario.request.get("tool_choice", "auto")}
    if "stop" in scenario.request:
        request["stop_sequences"] = scenario.request["stop"]
    body = {"model": MODEL, "max_tokens": 9000, "messages": USER, "stream": stream, **request}
    async with http(served) as client:
        reply = await client.post("/v1/messages", json=body)
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = {"reasoning": "", "content": "", "calls": []}
    if not stream:
        answer["ended"] = reply.json()["stop_reason"]
        for block in reply.json()["content"]:
            if block["type"] == "tool_use":
                answer["calls"].append([block["name"], json.dumps(block["input"])])
            else:
                answer["reasoning" if block["type"] == "thinking" else "content"] += block[block["type"]]
        return answer
    for line in reply.text.splitlines():
        event = json.loads(line[6:]) if line.startswith("data: ") else {}
        if event.get("type") == "content_block_start" and event["content_block"]["type"] == "tool_use":
            answer["calls"].append([event["content_block"]["name"], ""])
        delta = event.get("delta") or {}
        answer["ended"] = delta.get("stop_reason") or answer.get("ended")
        answer["reasoning"] += delta.get("thinking") or ""
        answer["content"] += delta.get("text") or ""
        if delta.get("type") == "input_json_delta":
            answer["calls"][-1][1] += delta["partial_json"]
    return answer


@pytest.mark.parametrize(
    "fields",
    [
        {"chat_template_kwargs": {"no_such_argument": 1}},
        {"tools": [{"type": "function", "function": {"description": "no name"}}]},
        {"tools": [{"type": "function", "function": {"name": "get", "parameters": "no schema"}}]},
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "unknown"}}},
        {"tool_choice": "required"},
        {"tools": TOOLS, "tool_choice": "sometimes"},
    ],
    ids=["template argument", "tool without a name", "schema", "unknown function", "no tools", "tool choice"],
)
def test_bad_input_is_answered_as_stock(served: Server, encode: Any, fields: dict[str, Any]) -> None:
    served.script(encode("Hello.<turn|>"))

    async def ask() -> tuple[int, Any]:
        async with http(served) as client:
            reply = await client.post("/v1/chat/completions", json={"model": MODEL, "messages": USER, **fields})
        body = reply.json()
        return reply.status_code, body.get("choices", body)

    with_patch = server.run(ask())
    PATCHER.undo([CHAT_OUTPUT])
    try:
        assert with_patch == server.run(ask())
    finally:
        PATCHER.apply([CHAT_OUTPUT])
    assert with_patch[0] == (200 if "chat_template_kwargs" in fields else 400)
