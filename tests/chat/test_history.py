"""What clients send back, on every template: one turn of the assistant, results under the names of their tools."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from vllm_gemma4_spec.chat.history import HistoryError, from_items, prepare, readable_items

from . import server
from . import tokenizer as tokenizers_
from .scenarios import TOOLS
from .server import MODEL, Server, by
from .test_server_e2e import http
from .test_templates import FOLDERS, NAMES

USER = {"role": "user", "content": "Hi"}
FLAT = [{"type": "function", **tool["function"]} for tool in TOOLS]
CLAUDE = [{"name": t["function"]["name"], "input_schema": t["function"]["parameters"]} for t in TOOLS]
CALLED = (
    "<|channel>thought\nI look.<channel|>Wait. <|tool_call>call:get{n:1}<tool_call|>"
    "<|tool_call>call:set-it{n:2}<tool_call|><|tool_response>"
)


@pytest.fixture(scope="module", params=FOLDERS or [None], ids=NAMES or ["small"])
def served(request: Any, both: Server) -> Iterator[Server]:
    both.use_template(request.param.read_text() if request.param else None)
    yield both
    both.use_template(None)


def post(served: Server, path: str, body: dict[str, Any]) -> httpx.Response:
    async def ask() -> httpx.Response:
        async with http(served) as client:
            return await client.post(path, json={"model": MODEL, **body})

    return server.run(ask())


def prompt(served: Server) -> str:
    return served.engine.tokenizer.decode(served.engine.prompts[-1])


def asked(served: Server, encode: Any, path: str, body: dict[str, Any], script: str = "Done.<turn|>") -> Any:
    served.script(encode(script), cut=by(3))
    reply = post(served, path, body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def results(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    calls = [i for i in items if i["type"] == "function_call"]
    return [
        {"type": "function_call_output", "call_id": c["call_id"], "output": f"result {n}"} for n, c in enumerate(calls)
    ]


def variants(output: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """An answer's items as clients send them back."""
    bare = [{k: v for k, v in item.items() if k not in ("id", "status")} for item in output]
    text = next(i for i in output if i["type"] == "message")["content"][0]["text"]
    halves = [{"type": "output_text", "text": part} for part in (text[:3], text[3:])]
    summary = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "I look."}]}
    calls = [i for i in output if i["type"] == "function_call"]
    return {
        "as they came": output,
        "without ids and status": bare,
        "text in parts": [i if i["type"] != "message" else {**i, "content": halves} for i in bare],
        "summary only": [summary if i["type"] == "reasoning" else i for i in output],
        "plain text": [{"role": "assistant", "content": text} if i["type"] == "message" else i for i in bare],
        "results between": [i for i in output if i not in calls[1:]] + results(calls[:1]) + calls[1:],
    }


def test_responses_items_come_back_as_one_turn(served: Server, encode: Any) -> None:
    first = {"input": [USER], "tools": FLAT, "reasoning": {"effort": "high"}}
    output = asked(served, encode, "/v1/responses", first, CALLED)["output"]
    assert [i["type"] for i in output] == ["reasoning", "message", "function_call", "function_call"]
    prompts = set()
    for name, items in variants(output).items():
        own = [r for r in results(output) if r not in items]
        asked(served, encode, "/v1/responses", {**first, "input": [USER, *items, *own]})
        text = prompt(served)
        if name != "results between":
            prompts.add(text)
        # The small template ends a turn at each result, Gemma 4's do not.
        if name != "results between" or tokenizers_.artifacts() is not None:
            assert text.count("<|turn>model\n") == 1, (name, text)
        assert "Wait." in text
        assert "unknown" not in text
        for tool in ("get", "set-it"):
            assert f"call:{tool}{{" in text or tokenizers_.artifacts() is None
            assert f"response:{tool}{{" in text or tokenizers_.artifacts() is None
    parts = [{**r, "output": [{"type": "input_text", "text": r["output"]}]} for r in results(output)]
    asked(served, encode, "/v1/responses", {**first, "input": [USER, *output, *parts]})
    prompts.add(prompt(served))
    assert len(prompts) == 1


