"""The four endpoints of a real ``vllm serve`` of the demo pair, with and without speculation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.requests.generator import SCHEMA
from vllm_gemma4_spec.demo import build, run
from vllm_gemma4_spec.demo.data import GET_WEATHER, SET_TIMER
from vllm_gemma4_spec.demo.server import Server

# Two servers of several processes: minutes.
pytestmark = pytest.mark.slow

REASONING = {"reasoning_start_str": "<|channel>", "reasoning_end_str": "<channel|>"}
COUNT = [{"role": "user", "content": "Count from 3 to 7."}]
WEATHER = [{"role": "user", "content": "What is the weather in Paris?"}]
THINK = {"chat_template_kwargs": {"enable_thinking": True}}
JSON = {"type": "json_schema", "json_schema": {"name": "counted", "schema": SCHEMA}}
FLAT_TOOLS = [{"type": "function", **tool["function"]} for tool in (GET_WEATHER, SET_TIMER)]
CLAUDE_TOOLS = [
    {"name": t["name"], "description": t["description"], "input_schema": t["parameters"]} for t in FLAT_TOOLS
]
Body = dict[str, Any]


def chat(**fields: Any) -> tuple[str, Body]:
    return "/v1/chat/completions", {"messages": COUNT, "max_tokens": 80} | fields


def responses(**fields: Any) -> tuple[str, Body]:
    return "/v1/responses", {"input": "Count from 3 to 7.", "max_output_tokens": 80} | fields


def messages(**fields: Any) -> tuple[str, Body]:
    return "/v1/messages", {"messages": COUNT, "max_tokens": 80} | fields


def completions(**fields: Any) -> tuple[str, Body]:
    return "/v1/completions", {"prompt": "<bos><|turn>user\nCount from 3 to 7.<turn|>\n", "max_tokens": 40} | fields


NAMED = {"type": "function", "function": {"name": "get_weather"}}
CHOICE = {"choice": ["yes", "no"]}
ASKED: dict[str, tuple[str, Body]] = {
    "chat": chat(),
    "chat thinking": chat(**THINK),
    "chat choice": chat(**THINK, structured_outputs=CHOICE),
    "chat choice, thinking off": chat(structured_outputs=CHOICE),
    "chat regex": chat(**THINK, structured_outputs={"regex": "[0-9]{2}, [0-9]{2}"}),
    "chat grammar": chat(**THINK, structured_outputs={"grammar": 'root ::= "I count " [0-9]+ "."'}),
    "chat response_format": chat(**THINK, response_format=JSON),
    "chat logprobs": chat(**THINK, structured_outputs=CHOICE, logprobs=True, top_logprobs=2),
    "chat without its reasoning": chat(**THINK, structured_outputs=CHOICE, include_reasoning=False),
    "chat required": chat(**THINK, messages=WEATHER, tools=[GET_WEATHER, SET_TIMER], tool_choice="required"),
    "chat named": chat(**THINK, messages=WEATHER, tools=[GET_WEATHER, SET_TIMER], tool_choice=NAMED),
    **{f"chat budget {b}": chat(**THINK, thinking_token_budget=b) for b in (0, 4, 9)},
    "chat stop": chat(stop=["5", "4"]),
    "chat continued": chat(
        messages=[*COUNT, {"role": "assistant", "content": "I say"}],
        continue_final_message=True,
        add_generation_prompt=False,
        structured_outputs={"choice": [" yes", " no"]},
        **THINK,
    ),
    "completions": completions(logprobs=2),
    "completions choice": completions(structured_outputs=CHOICE),
    "completions stop": completions(prompt="Here you are: 3,", stop=["6", "5"]),
    "responses": responses(),
    "responses logprobs": responses(include=["message.output_text.logprobs"], top_logprobs=2),
    "responses text": responses(text={"format": {"type": "json_schema", "name": "counted", "schema": SCHEMA}}),
    "responses required": responses(input=WEATHER, tools=FLAT_TOOLS, tool_choice="required"),
    "responses named": responses(
        input=WEATHER, tools=FLAT_TOOLS, tool_choice={"type": "function", "name": "get_weather"}
    ),
    "messages": messages(),
    "messages stop": messages(stop_sequences=["5", "4"]),
    "messages any": messages(messages=WEATHER, tools=CLAUDE_TOOLS, tool_choice={"type": "any"}),
}
# Name -> what is asked, and the field that the answer names.
BAD: dict[str, tuple[tuple[str, Body], str]] = {
    "schema": (chat(structured_outputs={"json": {"type": "nothing"}}), "structured_outputs.json"),
    "schema no JSON": (chat(structured_outputs={"json": "{"}), "structured_outputs.json"),
    "response_format": (
        chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 3}}}),
        "structured_outputs.json",
    ),
    "regex": (completions(structured_outputs={"regex": "[0-9"}), "structured_outputs.regex"),
    "grammar": (chat(structured_outputs={"grammar": "root ::= ("}), "structured_outputs.grammar"),
    "negative budget": (chat(thinking_token_budget=-1), "thinking_token_budget"),
    "responses text": (
        responses(text={"format": {"type": "json_schema", "name": "x", "schema": {"type": "nothing"}}}),
        "structured_outputs.json",
    ),
}


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "speculating"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    pair, _ = build.ensure(build.default_folder())
    arguments = [*run.serve_arguments(pair, request.param), "--reasoning-config", json.dumps(REASONING)]
    arguments += ["--structured-outputs-config", json.dumps({"backend": "xgrammar", "disable_any_whitespace": True})]
    with Server(arguments, tmp_path_factory.mktemp("server") / "log") as started:
        yield started


def post(server: Server, asked: tuple[str, Body], **more: Any) -> httpx.Response:
    path, body = asked
    body = {"model": run.MODEL, "temperature": 0, "top_k": 1} | body | more
    return httpx.post(server.url + path, json=body, timeout=300, trust_env=False)


def whole(reply: httpx.Response) -> Any:
    assert reply.status_code == 200, reply.text
    return plain(reply.json())


def plain(value: Any) -> Any:
    """Without what differs from request to request."""
    if isinstance(value, dict):
        volatile = {"id", "created", "created_at", "call_id", "request_id", "system_fingerprint", "item_id"}
        return {k: plain(v) for k, v in value.items() if k not in volatile}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return round(value, 2) if isinstance(value, float) else value


def streamed(reply: httpx.Response) -> str:
    """All text, reasoning and arguments of a stream, in order; an error is an error."""
    assert reply.status_code == 200, reply.text
    said = ""
    for line in reply.text.splitlines():
        if not line.startswith("data: {"):
            continue
        event = json.loads(line[6:])
        assert "error" not in event, event
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or choice
            said += delta.get("reasoning") or delta.get("content") or delta.get("text") or ""
            said += "".join(c["function"].get("arguments") or "" for c in delta.get("tool_calls") or ())
        delta = event.get("delta")
        if isinstance(delta, str):
            said += delta
        elif isinstance(delta, dict):
            said += delta.get("text") or delta.get("thinking") or delta.get("partial_json") or ""
    assert said
    return said


SAID: dict[str, dict[str, Any]] = {}


def test_every_endpoint_answers_identically_with_speculation(server: Server, request: pytest.FixtureRequest) -> None:
    """Whole answers with usage, reasons and log-probabilities; of streams the text (chunks are as steps cut them)."""
    kind = request.node.callspec.params["server"]
    SAID[kind] = {name: whole(post(server, asked)) for name, asked in ASKED.items()}
    SAID[kind] |= {
        f"{name} streamed": streamed(post(server, asked, stream=True))
        for name, asked in ASKED.items()
        if "logprobs" not in name
    }
    said = SAID[kind]
    for name in ("chat choice", "chat choice, thinking off", "chat without its reasoning"):
        assert said[name]["choices"][0]["message"]["content"] in ("yes", "no"), name
    assert said["completions choice"]["choices"][0]["text"] in ("yes", "no")
    assert set(json.loads(said["chat response_format"]["choices"][0]["message"]["content"])) == {"name", "count"}
    for name in ("chat required", "chat named"):
        (call,) = said[name]["choices"][0]["message"]["tool_calls"]
        assert call["function"]["name"] in ("get_weather", "set_timer")
        assert isinstance(json.loads(call["function"]["arguments"]), dict)
    for name in ("responses required", "responses named"):
        assert [i["type"] for i in said[name]["output"] if i["type"] != "reasoning"] == ["function_call"], name
    assert said["chat stop"]["choices"][0]["message"]["content"] == "Here you are: 3, "
    if True in SAID and False in SAID:
        assert {name: a for name, a in SAID[True].items() if a != SAID[False][name]} == {}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name_and_the_server_goes_on(server: Server, name: str, stream: bool) -> None:
    asked, field = BAD[name]
    reply = post(server, asked, stream=stream)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["param"] == field
    assert field in error["message"]
    assert post(server, ASKED["completions choice"]).status_code == 200


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A speculating server without ``--reasoning-config``, whose KV cache holds less than the longest context."""
    pair, _ = build.ensure(build.default_folder())
    arguments = [*run.serve_arguments(pair, True), "--num-gpu-blocks-override", "60"]
    with Server(arguments, tmp_path_factory.mktemp("limited") / "log") as started:
        yield started


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_budget_without_reasoning_config_is_refused(limited: Server, stream: bool) -> None:
    reply = post(limited, chat(thinking_token_budget=4), stream=stream)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == "thinking_token_budget"
    assert "thinking_token_budget" in reply.json()["error"]["message"]
    assert post(limited, chat()).status_code == 200


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_prompt_that_can_never_fit_is_refused_with_what_fits(limited: Server, stream: bool) -> None:
    models = httpx.get(f"{limited.url}/v1/models", timeout=60, trust_env=False).json()
    longest = models["data"][0]["max_model_len"]
    many = "one two three four five " * longest
    refused = [
        post(limited, completions(prompt=many), stream=stream),
        post(limited, chat(messages=[{"role": "user", "content": many}]), stream=stream),
        post(limited, completions(prompt=[200] * (longest + 1), max_tokens=1), stream=stream),
    ]
    for reply in refused:
        assert reply.status_code == 400, reply.text
        assert f"maximum context length is {longest} tokens" in reply.json()["error"]["message"]
    # The longest that fits, to its end.
    reply = post(limited, completions(prompt=[200] * (longest - 8), max_tokens=8, ignore_eos=True), stream=False)
    assert reply.status_code == 200, reply.text
    assert reply.json()["usage"]["completion_tokens"] == 8
