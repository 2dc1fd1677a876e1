"""Engines of the GPU tests: a small share of the card, CUDA graphs, and what the graphs drafted beside the original.

In a rehearsal the same on a CPU: small heads, no graphs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.gpu.parts import REHEARSAL, ROOT
from tests.support import engine

CARDS = int(os.environ.get("GEMMA4_GPU_CARDS", "1"))
K, TOKENS = 3, 48
LENGTHS = [5, 17, 40, 90, 150, 33, 64]  # seven requests, four at a time: batches of 1, 2, 3 and 4
HEADS = {"head_dim": 32, "global_head_dim": 64} if REHEARSAL else {"head_dim": 256, "global_head_dim": 512}
TIE = 1e-4  # difference of two log-probabilities; float32 logits of these models are 2e-4 off those of float64
_COUNTS = "gemma4_spec_test_counts"


def options(k: int | None = K, mode: int = 0, **changes: Any) -> dict[str, Any]:
    """Settings of an engine for four requests that drafts ``k`` tokens (None: none).

    Args:
        mode: vLLM's compilation mode, 0 or 3.
    """
    if REHEARSAL:
        return {"max_num_seqs": 4, "enforce_eager": True, **changes}
    query = 1 if k is None else k + 1
    sizes = [1, 2, 4] if k is None else [query, 2 * query, 4 * query]  # three requests are padded to four
    return {
        "max_num_seqs": 4,
        "enforce_eager": False,
        "gpu_memory_utilization": 0.05,  # checked at the start only: the next line sizes the cache
        "kv_cache_memory_bytes": 1 << 29,
        "compilation_config": {
            "mode": mode,
            "cudagraph_mode": "FULL_AND_PIECEWISE" if mode else "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": sizes,
        },
        **changes,
    }


def ranks(count: int, backend: str = "mp") -> dict[str, Any]:
    """Settings of an engine with ``count`` tensor-parallel ranks."""
    return {"tensor_parallel_size": count, "distributed_executor_backend": backend} if count > 1 else {}


def compare_with_original(worker: Any) -> None:
    """In the worker: run the original ``propose`` beside every replay of a draft graph, and count what differs."""
    from vllm_gemma4_spec.performance.draft_graphs import GRAPHS

    runner = getattr(worker, "model_runner", None) or worker.worker.model_runner
    drafter = runner.drafter
    counts = {"steps": 0, "replays": 0, "padded": 0, "different": 0}
    graphs = drafter.__dict__.get(GRAPHS)
    bound = drafter.propose

    def propose(**kwargs: Any) -> Any:
        counts["steps"] += 1
        cad, rejected = kwargs["common_attn_metadata"], kwargs.get("num_rejected_tokens_gpu")
        drafts = bound(**kwargs)
        if graphs is not None and graphs.fits(cad, rejected, kwargs.get("mm_embed_inputs")):
            counts["replays"] += 1
            counts["padded"] += cad.num_reqs not in graphs.batch_sizes
            again = bound.__func__.__wrapped__(drafter, **kwargs)
            counts["different"] += int((drafts != again).sum())
        return drafts

    drafter.propose = propose
    setattr(drafter, _COUNTS, counts)


def read_counts(worker: Any) -> dict[str, int]:
    runner = getattr(worker, "model_runner", None) or worker.worker.model_runner
    return dict(getattr(runner.drafter, _COUNTS))


@dataclass
class Run:
    """What an engine answered, and what became of its drafts."""

    tokens: list[list[int]]
    proposed: int = 0
    accepted: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    near_ties: int = 0

    @property
    def acceptance(self) -> float:
        return self.accepted / max(1, self.proposed)

    def numbers(self) -> dict[str, Any]:
        return {"proposed": self.proposed, "accepted": self.accepted, **self.counts}


def ask(llm: Any, prompts: Sequence[list[int]], limits: int | Sequence[int]) -> Run:
    """Greedy answers of a running engine and the drafts spent on them."""
    before = engine.acceptance(llm)
    tokens = engine.generate(llm, prompts, limits)
    spent = engine.acceptance(llm) - before
    return Run(tokens, spent.proposed, spent.accepted)


def drafted(llm: Any, prompts: Sequence[list[int]], limits: int | Sequence[int]) -> Run:
    """As :func:`ask`, with every replay compared with the original on every rank."""
    llm.collective_rpc(compare_with_original)
    found = ask(llm, prompts, limits)
    for counts in llm.collective_rpc(read_counts):
        found.counts = counts
        assert not counts["different"], f"a graph drafted other tokens than the original: {counts}"
    return found


def near_ties(leads: Sequence[Sequence[float]]) -> int:
    """Tokens whose log-probability is nearer than ``TIE`` to that of the next best, of leads as :func:`lead` gives."""
    return sum(by < TIE for row in leads for by in row)


def lead(llm: Any, prompts: Sequence[list[int]], limits: Sequence[int]) -> tuple[list[list[int]], list[list[float]]]:
    """Greedy answers, and of each token by how much its log-probability leads that of the next best."""
    from vllm import SamplingParams

    params = [
        SamplingParams(max_tokens=n, temperature=0, ignore_eos=True, detokenize=False, logprobs=2) for n in limits
    ]
    outputs = [o.outputs[0] for o in llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)]
    best = [[sorted(found.logprob for found in row.values())[-2:] for row in o.logprobs] for o in outputs]
    return [list(o.token_ids) for o in outputs], [[high - low for low, high in rows] for rows in best]


def same_answers(
    found: list[list[int]], wanted: list[list[int]], leads: list[list[float]] | None = None, most: int = 1
) -> int:
    """Asserts that they are equal, and says where they part.

    Args:
        leads: of :func:`lead`; where a token leads by less than ``TIE`` float32 decides nothing, and what follows may
            be another answer.
        most: requests that may part so.

    Returns:
        How many did.
    """
    ties = 0
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        at = next((j for j, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        if leads is not None and len(a) == len(b) and at < len(b) and leads[i][at] < TIE:
            ties += 1
            continue
        assert a == b, f"request {i} differs from token {at} of {len(b)} on: {a[at : at + 4]} for {b[at : at + 4]}"
    assert ties <= most
    return ties


def replayed(found: Run, padded: bool = True) -> None:
    """Asserts that graphs served the decode steps. A CPU has none."""
    if not REHEARSAL:
        assert found.counts["replays"] > 0, found.counts
        assert not padded or found.counts["padded"] > 0, found.counts


def models(folder: Path, **changes: Any) -> dict[str, Path]:
    """Tiny checkpoints with this device's head sizes: a target, an E4B-like drafter and a near copy of the target."""
    from tests.support import tiny_models

    target = tiny_models.save(tiny_models.target_config(**HEADS, **changes), folder / "target")
    return {
        "target": target,
        "drafter": tiny_models.save(tiny_models.drafter_config(**HEADS, **changes), folder / "drafter", seed=1),
        "close": tiny_models.perturbed(target, folder / "close"),
    }


def two_starts(module: str, target: Path, drafter: Path, folder: Path, limit: int) -> tuple[Any, Any]:
    """What ``python -m MODULE TARGET DRAFTER RESULT`` wrote in two processes, the second with the first one's caches.

    Args:
        folder: for caches and results.
        limit: seconds of a start.
    """
    env = os.environ | {"VLLM_CACHE_ROOT": str(folder / "cache"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    runs = []
    for turn in ("first", "second"):
        result = folder / f"{turn}.json"
        command = [sys.executable, "-m", module, str(target), str(drafter), str(result)]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=limit, check=False)
        assert result.exists(), (done.stdout + done.stderr)[-4000:]
        runs.append(json.loads(result.read_text()))
    return runs[0], runs[1]