def test_a_stored_response_comes_back_as_one_turn(served: Server, encode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.app.state.openai_serving_responses, "enable_store", True)
    body = {"tools": FLAT, "reasoning": {"effort": "high"}, "instructions": "Be kind."}
    answer = asked(served, encode, "/v1/responses", {**body, "input": "Hi"}, CALLED)
    asked(served, encode, "/v1/responses", {**body, "input": [USER, *answer["output"], *results(answer["output"])]})
    wanted = prompt(served)
    more = {"input": results(answer["output"]), "previous_response_id": answer["id"]}
    third = asked(served, encode, "/v1/responses", {**body, **more}, "<channel|>Done.<turn|>")
    assert prompt(served) == wanted
    asked(served, encode, "/v1/responses", {**body, "input": "And?", "previous_response_id": third["id"]})
    if tokenizers_.artifacts() is not None:
        assert prompt(served).count("response:get{") == 1
    assert prompt(served).count("Be kind.") == 1
    assert "Done." in prompt(served)


def test_every_api_makes_the_same_prompt_of_the_same_history(served: Server, encode: Any) -> None:
    messages = [
        USER,
        {"role": "assistant", "content": "Wait. ", "reasoning": "I look.", "tool_calls": []},
        {"role": "tool", "tool_call_id": "c0", "content": "result 0"},
        {"role": "tool", "tool_call_id": "c1", "content": "result 1"},
    ]
    for i, (name, n) in enumerate((("get", 1), ("set-it", 2))):
        function = {"name": name, "arguments": json.dumps({"n": n})}
        messages[1]["tool_calls"].append({"id": f"c{i}", "type": "function", "function": function})
    chat = {"messages": messages, "tools": TOOLS, "reasoning_effort": "low"}
    asked(served, encode, "/v1/chat/completions", chat)
    wanted = prompt(served)
    other = json.loads(json.dumps(chat))
    other["messages"][1]["reasoning_content"] = other["messages"][1].pop("reasoning")
    asked(served, encode, "/v1/chat/completions", other)
    assert prompt(served) == wanted
    blocks: list[dict[str, Any]] = [{"type": "thinking", "thinking": "I look.", "signature": "s"}]
    blocks += [{"type": "text", "text": "Wait. "}]
    blocks += [
        {"type": "tool_use", "id": f"c{i}", "name": name, "input": {"n": i + 1}}
        for i, name in enumerate(("get", "set-it"))
    ]
    answered = [{"type": "tool_result", "tool_use_id": f"c{i}", "content": f"result {i}"} for i in (0, 1)]
    claude = [USER, {"role": "assistant", "content": blocks}, {"role": "user", "content": answered}]
    body = {"messages": claude, "tools": CLAUDE, "max_tokens": 50, "thinking": {"type": "enabled"}}
    asked(served, encode, "/v1/messages", body)
    plain = {'description:<|"|><|"|>', 'description:<|"|>None<|"|>', 'description:<|"|>get<|"|>'}
    assert _without(prompt(served), plain) == _without(wanted, plain)


def _without(text: str, parts: set[str]) -> str:
    """The part behind the tools: the APIs describe them differently."""
    return text[text.index("<|turn>user") :]


SWITCHES: list[tuple[str, dict[str, Any], bool]] = [
    ("chat", {"reasoning_effort": "high"}, True),
    ("chat", {"reasoning_effort": "none"}, False),
    ("chat", {}, False),
    ("chat", {"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": False}}, False),
    ("chat", {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}}, True),
    ("responses", {"reasoning": {"effort": "low"}}, True),
    ("responses", {"reasoning": {"effort": "none"}}, False),
    ("responses", {"reasoning": {"summary": "auto"}}, False),
    ("responses", {"chat_template_kwargs": {"enable_thinking": True}}, True),
    ("responses", {"reasoning": {"effort": "low"}, "chat_template_kwargs": {"enable_thinking": False}}, False),
    ("messages", {"thinking": {"type": "enabled", "budget_tokens": 1024}}, True),
    ("messages", {"thinking": {"type": "adaptive"}}, True),
    ("messages", {"thinking": {"type": "disabled"}}, False),
    ("messages", {"chat_template_kwargs": {"enable_thinking": True}}, True),
    ("messages", {}, False),
]
BODIES = {
    "chat": ("/v1/chat/completions", {"messages": [USER]}),
    "responses": ("/v1/responses", {"input": "Hi"}),
    "messages": ("/v1/messages", {"messages": [USER], "max_tokens": 50}),
    "batch": ("/v1/chat/completions/batch", {"messages": [[USER]]}),
    "tokenize": ("/tokenize", {"messages": [USER]}),
}


