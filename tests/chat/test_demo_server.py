"""The demo pair on a real ``vllm serve``, with speculation and without: every client gets the same answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from vllm_gemma4_spec.demo import build, measure, run
from vllm_gemma4_spec.demo.data import Dialogue
from vllm_gemma4_spec.demo.server import Server

# Two servers and every question to each of them: two to three minutes.
pytestmark = pytest.mark.slow

Said = dict[str, Any]


def questions() -> list[Dialogue]:
    """Two held-out questions of every kind, with and without reasoning, and of every length of tool list."""
    chosen: dict[tuple[str, bool], list[Dialogue]] = {}
    for dialogue in measure.held_out(400, 5):
        chosen.setdefault((dialogue.kind, dialogue.thinking), []).append(dialogue)
    return [d for found in chosen.values() for d in found[:2]]


def anthropic_blocks(server: Server, question: Dialogue, stream: bool) -> list[tuple[str, Any]]:
    """What ``/v1/messages`` answers, as (kind, text or call)."""
    import anthropic

    http = anthropic.DefaultHttpxClient(trust_env=False)
    client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=120, http_client=http)
    functions = [tool["function"] for tool in question.tools or ()]
    request: dict[str, Any] = {
        "model": run.MODEL,
        "max_tokens": 160,
        "extra_body": {"temperature": 0},
        "messages": [m for m in question.messages if m["role"] != "system"],
    }
    system = [m["content"] for m in question.messages if m["role"] == "system"]
    if system:
        request["system"] = system[0]
    if functions:
        request["tools"] = [
            {"name": f["name"], "description": f["description"], "input_schema": f["parameters"]} for f in functions
        ]
    if stream:
        with client.messages.stream(**request) as events:
            message: Any = events.get_final_message()
    else:
        message = client.messages.create(**request)
    return [
        (b.type, (b.name, b.input)) if b.type == "tool_use" else (b.type, getattr(b, b.type)) for b in message.content
    ]


def response_items(server: Server, question: Dialogue, stream: bool) -> list[tuple[str, Any]]:
    """What ``/v1/responses`` answers, as (type, text or call)."""
    client = run.connect(server)
    request: dict[str, Any] = {
        "model": run.MODEL,
        "max_output_tokens": 160,
        "temperature": 0,
        "input": question.messages,
        "tools": [{"type": "function", **tool["function"]} for tool in question.tools],
    }
    if stream:
        events = list(client.responses.create(**request, stream=True))
        (output,) = [e.response.output for e in events if e.type == "response.completed"]
        deltas = "".join(e.delta for e in events if e.type.endswith(".delta"))
        assert deltas == "".join(i.arguments if i.type == "function_call" else i.content[0].text for i in output)
    else:
        output = client.responses.create(**request).output
    return [
        (i.type, (i.name, json.loads(i.arguments)) if i.type == "function_call" else i.content[0].text) for i in output
    ]


def batch(server: Server, asked: list[Dialogue]) -> list[tuple[str, str]]:
    """What ``/v1/chat/completions/batch`` answers, as (reasoning, content)."""
    body = {
        "model": run.MODEL,
        "messages": [q.messages for q in asked],
        "temperature": 0,
        "max_tokens": 160,
    }
    reply = httpx.post(f"{server.url}/v1/chat/completions/batch", json=body, timeout=120, trust_env=False)
    assert reply.status_code == 200, reply.text
    messages = [choice["message"] for choice in sorted(reply.json()["choices"], key=lambda c: c["index"])]
    return [(m.get("reasoning") or "", m["content"] or "") for m in messages]


def simple(question: Dialogue) -> bool:
    """``/v1/messages`` and ``/v1/responses`` take no template arguments, and here no answers of tools."""
    return question.thinking and all(m["role"] in ("user", "system") for m in question.messages)


def thinking_template(pair: build.Pair, folder: Path) -> Path:
    """The pair's template, which thinks where a request does not say: so does every endpoint."""
    text = (pair.target / "chat_template.jinja").read_text()
    default = "enable_thinking | default(false)"
    assert text.count(default) == 1
    path = folder / "thinking.jinja"
    path.write_text(text.replace(default, default.replace("false", "true")))
    return path


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Said]:
    """With speculation or without -> what every way of asking gave."""
    pair, _ = build.ensure(build.default_folder())
    folder: Path = tmp_path_factory.mktemp("server")
    template = thinking_template(pair, folder)
    out: dict[bool, Said] = {}
    for speculate in (True, False):
        arguments = [*run.serve_arguments(pair, speculate), "--chat-template", str(template)]
        with Server(arguments, folder / f"{speculate}.log") as server:
            client = run.connect(server)
            asked = [q for q in questions() if simple(q)]
            out[speculate] = {
                "whole": [run.ask(client, q, stream=False) for q in questions()],
                "streamed": [run.ask(client, q, stream=True) for q in questions()],
                "messages": [anthropic_blocks(server, q, False) for q in asked],
                "messages streamed": [anthropic_blocks(server, q, True) for q in asked],
                "responses": [response_items(server, q, False) for q in asked],
                "responses streamed": [response_items(server, q, True) for q in asked],
                "batch": batch(server, [q for q in asked if not q.tools]),
                "drafting": run.drafting(server.get("/metrics")),
            }
    return out


