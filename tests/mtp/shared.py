"""One engine with an assistant that several tests share, and what plain decoding answers to the same jobs."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.mtp import pairs
from tests.mtp.digest import digest
from tests.mtp.drafts import Draft, Watched
from tests.support.engine import Acceptance, acceptance, engine, generate, random_prompts

RECORDED = Path(__file__).parent / "recorded"
K = 8
# Prompts come in chunks, four requests at a time, and the prefix cache is on.
OPTIONS: dict[str, Any] = {
    "max_model_len": 256,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "enable_prefix_caching": True,
    "num_gpu_blocks_override": 512,
}
# A random network makes about ten of one rounding in each pass. Measured on the CPU over 383 drafts of eight passes:
# beside the reference on the engine's own state and KV, the first other token is that of pass 6 (10 drafts in all);
# beside transformers, whose target rounds otherwise, that of pass 4 (60 drafts in all).
SURE = 3


def agreement(drafts: list[tuple[list[int], list[int]]]) -> float:
    """Share of drafts that are equal as a whole; their first ``SURE`` passes must be in all."""
    assert [made[:SURE] for made, _ in drafts] == [wanted[:SURE] for _, wanted in drafts]
    return sum(made == wanted for made, wanted in drafts) / len(drafts)


@functools.cache
def recorded(kind: str) -> dict[str, Any]:
    """What ``record_with_transformers.py`` wrote."""
    made: dict[str, Any] = json.loads((RECORDED / f"{kind}.json").read_text())
    return made


def of_transformers(made: dict[str, Any]) -> dict[tuple[int, ...], list[int]]:
    """Context, the token that was just chosen included -> transformers' draft."""
    return {
        tuple(row["prompt"] + row["answer"][: i + 1]): draft
        for row in made["rows"]
        for i, draft in enumerate(row["drafts"])
    }


def jobs(kind: str) -> dict[str, tuple[list[list[int]], Any]]:
    """Prompts and answer lengths, no prompt in two jobs."""
    rows = recorded(kind)["rows"]
    again = random_prompts((15, 17, 65, 180), seed=5)
    again += [[*p[: len(p) * 2 // 3 + 1], 7, 8, 9] for p in again] + again
    return {
        "recorded": ([row["prompt"] for row in rows], len(rows[0]["answer"])),
        "prefixes": (again, 6),
        "longest": (random_prompts((224,), seed=6), 32),
        "replayed": (random_prompts((5, 40, 90, 17, 33), seed=7), [20, 26, 32, 38, 44]),
    }


def counter(llm: Any, name: str) -> int:
    return sum(int(m.value) for m in llm.get_metrics() if m.name == name)


@dataclass
class Done:
    """A job's answers, prompt tokens found in the prefix cache, and with an assistant its drafts."""

    answers: list[list[int]]
    hits: int
    drafts: list[Draft]
    spent: Acceptance


def do(llm: Any, job: tuple[list[list[int]], Any], watched: Watched | None = None) -> Done:
    hits, before = counter(llm, "vllm:prefix_cache_hits"), acceptance(llm)
    start = len(watched.drafts) if watched else 0
    answers = generate(llm, *job)
    found = counter(llm, "vllm:prefix_cache_hits") - hits
    return Done(answers, found, watched.drafts[start:] if watched else [], acceptance(llm) - before)


def cache(llm: Any, without: frozenset[str] = frozenset()) -> list[Any]:
    """Everything of the KV cache's configuration, layers in ``without`` apart."""
    config = llm.llm_engine.model_executor.driver_worker.worker.model_runner.kv_cache_config
    groups = [(sorted(set(g.layer_names) - without), g.kv_cache_spec) for g in config.kv_cache_groups]
    return [config.num_blocks, [t.size for t in config.kv_cache_tensors], groups]


class Shared:
    """An engine of a kind with its assistant; ``plain`` and ``plain_cache`` are those of one without, now gone."""

    def __init__(self, kind: str, target: Path, assistant: Path, llm: Any, plain: dict[str, Done], cached: Any) -> None:
        self.kind, self.target, self.assistant, self.llm = kind, target, assistant, llm
        self.plain, self.plain_cache, self.jobs = plain, cached, jobs(kind)
        self.watched = Watched(llm, assistant)
        self.drafter = self.watched.runner.drafter

    def do(self, job: str) -> Done:
        """``job`` with the assistant; its answers are plain decoding's."""
        done = do(self.llm, self.jobs[job], self.watched)
        assert done.answers == self.plain[job].answers
        assert done.drafts
        return done


@contextmanager
def shared(kind: str, folder: Path) -> Iterator[Shared]:
    target, assistant = pairs.save_pair(kind, folder)
    assert [digest(target), digest(assistant)] == recorded(kind)["weights"], "other weights than were recorded"
    with engine(target, **OPTIONS) as llm:
        plain = {name: do(llm, job) for name, job in jobs(kind).items()}
        cached = cache(llm)
    drafting = {"speculative_config": {"model": str(assistant), "num_speculative_tokens": K}}
    with engine(target, **drafting, **OPTIONS) as llm:
        yield Shared(kind, target, assistant, llm, plain, cached)