@pytest.mark.skipif(tokenizers_.artifacts() is None, reason="the small template has no switch")
def test_thinking_is_switched_by_every_apis_own_field(served: Server, encode: Any) -> None:
    for api, fields, thinks in SWITCHES:
        path, body = BODIES[api]
        asked(served, encode, path, body | fields)
        assert ("<|think|>" in prompt(served)) == thinks, (api, fields)


USED = {"type": "tool_use", "id": "c", "name": "get", "input": {}}
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("chat", {"messages": [USER, {"role": "robot", "content": "x"}]}, "messages[1]"),
    ("chat", {"messages": [USER, {"role": "tool", "tool_call_id": "no", "content": "x"}]}, "'no'"),
    (
        "chat",
        {"messages": [USER, {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "weather"}]}]},
        "messages[1].content[1]",
    ),
    ("batch", {"messages": [[USER], [USER, {"role": "robot", "content": "x"}]]}, "messages[1][1]"),
    ("batch", {"messages": [[USER], [{"role": "user", "content": [{"type": "weather"}]}]]}, "messages[1][0].content"),
    ("tokenize", {"messages": [USER, {"role": "robot", "content": "x"}]}, "messages[1]"),
    ("responses", {"input": [USER, {"type": "weather", "text": "x"}]}, "input[1]"),
    ("responses", {"input": [USER, {"role": "robot", "content": "x"}]}, "input[1]"),
    ("responses", {"input": [USER, {"type": "function_call_output", "call_id": "no", "output": "x"}]}, "input[1]"),
    ("responses", {"input": [USER, {"type": "function_call", "name": "get", "arguments": "{}"}]}, "input[1]"),
    (
        "responses",
        {"input": [USER, *[{"type": "function_call", "name": "get", "arguments": "{}", "call_id": "c"}] * 2]},
        "input[2]",
    ),
    ("responses", {"input": [{"type": "function_call", "name": "f", "arguments": "[", "call_id": "c"}]}, "input[0]"),
    (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "no", "content": "x"}]}]},
        "'no'",
    ),
    ("messages", {"thinking": {"type": "perhaps"}}, "thinking"),
    ("messages", {"thinking": {"type": []}}, "thinking"),
    ("messages", {"thinking": []}, "thinking"),
    (
        "messages",
        {
            "messages": [
                {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "get", "input": {}}]},
                {
                    "role": "user",
                    "content": [{"type": "tool_result", "tool_use_id": "c", "content": [{"type": "search_result"}]}],
                },
            ]
        },
        "messages[1].content[0].content[0]",
    ),
    ("responses", {"input": [USER, None]}, "input[1]"),
    ("responses", {"input": [USER, {"type": "reasoning", "content": "text"}]}, "input[1].content"),
    ("messages", {"chat_template_kwargs": [1]}, "chat_template_kwargs"),
    ("messages", {"messages": [{"role": "robot", "content": "x"}]}, "messages"),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "weather"}]}]}, "messages"),
    ("messages", {"messages": [USER, {"role": "assistant", "content": [USED, USED]}]}, "tool_calls[1]"),
    ("responses", {"chat_template_kwargs": [1]}, "chat_template_kwargs"),
]


def test_bad_items_are_named(served: Server, encode: Any) -> None:
    served.script(encode("Fine.<turn|>"))
    for api, fields, named in BAD:
        path, body = BODIES[api]
        reply = post(served, path, body | fields)
        assert reply.status_code == 400, (api, fields, reply.text)
        assert named in reply.json()["error"]["message"], reply.text
    call = {"id": "c", "type": "function", "function": {"name": "get", "arguments": "{}"}}
    twice = [USER, {"role": "assistant", "content": None, "tool_calls": [call, call]}]
    reply = post(served, "/v1/chat/completions", {"messages": twice})
    assert reply.status_code == 400
    assert "messages[1].tool_calls[1]" in reply.json()["error"]["message"]
    asked(served, encode, "/v1/chat/completions", {"messages": [USER]})
    with pytest.raises(ValueError, match="empty string"):  # vLLM's own check; a server makes 400 of it
        post(served, "/v1/chat/completions", {"messages": [USER], "stop": ["a", ""]})


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_sequence_is_named(served: Server, encode: Any, stream: bool) -> None:
    served.script(encode("<|channel>thought\nHm.<channel|>One\nTwo<turn|>"), cut=by(3))
    body = {"messages": [USER], "max_tokens": 50, "stop_sequences": ["\n"], "stream": stream}
    reply = post(served, "/v1/messages", body)
    if stream:
        events = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
        (end,) = [e["delta"] for e in events if e["type"] == "message_delta"]
        text = "".join(e["delta"].get("text", "") for e in events if e["type"] == "content_block_delta")
    else:
        end = reply.json()
        text = "".join(b.get("text", "") for b in end["content"])
    assert (end["stop_reason"], end["stop_sequence"]) == ("stop_sequence", "\n")
    assert text == "One"


