"""The demo pair on a real ``vllm serve``, with speculation and without: every client gets the same answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_gemma4_spec.demo import build, measure, run
from vllm_gemma4_spec.demo.data import Dialogue
from vllm_gemma4_spec.demo.server import Server

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


def simple(question: Dialogue) -> bool:
    """``/v1/messages`` takes no template arguments, and here no answers of tools."""
    return not question.thinking and all(m["role"] in ("user", "system") for m in question.messages)


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Said]:
    """With speculation or without -> what every way of asking gave."""
    pair, _ = build.ensure(build.default_folder())
    folder: Path = tmp_path_factory.mktemp("server")
    out: dict[bool, Said] = {}
    for speculate in (True, False):
        with Server(run.serve_arguments(pair, speculate), folder / f"{speculate}.log") as server:
            client = run.connect(server)
            out[speculate] = {
                "whole": [run.ask(client, q, stream=False) for q in questions()],
                "streamed": [run.ask(client, q, stream=True) for q in questions()],
                "messages": [anthropic_blocks(server, q, False) for q in questions() if simple(q)],
                "messages streamed": [anthropic_blocks(server, q, True) for q in questions() if simple(q)],
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


def test_the_anthropic_client_is_told_the_same(said: dict[bool, Said]) -> None:
    wanted = said[False]["messages"]
    for speculate in (True, False):
        assert said[speculate]["messages"] == wanted
        assert said[speculate]["messages streamed"] == wanted
    whole = [a for q, a in zip(questions(), said[False]["whole"], strict=True) if simple(q)]
    assert len(whole) == len(wanted) >= 4
    for answer, blocks in zip(whole, wanted, strict=True):
        text = "".join(value for kind, value in blocks if kind == "text")
        assert text.strip() == answer.content.strip()
        assert [(name, value) for kind, v in blocks if kind == "tool_use" for name, value in [v]] == answer.calls
        assert json.dumps(blocks)  # plain data


def test_most_answers_are_right(said: dict[bool, Said]) -> None:
    right = [run.is_right(q, a) for q, a in zip(questions(), said[True]["whole"], strict=True)]
    assert sum(right) > 0.85 * len(right)
