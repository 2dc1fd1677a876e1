"""One run of load: alone first, then everyone at once, in rounds between which the server is looked at."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.load import clients, leaks
from tests.load.requests import pool
from vllm_gemma4_spec.demo import run as demo
from vllm_gemma4_spec.demo.build import Pair
from vllm_gemma4_spec.demo.server import Server

ROUNDS = 6


@dataclass
class Result:
    """``rounds`` are what the server held when it was idle again, the first of them after a round to warm up;
    ``alone`` the greedy answers that were asked for one by one."""

    alone: dict[int, clients.Answer] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    different: list[Any] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    rounds: list[leaks.Held] = field(default_factory=list)
    left: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    preempted: int = 0
    accepted: int = 0

    def lines(self) -> Iterator[str]:
        yield f"{self.counts.total():,} requests in {self.seconds:.0f} s: " + ", ".join(
            f"{n:,} {what}" for what, n in sorted(self.counts.items())
        )
        yield f"errors not asked for: {len(self.errors)}"
        yield f"greedy answers unlike those given alone: {len(self.different)}"
        yield f"preemptions: {self.preempted:,}; drafts accepted: {self.accepted:,}"
        yield f"left when idle: {self.left}"
        for number, held in enumerate(self.rounds):
            yield (
                f"after round {number}: {held.memory:,.0f} MiB, {held.handles} file handles, {held.threads} threads, "
                f"{held.processes} processes"
            )
        yield from (f"error: {e}" for e in self.errors[:10])
        yield from (f"request {key}: alone {one}, under load {other}" for key, one, other in self.different[:5])


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    kept = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)


def run(
    pair: Pair,
    log: Path,
    requests: int,
    at_once: int = 64,
    speculate: bool = True,
    overlay: bool = True,
    seqs: int = 32,
    blocks: int = 700,
    questions: int = 60,
    seed: int = 1,
    step: Callable[[str], None] = lambda text: None,
) -> Result:
    """
    Args:
        overlay: otherwise vLLM as it is, which speculates on no CPU.
        seqs: requests that the engine runs at once; the other clients' wait.
        blocks: of the KV cache; few enough that requests are preempted.
        questions: different greedy requests, each of which is first asked alone.
    """
    arguments = demo.serve_arguments(pair, speculate and overlay)
    arguments += ["--max-num-seqs", str(seqs), "--block-size", "16", "--num-gpu-blocks-override", str(blocks)]

    result = Result()
    asked = pool(questions)
    switches = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_GEMMA4_SPEC": str(int(overlay))}
    # glibc keeps the holes that tensors of ever other sizes leave; given back, what is resident is what is held.
    switches["MALLOC_MMAP_THRESHOLD_"] = "131072"
    # A server that stalls for as long as this closes idle connections before it sees what has just come on them.
    switches["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"] = "600"
    with environment(**switches), Server(arguments, log) as server:
        wanted = result.alone = asyncio.run(clients.alone(server.url, asked))
        step(f"{len(wanted)} answers given alone")
        began = time.monotonic()
        for number in range(ROUNDS):
            count = requests // ROUNDS
            found = asyncio.run(clients.load(server.url, asked, wanted, count, at_once, seed + number))
            result.counts += found.counts
            result.different += found.different
            result.errors += found.errors
            assert server.wait(0) is None, f"the server ended in round {number}:\n{log.read_text()[-5000:]}"
            left = leaks.settled(server)
            time.sleep(1)  # connections that the clients closed
            result.rounds.append(leaks.held(server))
            step(
                f"round {number}: {found.counts.total()} requests, {len(found.different)} answers unlike those given "
                f"alone, {len(found.errors)} errors, {result.rounds[-1]}"
            )
            for more in (*found.errors[:3], *found.different[:3]):
                step(str(more))
        result.seconds = time.monotonic() - began
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
        result.left = {name.removeprefix("vllm:"): left[name] for name in names}
        result.preempted = int(left.get("vllm:num_preemptions_total", 0))
        result.accepted = int(left.get("vllm:spec_decode_num_accepted_tokens_total", 0))
    return result