def test_streamed_is_whole_and_speculation_changes_nothing(said: dict[bool, Said]) -> None:
    wanted = said[False]["whole"]
    assert len(wanted) >= 12
    assert any(a.reasoning for a in wanted)
    assert any(a.calls for a in wanted)
    for speculate in (True, False):
        assert said[speculate]["whole"] == wanted
        assert said[speculate]["streamed"] == wanted
    assert said[True]["drafting"].accepted > 0
    assert said[False]["drafting"].drafts == 0


def chat_answers(said: dict[bool, Said]) -> list[run.Answer]:
    """What chat completions said to the questions that the other endpoints were asked."""
    return [a for q, a in zip(questions(), said[False]["whole"], strict=True) if simple(q)]


def same_as_chat(said: dict[bool, Said], endpoint: str, kinds: tuple[str, str, str]) -> None:
    """An endpoint says what chat completions do, streamed or not, speculating or not.

    Args:
        kinds: what it calls reasoning, content and a call.
    """
    wanted = said[False][endpoint]
    for speculate in (True, False):
        assert said[speculate][endpoint] == wanted
        assert said[speculate][f"{endpoint} streamed"] == wanted
    reasoning, content, call = kinds
    assert len(wanted) >= 4
    assert {kind for parts in wanted for kind, _ in parts} == set(kinds)
    for answer, parts in zip(chat_answers(said), wanted, strict=True):
        assert "".join(value for kind, value in parts if kind == reasoning) == answer.reasoning
        assert "".join(value for kind, value in parts if kind == content) == answer.content
        assert [value for kind, value in parts if kind == call] == answer.calls


def test_the_anthropic_client_is_told_the_same(said: dict[bool, Said]) -> None:
    same_as_chat(said, "messages", ("thinking", "text", "tool_use"))


def test_the_responses_endpoint_says_the_same(said: dict[bool, Said]) -> None:
    same_as_chat(said, "responses", ("reasoning", "message", "function_call"))


def test_a_batch_says_the_same(said: dict[bool, Said]) -> None:
    toolless = [not q.tools for q in questions() if simple(q)]
    wanted = [(a.reasoning, a.content) for a, take in zip(chat_answers(said), toolless, strict=True) if take]
    assert len(wanted) >= 2
    assert said[True]["batch"] == said[False]["batch"] == wanted


def test_most_answers_are_right(said: dict[bool, Said]) -> None:
    right = [run.is_right(q, a) for q, a in zip(questions(), said[True]["whole"], strict=True)]
    assert sum(right) > 0.85 * len(right)