def test_numbers_that_json_cannot_hold_lose_nothing(served: Server, encode: Any) -> None:
    call = "<|tool_call>call:get{n:1e400,m:" + "7" * 5000 + "}<tool_call|><|tool_response>"
    body = {"messages": [USER], "max_tokens": 9000, "tools": CLAUDE}
    (block,) = asked(served, encode, "/v1/messages", body, call)["content"]
    assert block["input"] == {"n": "1e400", "m": "7" * 5000}


def test_a_summary_is_given_where_it_is_asked_for(served: Server, encode: Any) -> None:
    script = "<|channel>thought\nHm.<channel|>Yes.<turn|>"
    for summary in ({}, {"summary": "auto"}):
        body = {"input": "Hi", "reasoning": {"effort": "low", **summary}}
        item = asked(served, encode, "/v1/responses", body, script)["output"][0]
        wanted = [{"type": "summary_text", "text": "Hm."}] if summary else []
        assert item["summary"] == wanted
        assert item["content"][0]["text"] == "Hm."
        reply = post(served, "/v1/responses", {**body, "stream": True})
        events = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
        kinds = ("response.reasoning_summary_text.delta", "response.reasoning_text.delta")
        told = ["".join(e["delta"] for e in events if e["type"] == kind) for kind in kinds]
        assert told == ["Hm." if summary else "", "Hm."]
    body = {"input": "Hi", "reasoning": {"effort": "low"}, "include_reasoning": False}
    assert [i["type"] for i in asked(served, encode, "/v1/responses", body, script)["output"]] == ["message"]


# Without a server.


def call_item(call_id: str, name: str = "f") -> dict[str, Any]:
    return {"type": "function_call", "call_id": call_id, "name": name, "arguments": "{}"}


def result_item(call_id: str) -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call_id, "output": call_id}


def test_a_late_result_stands_behind_its_call() -> None:
    items = [call_item("a"), call_item("b"), result_item("b"), {"role": "user", "content": "?"}, result_item("a")]
    roles = [m["role"] for m in from_items(items)]
    assert roles == ["assistant", "tool", "tool", "user"]


def test_an_answer_after_a_result_is_a_message_of_its_own() -> None:
    items = [call_item("a"), result_item("a"), {"role": "assistant", "content": "So."}, call_item("b")]
    messages = from_items(items)
    assert [m["role"] for m in messages] == ["assistant", "tool", "assistant"]
    assert messages[2]["content"] == "So."
    assert [c["id"] for c in messages[2]["tool_calls"]] == ["b"]


def test_empty_reasoning_makes_no_turn() -> None:
    items = readable_items([{"type": "reasoning"}, {"role": "user", "content": "Hi"}])
    assert from_items(items) == [{"role": "user", "content": "Hi"}]


def test_calls_of_the_response_before_are_known() -> None:
    before = from_items([call_item("a")])
    assert [m["role"] for m in from_items([result_item("a")], before)] == ["assistant", "tool"]
    with pytest.raises(HistoryError, match="used twice"):
        from_items([call_item("a")], before)


@pytest.mark.parametrize("items", [[result_item("a")], [call_item("a"), result_item("a"), result_item("a")]])
def test_results_answer_one_call_each(items: list[dict[str, Any]]) -> None:
    with pytest.raises(HistoryError, match=r"^input\[\d\]: a .*result for the call 'a'"):
        from_items(items)


def test_encrypted_reasoning_needs_other_text() -> None:
    with pytest.raises(HistoryError, match="encrypted"):
        readable_items([{"type": "reasoning", "summary": [], "encrypted_content": "x"}])
    summary = [{"type": "summary_text", "text": "s"}]
    (item,) = readable_items([{"type": "reasoning", "summary": summary, "encrypted_content": "x"}])
    assert "encrypted_content" not in item


