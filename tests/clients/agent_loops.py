"""Five turns of an agent with tools, request by request, as Codex asks ``/v1/responses`` and Claude Code
``/v1/messages``: every request carries the whole conversation, in the fields that these programs send.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.clients.drive import FUNCTION, MODEL, PARAMETERS

CITIES = ("Oslo", "Rome", "Madrid", "Vienna", "Lima")
RESULT = "sunny, 21 degrees"
SYSTEM = "You are a helpful assistant."


@dataclass
class Turn:
    """What one question led to: calls, the answer to their results, and what was thought on the way."""

    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    answer: str = ""
    reasoning: str = ""


def _events(reply: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]


Post = Callable[[str, dict[str, Any], dict[str, str]], httpx.Response]  # path, body, headers


def to(url: str) -> Post:
    """Requests to a server."""

    def post(path: str, body: dict[str, Any], headers: dict[str, str]) -> httpx.Response:
        return httpx.post(url + path, json=body, headers=headers, timeout=300, trust_env=False)

    return post


def on_responses(post: Post, stream: bool) -> list[Turn]:
    items: list[dict[str, Any]] = []
    turns = []
    for city in CITIES:
        turn = Turn()
        question = {"type": "input_text", "text": f"What is the weather in {city}?"}
        items.append({"type": "message", "role": "user", "content": [question]})
        for _ in range(3):
            body = {
                "model": MODEL,
                "instructions": SYSTEM,
                "input": items,
                "tools": [{"type": "function", "strict": False, **FUNCTION}],
                "tool_choice": "auto",
                "parallel_tool_calls": False,
                "reasoning": {"effort": "medium", "summary": "auto"},
                "store": False,
                "stream": stream,
                "include": ["reasoning.encrypted_content"],
                "prompt_cache_key": "conversation-1",
                "temperature": 0,
                "max_output_tokens": 160,
            }
            reply = post("/v1/responses", body, {"originator": "codex_cli_rs"})
            assert reply.status_code == 200, reply.text
            if stream:
                output = [e["item"] for e in _events(reply) if e["type"] == "response.output_item.done"]
            else:
                output = reply.json()["output"]
            results = []
            for item in output:
                # Without what is the server's own: ids and states.
                kept = {k: v for k, v in item.items() if k not in ("id", "status") and v is not None}
                if item["type"] == "reasoning":
                    turn.reasoning += "".join(part["text"] for part in item["summary"])
                    kept = {"type": "reasoning", "summary": item["summary"], "content": None, "encrypted_content": None}
                elif item["type"] == "message":
                    turn.answer += "".join(part["text"] for part in item["content"])
                else:
                    turn.calls.append((item["name"], json.loads(item["arguments"])))
                    results.append({"type": "function_call_output", "call_id": item["call_id"], "output": RESULT})
                items.append(kept)
            items += results
            if not results:
                break
        turns.append(turn)
    return turns


def on_messages(post: Post, stream: bool) -> list[Turn]:
    messages: list[dict[str, Any]] = []
    turns = []
    for city in CITIES:
        turn = Turn()
        question = {"type": "text", "text": f"What is the weather in {city}?", "cache_control": {"type": "ephemeral"}}
        messages.append({"role": "user", "content": [question]})
        for _ in range(3):
            body = {
                "model": MODEL,
                "system": [{"type": "text", "text": SYSTEM, "cache_control": {"type": "ephemeral"}}],
                "messages": messages,
                "tools": [{"name": "get_weather", "description": FUNCTION["description"], "input_schema": PARAMETERS}],
                "tool_choice": {"type": "auto"},
                "metadata": {"user_id": "user_1_account__session_1"},
                "thinking": {"type": "enabled", "budget_tokens": 1024},
                "max_tokens": 160,
                "temperature": 0,
                "stream": stream,
            }
            headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "interleaved-thinking-2025-05-14"}
            reply = post("/v1/messages?beta=true", body, headers)
            assert reply.status_code == 200, reply.text
            blocks = _blocks(_events(reply)) if stream else reply.json()["content"]
            messages.append({"role": "assistant", "content": blocks})
            results = []
            for block in blocks:
                if block["type"] == "thinking":
                    turn.reasoning += block["thinking"]
                elif block["type"] == "text":
                    turn.answer += block["text"]
                else:
                    turn.calls.append((block["name"], block["input"]))
                    told = [{"type": "text", "text": RESULT}]
                    results.append({"type": "tool_result", "tool_use_id": block["id"], "content": told})
            if not results:
                break
            messages.append({"role": "user", "content": results})
        turns.append(turn)
    return turns


def _blocks(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The blocks of a stream, as the client puts them together."""
    blocks: list[dict[str, Any]] = []
    for event in events:
        if event["type"] == "content_block_start":
            blocks.append({k: v for k, v in event["content_block"].items() if v is not None})
        delta = event.get("delta") or {}
        kind = delta.get("type")
        if kind == "text_delta":
            blocks[-1]["text"] += delta["text"]
        elif kind == "thinking_delta":
            blocks[-1]["thinking"] += delta["thinking"]
        elif kind == "signature_delta":
            blocks[-1]["signature"] = delta["signature"]
        elif kind == "input_json_delta":
            blocks[-1]["partial"] = blocks[-1].get("partial", "") + delta["partial_json"]
    for block in blocks:
        if block["type"] == "tool_use":
            block["input"] = json.loads(block.pop("partial", "") or "{}")
    return blocks
