"""The real vLLM engine on the CPU, in this process, with tiny models."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Tiny matrices: threads that spin for each other cost more than they compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")  # of vLLM's n-gram proposer
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_GEMMA4_SPEC_CHECK", "1")

Prompt = list[int]


_freeze = gc.freeze


def keep_out_of_gc() -> None:
    """What there is now, modules above all, is looked at no more when garbage is collected.

    vLLM collects five times per engine, half a second each with all of torch, and thaws everything at its end.
    """
    gc.collect()
    _freeze()
    gc.freeze = gc.unfreeze = lambda: None


@functools.cache
def _first_engine_ended() -> None:
    keep_out_of_gc()  # the modules that an engine imports when it runs


@contextlib.contextmanager
def engine(model: Path, drafter: Path | None = None, k: int = 3, **options: Any) -> Iterator[Any]:
    """An ``LLM`` in float32 without a tokenizer; with ``drafter`` it speculates ``k`` tokens ahead."""
    import torch
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    import vllm_gemma4_spec

    vllm_gemma4_spec.apply()  # another test may have undone a patch; vLLM loads plugins once per process

    settings: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "max_model_len": 1024,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 2048,
        "block_size": 16,
        "num_gpu_blocks_override": 2048,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
    } | options
    if drafter is not None:
        speculative = {"method": "draft_model", "model": str(drafter), "num_speculative_tokens": k}
        settings["speculative_config"] = speculative | settings.pop("speculative", {})
    # vLLM compiles helpers of its sampler and of log-probabilities even in eager mode: half a minute for one call.
    eager = torch.compiler.set_stance("force_eager") if settings["enforce_eager"] else contextlib.nullcontext()
    with eager:
        llm = LLM(str(model), **settings)
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            cleanup_dist_env_and_memory()
            gc.collect()
            _first_engine_ended()


def generate(
    llm: Any, prompts: Sequence[Prompt], max_tokens: int | Sequence[int] = 32, **sampling: Any
) -> list[Prompt]:
    """Token ids of the answers; greedy and without an end of sequence unless ``sampling`` says otherwise."""
    from vllm import SamplingParams

    limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens
    values = {"temperature": 0.0, "ignore_eos": True, "detokenize": False} | sampling
    params = [SamplingParams(max_tokens=n, **values) for n in limits]
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [list(o.outputs[0].token_ids) for o in outputs]


@dataclass(frozen=True)
class Acceptance:
    """Counters of speculative decoding since the engine started."""

    drafts: int
    proposed: int
    accepted: int

    def __sub__(self, other: Acceptance) -> Acceptance:
        return Acceptance(self.drafts - other.drafts, self.proposed - other.proposed, self.accepted - other.accepted)


def acceptance(llm: Any) -> Acceptance:
    """Read the counters that ``/metrics`` shows (Prometheus: they go on over all engines of a process)."""
    values = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    return Acceptance(
        *(int(values.get(f"vllm:spec_decode_num_{name}", 0)) for name in ("drafts", "draft_tokens", "accepted_tokens"))
    )


def random_prompts(lengths: Sequence[int], vocab: int = 512, seed: int = 1) -> list[Prompt]:
    """Prompts without control tokens (ids below 3)."""
    import torch

    g = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab, (n,), generator=g).tolist() for n in lengths]
