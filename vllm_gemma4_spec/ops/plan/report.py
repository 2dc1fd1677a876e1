"""The whole of ``plan`` as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vllm_gemma4_spec.ops.output import Output
from vllm_gemma4_spec.ops.plan import groups, timing
from vllm_gemma4_spec.ops.plan.groups import Group
from vllm_gemma4_spec.ops.plan.model import KV_BYTES, Model


class Size(Output):
    """One of the two models."""

    name: str
    weights: str
    """bf16, fp8, nvfp4 or float32"""
    layers: int
    weight_bytes: int
    """the text model as vLLM lays it out"""
    files_bytes: int | None
    """of the weight files; null without any"""


class Speed(Output):
    """At one acceptance."""

    tok_s: list[float]
    """all requests together, for k = 0, 1, …"""
    best_k: int
    """0: plain decoding is the fastest"""


class Machine(Output):
    """What fits on one machine and how fast it can be."""

    name: str
    bandwidth: float
    """bytes per second, measured where it was, else the data sheet's"""
    memory: float
    """bytes"""
    source: str
    fits: bool
    """weights and one request of `context` tokens"""
    copies: int
    """bytes of weights that kernels hold a second time"""
    kv_memory: int
    """bytes left for the KV cache"""
    requests_that_fit: float
    tokens_that_fit: int
    longest_prompt: int
    """tokens of the longest prompt that the KV cache holds, up to the target's own maximum"""
    target_ms: float
    """a step of the target alone; a floor (bytes / bandwidth) unless --target-ms was given"""
    verify_ms: list[float]
    """the target's pass over k + 1 tokens a request, for k = 0, 1, …"""
    draft_ms: float
    """a pass of the drafter; a floor unless --draft-ms was given"""
    step_ms: list[float]
    """a whole step with k drafts, for k = 0, 1, …"""
    acceptance: dict[str, Speed]
    """by acceptance as it was written"""


class Report(Output):
    """Everything that follows from the configs and the options."""

    target: Size
    drafter: Size | None
    context: int
    """tokens of each request"""
    requests: int
    bytes_per_target_step: int
    """weights read once, and the KV of all requests"""
    bytes_per_draft_step: int
    """of one pass of the drafter; 0 without one"""
    kv_bytes_per_target_step: int
    """of bytes_per_target_step"""
    kv_bytes_per_draft_step: int
    """of bytes_per_draft_step"""
    groups: list[Group]
    """in vLLM's order"""
    kv_bytes_per_token: int
    """growth past all windows"""
    kv_bytes_per_request: int
    """the most that one request of `context` tokens takes"""
    machines: list[Machine]


@dataclass(frozen=True)
class Measured:
    """Seconds that take the place of floors; ``overhead`` is added to every step with drafts."""

    target: float | None = None
    draft: float | None = None
    overhead: float = 0.0


def make(
    target: Model,
    drafter: Model | None,
    machines: Sequence[timing.Hardware],
    curves: Mapping[str, tuple[float, ...]],
    *,
    requests: int,
    context: int,
    kv_dtype: str,
    utilization: float,
    measured: Measured,
) -> Report:
    """``curves``: acceptance as written -> rate of each position.

    Raises:
        VersionError: vLLM 0.19.1 is not installed here.
        PlanError: the layers' page sizes cannot be unified.
    """
    load = timing.Workload(requests, context, KV_BYTES[kv_dtype])
    weights = sum(m.files_bytes or m.weight_bytes for m in (target, drafter) if m)
    made, cache = [], None
    for machine in machines:
        copies = target.copies(machine.marlin, machine.memory, drafter=False)
        copies += drafter.copies(machine.marlin, machine.memory, drafter=True) if drafter else 0.0
        free = int(machine.memory * utilization - weights - copies)
        drafts = timing.MAX_K if drafter else 0
        cache = groups.plan_cache(target, drafter, free, context, kv_dtype, drafts=drafts)
        floors = timing.Steps.floors(target, drafter, load, machine.bandwidth)
        steps = timing.Steps(
            floors.draft if measured.draft is None else measured.draft,
            floors.target if measured.target is None else (measured.target,) * len(floors.target),
            measured.overhead,
        )
        ks = range(timing.MAX_K + 1 if drafter else 1)
        made.append(
            Machine(
                name=machine.name,
                bandwidth=machine.bandwidth,
                memory=machine.memory,
                source=machine.source,
                fits=cache.requests >= 1,
                copies=round(copies),
                kv_memory=max(0, free),
                requests_that_fit=round(cache.requests, 2),
                tokens_that_fit=int(cache.requests * context),
                longest_prompt=cache.longest_prompt,
                target_ms=_ms(steps.target[0]),
                verify_ms=[_ms(steps.target[k]) for k in ks],
                draft_ms=_ms(steps.draft),
                step_ms=[_ms(steps.seconds(k)) for k in ks],
                acceptance={
                    text: Speed(
                        tok_s=[round(timing.speed(steps, rates, k, requests), 2) for k in ks],
                        best_k=timing.best_k(steps, rates, requests) if drafter else 0,
                    )
                    for text, rates in curves.items()
                },
            )
        )
    assert cache is not None  # there is at least one machine
    return Report(
        target=_size(target),
        drafter=_size(drafter) if drafter else None,
        context=context,
        requests=requests,
        bytes_per_target_step=round(load.pass_bytes(target)),
        bytes_per_draft_step=round(load.pass_bytes(drafter)) if drafter else 0,
        kv_bytes_per_target_step=round(load.kv_bytes_read(target)),
        kv_bytes_per_draft_step=round(load.kv_bytes_read(drafter)) if drafter else 0,
        groups=list(cache.groups),
        kv_bytes_per_token=round(cache.bytes_per_token),
        kv_bytes_per_request=cache.request_bytes,
        machines=made,
    )


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


def _size(model: Model) -> Size:
    return Size(
        name=model.name,
        weights=model.weights,
        layers=model.layers,
        weight_bytes=round(model.weight_bytes),
        files_bytes=model.files_bytes,
    )
