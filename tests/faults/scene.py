"""A server with requests in flight, a fault, and what became of both."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.load.clients import PATH, client
from tests.load.requests import Asked
from tests.load.run import environment
from vllm_gemma4_spec.demo import run as demo
from vllm_gemma4_spec.demo.build import Pair
from vllm_gemma4_spec.demo.server import Server

ROOT = Path(__file__).parents[2]
PROGRAM = (sys.executable, "-m", "tests.faults.serve", "serve")
HANG_SECONDS = 300.0


@dataclass
class Outcome:
    """``ends``: how the answers ended; ``wrong``: texts that are no beginning of the right one; ``exit_code`` of the
    server, None while it runs; ``left``: processes of it that outlived it."""

    ends: Counter[str] = field(default_factory=Counter)
    wrong: list[tuple[int, str, str]] = field(default_factory=list)
    exit_code: int | None = None
    seconds: float = 0.0
    left: int = 0


@contextmanager
def server(
    pair: Pair, log: Path, overlay: bool, more: Sequence[str] = (), eager: bool = True, **switches: str
) -> Iterator[Server]:
    """The demo's server with speculation, or stock vLLM without (it has none on a CPU)."""
    arguments = [a for a in demo.serve_arguments(pair, speculate=overlay) if eager or a != "--enforce-eager"]
    common = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_GEMMA4_SPEC": str(int(overlay))}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with (
        environment(**common, PYTHONPATH=path, **switches),
        Server([*arguments, *more], log, program=PROGRAM) as running,
    ):
        yield running


async def follow(http: httpx.AsyncClient, asked: Asked, begun: set[int] | None = None) -> tuple[str, str]:
    """Reasoning and content as far as they came, and how the stream ended; its key is in ``begun`` once text came."""
    text, finish = "", None
    try:
        async with http.stream("POST", PATH, json={**asked.body, "stream": True}) as reply:
            if reply.status_code != 200:
                return text, f"status {reply.status_code}"
            async for line in reply.aiter_lines():
                if line == "data: [DONE]":
                    return text, "whole" if finish in ("stop", "length", "tool_calls") else f"finish reason {finish}"
                if line.startswith("data: "):
                    chunk = json.loads(line[6:])
                    if "error" in chunk:
                        return text, "error in the stream"
                    for choice in chunk["choices"]:
                        finish = choice.get("finish_reason") or finish
                        text += (choice["delta"].get("reasoning") or "") + (choice["delta"].get("content") or "")
                    if text and begun is not None:
                        begun.add(asked.key)
            return text, "stream cut"
    except httpx.TimeoutException:
        return text, "hung"
    except httpx.HTTPError:
        return text, "connection closed"


async def _everyone(
    url: str, requests: Sequence[Asked], wanted: dict[int, str], trigger: Callable[[], None], outcome: Outcome
) -> None:
    async with client(url, len(requests) + 1) as http:
        begun: set[int] = set()
        flows = [asyncio.create_task(follow(http, asked, begun)) for asked in requests]
        while len(begun) < 2:  # not a metric of it: that is as old as the engine's last report
            assert not all(flow.done() for flow in flows), "answered before the fault"
            await asyncio.sleep(0.005)
        trigger()
        for asked, (text, end) in zip(requests, await asyncio.gather(*flows), strict=True):
            outcome.ends[end] += 1
            right = wanted[asked.key]
            if text != right if end == "whole" else not right.startswith(text):
                outcome.wrong.append((asked.key, right, text))


def right_answers(url: str, requests: Sequence[Asked]) -> dict[int, str]:
    async def ask() -> dict[int, str]:
        async with client(url, len(requests)) as http:
            found = await asyncio.gather(*(follow(http, asked) for asked in requests))
        assert {end for _, end in found} == {"whole"}, found
        return {asked.key: text for asked, (text, _) in zip(requests, found, strict=True)}

    return asyncio.run(ask())


def play(
    running: Server, requests: Sequence[Asked], wanted: dict[int, str], trigger: Callable[[Server], None]
) -> Outcome:
    """All requests at once; ``trigger`` is called while at least two of them are being answered."""
    outcome = Outcome()
    asyncio.run(_everyone(running.url, requests, wanted, lambda: trigger(running), outcome))
    return outcome


def ended(running: Server, family: Sequence[psutil.Process], outcome: Outcome) -> Outcome:
    """Wait for the server's end, then for that of its processes."""
    began = time.monotonic()
    outcome.exit_code = running.wait(HANG_SECONDS)
    outcome.seconds = time.monotonic() - began
    _, alive = psutil.wait_procs(list(family), timeout=30)
    outcome.left = len([p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE])
    return outcome


def family(running: Server) -> list[psutil.Process]:
    return psutil.Process(running.pid).children(recursive=True)


def process(running: Server, name: str) -> psutil.Process:
    """The child whose title has ``name`` in it."""
    found: list[Any] = [p for p in family(running) if name in " ".join(p.cmdline())]
    assert found, [p.cmdline() for p in family(running)]
    return found[0]
