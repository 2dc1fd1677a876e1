"""What a server did between two samples at its ``/metrics``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from vllm_gemma4_spec.ops.output import Output
from vllm_gemma4_spec.ops.server import Sample

_SPEC = "vllm:spec_decode_num"


@dataclass(frozen=True)
class ServerSample:
    """Counters and gauges summed over engines; ``accepted`` maps a draft position (from 0) to its counter.

    ``server``: labels of ``gemma4_spec_server`` (model, method, k, …); without it, what vLLM's own samples say.
    """

    seconds: float
    values: dict[str, float]
    accepted: dict[int, float]
    patches: dict[str, int] = field(default_factory=dict)
    processes: int = 0
    server: dict[str, str] = field(default_factory=dict)


def sample_server(samples: Iterable[Sample], seconds: float) -> ServerSample:
    """``seconds``: a monotonic clock's time of the samples."""
    values: dict[str, float] = {}
    accepted: dict[int, float] = {}
    patches: dict[str, int] = {}
    processes = 0
    info: dict[str, str] = {}
    for sample in samples:
        if sample.name == f"{_SPEC}_accepted_tokens_per_pos_total":
            position = int(sample.labels["position"])
            accepted[position] = accepted.get(position, 0.0) + sample.value
        elif sample.name == "gemma4_spec_patch_on":
            patch = sample.labels["patch"]
            patches[patch] = patches.get(patch, 0) + int(sample.value)
        elif sample.name == "gemma4_spec_server":
            info |= sample.labels
        else:
            if "model_name" in sample.labels:
                info.setdefault("served", sample.labels["model_name"])
            processes += sample.name == "gemma4_spec_process"
            values[sample.name] = values.get(sample.name, 0.0) + sample.value
    return ServerSample(seconds, values, accepted, patches, processes, info)


class Live(Output):
    """Rates and means between two samples."""

    model: str
    """the name that clients use; empty: the server does not say"""
    method: str
    """draft_model, eagle, …; empty: no speculation, or the plugin does not report"""
    k: int
    """num_speculative_tokens; 0: no speculation"""
    running: int
    """requests being decoded"""
    waiting: int
    """requests in the queue"""
    preempted: int
    """requests preempted in the interval"""
    kv_cache_used: float
    """0 to 1"""
    prefix_hits: float | None
    """share of the prompts' tokens found in the prefix cache, 0 to 1; null: no prompt in the interval"""
    output_tok_s: float
    """tokens per second, all requests"""
    ttft_ms: float | None
    """mean time to first token; null: no first token in the interval"""
    itl_ms: float | None
    """mean inter-token latency; null: no token in the interval"""
    drafts_per_s: float
    """drafts verified, one per request and step"""
    drafts_skipped: int
    """drafts not made in the interval, because the batch was near the maximum length"""
    acceptance_length: float | None
    """mean tokens that a step with drafts adds to a request, the target's own counted; null: no draft was verified"""
    accepted_by_position: tuple[float, ...]
    """shares of drafts, 0 to 1, position 0 first; empty: no draft was verified"""
    nan_blocks_repaired: int
    """NaN block scales repaired since the server loaded its models"""
    patches: dict[str, int]
    """patch to the number of processes in which it is on"""
    processes: int
    """processes that report"""


def between(one: ServerSample, two: ServerSample) -> Live:
    """After a restart of the server between the samples its counters begin anew: all of ``two`` counts."""
    counters = [(one.values.get(n, 0.0), v) for n, v in two.values.items() if n.endswith("_total")]
    counters += [(n, two.accepted.get(p, 0.0)) for p, n in one.accepted.items()]
    if any(after < before for before, after in counters):
        one = ServerSample(one.seconds, {}, {})
    seconds = max(two.seconds - one.seconds, 1e-9)

    def grown(name: str) -> float:
        return max(0.0, two.values.get(name, 0.0) - one.values.get(name, 0.0))

    def mean(histogram: str) -> float | None:
        count = grown(f"{histogram}_count")
        return 1e3 * grown(f"{histogram}_sum") / count if count else None

    drafts = grown(f"{_SPEC}_drafts_total")
    shares = [(two.accepted[p] - one.accepted.get(p, 0.0)) / drafts for p in sorted(two.accepted)] if drafts else []
    queries = grown("vllm:prefix_cache_queries_total")
    return Live(
        model=two.server.get("served", ""),
        method=two.server.get("method", ""),
        k=len(two.accepted),
        running=int(two.values.get("vllm:num_requests_running", 0)),
        waiting=int(two.values.get("vllm:num_requests_waiting", 0)),
        preempted=int(grown("vllm:num_preemptions_total")),
        kv_cache_used=two.values.get("vllm:kv_cache_usage_perc", 0.0),
        prefix_hits=grown("vllm:prefix_cache_hits_total") / queries if queries else None,
        output_tok_s=grown("vllm:generation_tokens_total") / seconds,
        ttft_ms=mean("vllm:time_to_first_token_seconds"),
        itl_ms=mean("vllm:inter_token_latency_seconds"),
        drafts_per_s=drafts / seconds,
        drafts_skipped=int(grown("gemma4_spec_drafts_skipped_total")),
        acceptance_length=1 + sum(shares) if drafts else None,
        accepted_by_position=tuple(shares),
        nan_blocks_repaired=int(two.values.get("gemma4_spec_nan_blocks_repaired_total", 0)),
        patches=two.patches,
        processes=two.processes,
    )
