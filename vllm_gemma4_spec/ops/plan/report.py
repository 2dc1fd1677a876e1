"""The whole of ``plan`` as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vllm_gemma4_spec.ops.output import Output
from vllm_gemma4_spec.ops.plan import groups, measured, timing
from vllm_gemma4_spec.ops.plan.configs import PlanError
from vllm_gemma4_spec.ops.plan.groups import Group
from vllm_gemma4_spec.ops.plan.model import KV_BYTES, Assistant, Model


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
    """At one acceptance; tokens per second of all requests together, for k = 0, 1, …"""

    tok_s: list[float] | None
    """expected: from times measured or given; null where neither is known"""
    tok_s_at_most: list[float]
    """the bound: bytes / bandwidth"""
    tok_s_at_least: list[float]
    """if this pair and card are as far from the bound as the slowest that was measured"""
    best_k: int
    """of tok_s, else of tok_s_at_most; 0: plain decoding is the fastest"""


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
    times: str
    """measured, given (by options) or floors (bytes / bandwidth): what the milliseconds below are"""
    measured_by: str | None
    """results file of this repository, where times were measured"""
    target_ms: float
    """a step of the target alone"""
    verify_ms: list[float]
    """the target's pass over k + 1 tokens a request, for k = 0, 1, …"""
    draft_ms: float
    """the first pass of the drafter"""
    step_ms: list[float]
    """a whole step with k drafts, for k = 0, 1, …"""
    acceptance: dict[str, Speed]
    """by acceptance as it was written"""


class Other(Output):
    """A further drafter for the same target, machines and options."""

    drafter: Size
    bytes_per_draft_step: int
    kv_bytes_per_draft_step: int
    kv_bytes_per_request: int
    machines: list[Machine]


class Choice(Output):
    """What is the fastest on one machine at one acceptance, by the lower end of what is expected."""

    machine: str
    acceptance: str
    drafter: str | None
    """null: plain decoding"""
    k: int
    tok_s: float
    sure: bool
    """no other drafter, nor plain decoding, reaches as much at the upper end of what is expected of it"""


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
    others: list[Other]
    """of the further drafters named"""
    choices: list[Choice]
    """of several drafters and none, on machines where the target fits; empty with one drafter"""


@dataclass(frozen=True)
class Given:
    """Seconds that the user measured; ``overhead`` is added to every step with drafts."""

    target: float | None = None
    draft: float | None = None
    overhead: float = 0.0

    def steps(self, floors: timing.Steps) -> timing.Steps | None:
        """Floors where nothing was given; None without any."""
        if self.target is None and self.draft is None and not self.overhead:
            return None
        drafts = floors.drafts if self.draft is None else tuple(k * self.draft for k in range(timing.MAX_K + 1))
        passes = floors.target if self.target is None else (self.target,) * len(floors.target)
        return timing.Steps(drafts, passes, self.overhead)


@dataclass(frozen=True)
class Asked:
    """``requests`` at once, each at ``context`` tokens, with a ``kv_dtype`` of :data:`KV_BYTES` and a share
    ``utilization`` of the memory for vLLM; ``given``: what the user measured."""

    requests: int
    context: int
    kv_dtype: str
    utilization: float
    given: Given


def compare(
    target: Model,
    drafters: Sequence[Model],
    machines: Sequence[timing.Hardware],
    curves: Mapping[str, tuple[float, ...]],
    asked: Asked,
) -> Report:
    """:func:`make` of the first drafter, the others beside it, and what pays where.

    Raises:
        PlanError: as :func:`make`, or measured times of a draft were given for several drafters.
    """
    if asked.given.draft is not None and len(drafters) > 1:
        raise PlanError("--draft-ms is one drafter's; name one --drafter with it")
    each: Sequence[Model | None] = drafters or [None]
    made = [make(target, drafter, machines, curves, asked) for drafter in each]
    if len(made) == 1:
        return made[0]
    others = [
        Other(
            drafter=one.drafter,
            bytes_per_draft_step=one.bytes_per_draft_step,
            kv_bytes_per_draft_step=one.kv_bytes_per_draft_step,
            kv_bytes_per_request=one.kv_bytes_per_request,
            machines=one.machines,
        )
        for one in made[1:]
        if one.drafter
    ]
    found = (_choice([(r.drafter, r.machines[i]) for r in made], text) for i in range(len(machines)) for text in curves)
    return made[0].model_copy(update={"others": others, "choices": [c for c in found if c]})


