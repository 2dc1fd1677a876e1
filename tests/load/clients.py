"""Clients at once: streamed or not, some of which hang up; every greedy answer is compared with the one given alone."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx

from tests.chat.server import streamed_choices, whole_choice
from tests.load.requests import Asked, mix

HANG_SECONDS = 300.0  # one answer on a busy machine takes seconds
PATH = "/v1/chat/completions"
Answer = dict[str, Any]


class Found:
    """What the clients met."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.different: list[tuple[int, Answer, Answer]] = []
        self.errors: list[str] = []


def client(url: str, clients: int = 1) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    return httpx.AsyncClient(base_url=url, timeout=HANG_SECONDS, limits=limits, trust_env=False)


async def ask(http: httpx.AsyncClient, asked: Asked, stream: bool, leave_after: float | None = None) -> Answer | None:
    """The answer in the plain form of the chat tests; None if the client hung up.

    Args:
        leave_after: hang up after so many chunks, or, when not streamed, after so many hundredths of a second.
    """
    # vLLM refuses some requests from a handler after which uvicorn closes the connection: not one to keep.
    headers = {"Connection": "close"} if asked.status != 200 else {}
    if not stream:
        post = http.post(PATH, json=asked.body, headers=headers)
        try:
            reply = await (post if leave_after is None else asyncio.wait_for(post, leave_after / 100))
        except (asyncio.TimeoutError, TimeoutError):
            return None
        if reply.status_code != 200:
            return {"status": reply.status_code, "body": reply.text[:300]}
        made = reply.json()
        return whole_choice(made["choices"][0], made["usage"]["completion_tokens"])
    body = {**asked.body, "stream": True, "stream_options": {"include_usage": True}}
    chunks: list[dict[str, Any]] = []
    async with http.stream("POST", PATH, json=body, headers=headers) as reply:
        if reply.status_code != 200:
            return {"status": reply.status_code, "body": (await reply.aread()).decode()[:300]}
        async for line in reply.aiter_lines():
            if line == "data: [DONE]":
                return streamed_choices(chunks)[0]
            if line.startswith("data: "):
                chunks.append(json.loads(line[6:]))
            if leave_after is not None and len(chunks) >= leave_after:
                return None
    return {"status": 200, "body": "the stream ended without [DONE]"}


async def alone(url: str, requests: list[Asked]) -> dict[int, Answer]:
    """Every request asked by itself, streamed and not in turn."""
    out: dict[int, Answer] = {}
    async with client(url) as http:
        for asked in requests:
            answer = await ask(http, asked, stream=bool(asked.key % 2))
            assert answer is not None
            assert "status" not in answer, answer
            out[asked.key] = answer
    return out


async def load(
    url: str,
    requests: list[Asked],
    wanted: dict[int, Answer],
    count: int,
    clients: int,
    seed: int,
    step: Callable[[int], None] = lambda done: None,
) -> Found:
    """``count`` requests from ``clients`` clients at once."""
    found = Found()
    left = iter(range(count))

    async def one(number: int, http: httpx.AsyncClient) -> None:
        rng = random.Random(seed * 1000 + number)
        for _ in left:
            asked = mix(requests, rng)
            stream = rng.random() < 0.5
            leaves = rng.random() < 0.1 and asked.status == 200
            kind = "streamed" if stream else "whole"
            try:
                answer = await ask(http, asked, stream, rng.randint(1, 30) if leaves else None)
            except (httpx.HTTPError, ValueError, AssertionError, KeyError) as error:
                found.errors.append(f"{kind} request {asked.key}: {error!r}, because of {root_cause(error)!r}")
                continue
            judge(found, asked, answer, kind, wanted)
            step(found.counts.total())

    async with client(url, clients) as http:
        await asyncio.gather(*(one(number, http) for number in range(clients)))
    return found


def root_cause(error: BaseException) -> BaseException:
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


def judge(found: Found, asked: Asked, answer: Answer | None, kind: str, wanted: dict[int, Answer]) -> None:
    if answer is None:
        found.counts["hung up"] += 1
    elif "status" in answer:
        if answer["status"] == asked.status:
            found.counts[f"refused as asked for ({asked.status})"] += 1
        else:
            found.errors.append(f"{kind} request {asked.key}: {answer}, wanted {asked.status}")
    elif asked.status != 200:
        found.errors.append(f"{kind} request {asked.key}: answered, wanted {asked.status}")
    elif not asked.greedy:
        found.counts[f"sampled, {kind}"] += 1
    else:
        found.counts[f"greedy, {kind}"] += 1
        if answer != wanted[asked.key]:
            found.different.append((asked.key, wanted[asked.key], answer))