def test_reasoning_content_does_not_replace_reasoning() -> None:
    messages = [{"role": "assistant", "content": "", "reasoning": "a", "reasoning_content": "b"}]
    prepare(messages)
    assert messages[0]["reasoning"] == "a"


def test_results_behind_a_message_of_the_user_are_with_their_call() -> None:
    """A result of ``/v1/messages`` that has an image becomes a message of the user as well."""
    calls = [{"id": i, "type": "function", "function": {"name": "f", "arguments": "{}"}} for i in "ab"]
    messages: list[Any] = [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": calls}]
    image = {"role": "user", "content": "an image"}
    results = [{"role": "tool", "tool_call_id": i, "content": i} for i in "ab"]
    messages += [results[0], image, results[1]]
    prepare(messages)
    assert messages[2:] == [*results, image]
    before = list(messages)
    prepare(messages)
    assert messages == before


DEEP = "[" * 100_000
ODD_ITEMS: list[tuple[Any, str]] = [
    ("text", "input[0]"),
    ({"role": "user", "content": 5}, "input[0].content"),
    ({"role": "user", "content": ["text"]}, "input[0].content"),
    ({"type": "reasoning", "content": "text"}, "input[0].content"),
    ({"type": "reasoning", "summary": "text"}, "input[0].summary"),
    ({"type": "reasoning", "summary": ["text"], "encrypted_content": "x"}, "input[0].summary"),
    ({"role": "assistant", "content": ["text"]}, "input[0].content"),
    (
        {"role": "assistant", "content": [{"type": "output_text", "text": "a"}, {"type": "sound"}]},
        "input[0].content[1]",
    ),
    ({"type": [], "content": "x"}, "input[0]"),
    ({"role": [], "content": "x"}, "input[0]"),
    ({"type": "function_call", "name": "f", "arguments": "{}", "call_id": 5}, "input[0]"),
    ({"type": "function_call", "name": "f", "arguments": f'{{"n": {DEEP}}}', "call_id": "c"}, "input[0]"),
]


@pytest.mark.parametrize(("item", "named"), ODD_ITEMS)
def test_odd_items_are_named(item: Any, named: str) -> None:
    with pytest.raises(HistoryError) as raised:
        from_items(readable_items([item]))
    assert str(raised.value).startswith(f"{named}: ")


ODD_CALLS: list[Any] = [
    5,
    "text",
    {},
    [None],
    [{"id": "c"}],
    [{"id": "c", "function": "f"}],
    [{"id": [], "function": {"name": "f"}}],
    [{"id": "c", "function": {"name": "f", "arguments": 5}}],
    [{"id": "c", "function": {"name": "f", "arguments": DEEP}}],
]


@pytest.mark.parametrize("calls", ODD_CALLS, ids=range(len(ODD_CALLS)))
def test_odd_calls_are_named(calls: Any) -> None:
    with pytest.raises(HistoryError, match=r"^messages\[1\]"):
        prepare([USER, {"role": "assistant", "content": "a", "tool_calls": calls}])


@pytest.mark.parametrize("call_id", [[0], {"a": 1}, 5])
def test_a_result_for_an_id_that_is_no_text_is_named(call_id: Any) -> None:
    with pytest.raises(HistoryError, match=r"^messages\[1\]"):
        prepare([USER, {"role": "tool", "tool_call_id": call_id, "content": "x"}])


def test_an_assistant_that_said_nothing_makes_no_turn(served: Server, encode: Any) -> None:
    asked(served, encode, "/v1/responses", {"input": [USER, {"role": "assistant", "content": []}, USER]})
    assert "Validator" not in prompt(served)
    assert prompt(served).count("Hi") == 2


def test_what_clients_send_a_little_differently_is_understood() -> None:
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": {"n": 1}}
    parts = [{"type": "output_text", "text": "a"}, "b", {"type": "text", "text": "c"}]
    items = readable_items([call, {**result_item("c"), "output": parts}])
    assert items[0]["arguments"] == '{"n": 1}'
    assert items[1]["output"] == [{"type": "input_text", "text": t} for t in "abc"]
    messages = [{"role": "assistant", "content": None, "refusal": "No."}]
    prepare(messages)
    assert messages[0]["content"] == "No."