def _choice(of: Sequence[tuple[Size | None, Machine]], text: str) -> Choice | None:
    """``of``: a drafter and what it does on the same machine."""
    # Drafter, k, lower and upper end of tok/s; plain decoding once.
    rows: list[tuple[str | None, int, float, float]] = []
    for drafter, machine in of:
        speed = machine.acceptance[text]
        low, high = speed.tok_s or speed.tok_s_at_least, speed.tok_s or speed.tok_s_at_most
        if machine.fits and drafter:
            k = max(range(1, len(low)), key=low.__getitem__)
            rows.append((drafter.name, k, low[k], max(high[1:])))
            rows.append((None, 0, low[0], high[0]))
    if not rows:
        return None
    name, k, tok_s, _ = max(rows, key=lambda row: row[2])
    return Choice(
        machine=of[0][1].name,
        acceptance=text,
        drafter=name,
        k=k,
        tok_s=tok_s,
        sure=all(high < tok_s for other, _, _, high in rows if other != name),
    )


def make(
    target: Model,
    drafter: Model | None,
    machines: Sequence[timing.Hardware],
    curves: Mapping[str, tuple[float, ...]],
    asked: Asked,
) -> Report:
    """``curves``: acceptance as written -> rate of each position.

    Raises:
        PlanError: the layers' page sizes cannot be unified, or an assistant is another target's.
    """
    _check_assistants(target, drafter)
    requests, context = asked.requests, asked.context
    load = timing.Workload(requests, context, KV_BYTES[asked.kv_dtype])
    weights = sum(m.files_bytes or m.weight_bytes for m in (target, drafter) if m)
    made, cache = [], None
    for machine in machines:
        copies = target.copies(machine.marlin, machine.memory, drafter=False)
        copies += drafter.copies(machine.marlin, machine.memory, drafter=True) if drafter else 0.0
        free = int(machine.memory * asked.utilization - weights - copies)
        drafts = timing.MAX_K if drafter else 0
        cache = groups.plan_cache(target, drafter, free, context, asked.kv_dtype, drafts=drafts)
        floors = timing.Steps.floors(target, drafter, load, machine.bandwidth)
        steps, by = asked.given.steps(floors), None
        times = "given"
        if steps is None:
            found = measured.steps(machine, target, drafter, load)
            steps, by = found if found else (None, None)
            times = "measured" if found else "floors"
        shown = steps or floors
        ks = range(timing.MAX_K + 1 if drafter else 1)
        slow = measured.slowest(requests, bool(target.experts))
        least = floors.slower(slow.target, slow.draft, slow.overhead)

        def speeds(of: timing.Steps, rates: tuple[float, ...], ks: range = ks) -> list[float]:
            return [round(timing.speed(of, rates, k, requests), 2) for k in ks]

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
                times=times,
                measured_by=by,
                target_ms=_ms(shown.target[0]),
                verify_ms=[_ms(shown.target[k]) for k in ks],
                draft_ms=_ms(shown.drafts[1]),
                step_ms=[_ms(shown.seconds(k)) for k in ks],
                acceptance={
                    text: Speed(
                        tok_s=speeds(steps, rates) if steps else None,
                        tok_s_at_most=speeds(floors, rates),
                        tok_s_at_least=speeds(least, rates),
                        best_k=timing.best_k(shown, rates, requests) if drafter else 0,
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
        others=[],
        choices=[],
    )


def _check_assistants(target: Model, drafter: Model | None) -> None:
    if isinstance(target, Assistant):
        raise PlanError(f"{target.name}: an MTP assistant answers nothing by itself; give it as --drafter")
    width = int(target.text.hidden_size)
    if isinstance(drafter, Assistant) and drafter.backbone != width:
        raise PlanError(
            f"{drafter.name}: an assistant of a target of hidden size {drafter.backbone}; {target.name} has {width}"
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
