"""What a server did between two looks at its ``/metrics``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from vllm_gemma4_spec.ops.output import Output
from vllm_gemma4_spec.ops.server import Sample

_SPEC = "vllm:spec_decode_num"


@dataclass(frozen=True)
class Look:
    """Counters and gauges summed over engines; ``accepted`` maps a draft position (from 0) to its counter."""

    seconds: float
    values: dict[str, float]
    accepted: dict[int, float]
    patches: dict[str, int] = field(default_factory=dict)
    processes: int = 0


def look(samples: Iterable[Sample], seconds: float) -> Look:
    """``seconds``: a monotonic clock's time of the samples."""
    values: dict[str, float] = {}
    accepted: dict[int, float] = {}
    patches: dict[str, int] = {}
    processes = 0
    for sample in samples:
        if sample.name == f"{_SPEC}_accepted_tokens_per_pos_total":
            position = int(sample.labels["position"])
            accepted[position] = accepted.get(position, 0.0) + sample.value
        elif sample.name == "gemma4_spec_patch_on":
            patch = sample.labels["patch"]
            patches[patch] = patches.get(patch, 0) + int(sample.value)
        else:
            processes += sample.name == "gemma4_spec_process"
            values[sample.name] = values.get(sample.name, 0.0) + sample.value
    return Look(seconds, values, accepted, patches, processes)


class Live(Output):
    """Rates between two looks."""

    running: int
    """requests being decoded"""
    waiting: int
    """requests in the queue"""
    kv_cache_used: float
    """0 to 1"""
    output_tok_s: float
    """tokens per second, all requests"""
    drafts_per_s: float
    """drafts verified, one per request and step"""
    drafts_skipped: int
    """drafts not made in the interval, within k tokens of the maximum length"""
    tokens_per_step: float | None
    """per request, the target's own token counted; null: no draft was verified"""
    accepted_by_position: tuple[float, ...]
    """shares of drafts, 0 to 1; empty: no draft was verified"""
    nan_blocks_repaired: int
    """NaN block scales mended since the server loaded its models"""
    patches: dict[str, int]
    """patch to the number of processes in which it is on"""
    processes: int
    """processes that report"""


def between(one: Look, two: Look) -> Live:
    seconds = max(two.seconds - one.seconds, 1e-9)

    def grown(name: str) -> float:
        return max(0.0, two.values.get(name, 0.0) - one.values.get(name, 0.0))

    drafts = grown(f"{_SPEC}_drafts_total")
    shares = [(two.accepted[p] - one.accepted.get(p, 0.0)) / drafts for p in sorted(two.accepted)] if drafts else []
    return Live(
        running=int(two.values.get("vllm:num_requests_running", 0)),
        waiting=int(two.values.get("vllm:num_requests_waiting", 0)),
        kv_cache_used=two.values.get("vllm:kv_cache_usage_perc", 0.0),
        output_tok_s=grown("vllm:generation_tokens_total") / seconds,
        drafts_per_s=drafts / seconds,
        drafts_skipped=int(grown("gemma4_spec_drafts_skipped_total")),
        tokens_per_step=1 + sum(shares) if drafts else None,
        accepted_by_position=tuple(shares),
        nan_blocks_repaired=int(two.values.get("gemma4_spec_nan_blocks_repaired_total", 0)),
        patches=two.patches,
        processes=two.processes,
    )
