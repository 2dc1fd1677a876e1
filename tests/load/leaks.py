"""What a server holds: memory and file handles of its processes, requests and blocks of its engine."""

from __future__ import annotations

import time
from dataclasses import dataclass

import psutil

from vllm_gemma4_spec.demo.server import Server
from vllm_gemma4_spec.ops import live
from vllm_gemma4_spec.ops import server as http


@dataclass(frozen=True)
class Held:
    """``memory`` in MiB (resident, all processes), ``handles`` and ``threads`` of all processes."""

    memory: float
    handles: int
    threads: int
    processes: int


def held(server: Server) -> Held:
    leader = psutil.Process(server.pid)
    family = [leader, *leader.children(recursive=True)]
    return Held(
        sum(p.memory_info().rss for p in family) / 2**20,
        sum(p.num_fds() for p in family),
        sum(p.num_threads() for p in family),
        len(family),
    )


def metrics(server: Server) -> dict[str, float]:
    return live.sample_server(http.samples(server.url), time.monotonic()).values


def settled(server: Server, seconds: float = 60.0) -> dict[str, float]:
    """The engine's metrics once no request is left, or after ``seconds``."""
    end = time.monotonic() + seconds
    while True:
        now = metrics(server)
        busy = now["vllm:num_requests_running"] + now["vllm:num_requests_waiting"] + now["vllm:kv_cache_usage_perc"]
        if not busy or time.monotonic() > end:
            return now
        time.sleep(0.5)
