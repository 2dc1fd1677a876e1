"""What the benchmark puts into a running engine; every function runs in the worker (``LLM.collective_rpc``)."""

from __future__ import annotations

import cProfile
import functools
import gc
import itertools
import pstats
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class _Marks:
    """CUDA events and host times around the parts of a step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.late: list[str] = []
        self.on = False

    def mark(self, name: str) -> None:
        if not self.on:
            return
        if name == "forward":
            self.steps.append({})
        if self.steps:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.steps[-1][name] = event


_PRIMES = [2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53]


def even_draws(requests: int, positions: int, steps: int = 4096) -> Tensor:
    """``[requests, steps, positions]`` float32 in [0, 1): at each place of a batch and each position the multiples of a
    square root, which fill it evenly from the first steps on; another place begins elsewhere."""
    roots = torch.tensor(_PRIMES * positions, dtype=torch.float64)[:positions].sqrt()
    step, request = torch.arange(1, steps + 1, dtype=torch.float64), torch.arange(requests, dtype=torch.float64)
    golden = (5**0.5 - 1) / 2
    even = (step[:, None] * roots + request[:, None, None] * golden) % 1
    return even.float().clamp(max=1 - 2**-24)  # a chance of 1 takes all


def force_acceptance(worker: Any, probabilities: list[float] | None) -> None:
    """From now on a draft position is accepted with such a chance (None: by the model again).

    Of several chances each request has one, in turn: a mixed workload. A draft that adaptive k left out (token 0)
    is rejected. The sampler does its work first, so its cost stays in the figures; then its verdict is replaced, by one
    kernel. What decides is not random but even (:func:`even_draws`), so that a run of some forty steps has the share
    of drafts accepted that it should.
    """
    from vllm.triton_utils import tl, triton

    @triton.jit
    def verdict(drafts, draws, stride, chances, out, k, most: tl.constexpr):  # type: ignore[no-untyped-def]
        """Grid ``(num_reqs,)``: accepted drafts, then any valid token: the draft or a constant."""
        request, at = tl.program_id(0), tl.arange(0, most)
        draft = tl.load(drafts + request * k + at, mask=at < k, other=0)
        draw = tl.load(draws + request * stride + at, mask=at < k, other=0.0)
        differs = ((draft == 0) | (draw >= tl.load(chances + request))).to(tl.int32)
        kept = tl.cumsum(differs, axis=0) - differs == 0
        tl.store(out + request * (k + 1) + at, tl.where(kept, tl.where(draft == 0, 1000, draft), -1), mask=at <= k)

    runner = worker.model_runner
    sampler = runner.rejection_sampler
    original = type(sampler).forward
    seen: dict[str, int] = {}  # request -> its number
    last: list[Any] = [None, None]  # chances of the last batch, here and on the card
    draws: dict[int, Any] = {}  # by k: [most requests, many steps, power of two above k]; the same for every rank
    passed = itertools.count()  # steps

    def forward(metadata: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(sampler, metadata, *args, **kwargs)
        counts, k = metadata.num_draft_tokens, metadata.max_spec_len
        if probabilities is None or set(counts) != {k}:
            return output
        numbers = [seen.setdefault(request, len(seen)) for request in runner.input_batch.req_ids]
        chances = [probabilities[number % len(probabilities)] for number in numbers]
        if chances != last[0]:
            last[:] = chances, torch.tensor(chances).to(runner.device)
        drafts, out = metadata.draft_token_ids, output.sampled_token_ids  # [batch * k], [batch, k + 1]
        most = max(4, triton.next_power_of_2(k + 1))  # rows of 16 bytes, or the kernel would be compiled again
        if k not in draws:
            draws[k] = even_draws(runner.max_num_reqs, most).to(drafts.device)
        rows = draws[k][:, next(passed) % draws[k].shape[1] :]
        verdict[(len(counts),)](drafts, rows, rows.stride(0), last[1], out, k, most=most)
        return output

    sampler.forward = forward


def _watch(late: list[str]) -> None:
    """Note what makes one run of many slower than the others, if it takes more than 5 ms: torch.compile, with the
    kernels of Inductor within it, kernels that Triton compiles or reads from its cache, their loading and launchers,
    kernels in CUDA C++, garbage collections."""
    from torch._dynamo.callback import callback_handler
    from triton import knobs
    from triton.compiler.compiler import CompiledKernel

    from vllm_gemma4_spec.kernels import cuda

    began: dict[str, float] = {}

    def note(seconds: float, what: str) -> None:
        if seconds > 5e-3:
            late.append(f"{1e3 * seconds:.0f} ms: {what}")

    def begins(what: str) -> None:
        began[what] = time.perf_counter()

    def ends(what: str) -> None:
        if since := began.pop(what, None):  # none: it was under way when this began to watch
            note(time.perf_counter() - since, what)

    def kernel(*, metadata: dict[str, Any], times: Any, **_: Any) -> None:
        note(times.total / 1e6, f"Triton, {metadata['name']}")

    def collects(phase: str, of: dict[str, int]) -> None:
        (begins if phase == "start" else ends)(f"garbage of generation {of['generation']}")

    loads, nvrtc = CompiledKernel._init_handles, cuda.compiled

    def compiles(source: str, architecture: str) -> bytes:
        since = time.perf_counter()
        code = nvrtc(source, architecture)
        note(time.perf_counter() - since, "NVRTC")
        return code

    def handles(self: Any) -> None:
        since = time.perf_counter()
        loads(self)
        note(time.perf_counter() - since, f"launcher of {self.name}")

    callback_handler.register_start_callback(lambda of: begins(f"torch.compile {of.compile_id}"))
    callback_handler.register_end_callback(lambda of: ends(f"torch.compile {of.compile_id}"))
    knobs.compilation.listener = kernel
    cuda.compiled = compiles
    CompiledKernel._init_handles = handles
    gc.callbacks.append(collects)


def install_marks(worker: Any) -> None:
    """Record events around the target's forward pass and the draft; ``read_marks`` gives the times."""
    runner, marks = worker.model_runner, _Marks()
    runner.benchmark_marks = marks
    _watch(marks.late)

    def around(owner: Any, attribute: str, before: str, after: str) -> None:
        function = getattr(owner, attribute)

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            marks.mark(before)
            out = function(*args, **kwargs)
            marks.mark(after)
            return out

        setattr(owner, attribute, wrapper)

    around(runner, "_model_forward", "forward", "forward end")
    if getattr(runner, "drafter", None) is not None:
        around(runner.drafter, "propose", "draft", "draft end")


def switch_marks(worker: Any, on: bool) -> None:
    marks = worker.model_runner.benchmark_marks
    marks.on = on
    if on:
        marks.steps = []
        marks.late.clear()


def read_marks(worker: Any) -> dict[str, Any]:
    """Medians in ms: ``step``, ``verify``, ``sampling`` (logits to draft), ``draft``, ``gap`` (to the next pass); the
    longest step, and what was compiled or collected since, by the host's time."""
    torch.cuda.synchronize()
    steps = worker.model_runner.benchmark_marks.steps
    parts: dict[str, list[float]] = {}
    for step, following in itertools.pairwise(steps[2:]):
        last = step.get("draft end", step["forward end"])
        parts.setdefault("step", []).append(step["forward"].elapsed_time(following["forward"]))
        parts.setdefault("verify", []).append(step["forward"].elapsed_time(step["forward end"]))
        if "draft" in step:
            parts.setdefault("sampling", []).append(step["forward end"].elapsed_time(step["draft"]))
            parts.setdefault("draft", []).append(step["draft"].elapsed_time(step["draft end"]))
        parts.setdefault("gap", []).append(last.elapsed_time(following["forward"]))
    medians = {name: round(statistics.median(values), 3) for name, values in parts.items()}
    longest = round(max(parts.get("step", [0.0])), 3)
    return medians | {"steps": len(steps), "longest": longest, "late": list(worker.model_runner.benchmark_marks.late)}


def head_parts(head: Any) -> list[tuple[torch.Tensor, int]]:
    """What a two-pass head reads more (1) and what it does not read (-1)."""
    return [(head._codes, 1), (head._scales, 1), (head.weight, -1)]


def _median_ms(run: Any, repeats: int = 20) -> float:
    times = []
    for _ in range(repeats + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[3:])


def draft_parts(worker: Any, sizes: list[int], context: int) -> dict[str, dict[str, float]]:
    """Per batch size: ms of a whole replay, of its first pass, of one further pass, and host ms per replay.

    The first pass is a graph of its own, captured at depth 1.
    """
    from vllm.distributed.parallel_state import graph_capture

    from vllm_gemma4_spec.mtp.graphs import AssistantGraphs
    from vllm_gemma4_spec.performance.draft_graphs import GRAPHS, DraftGraphs

    runner = worker.model_runner
    drafter = runner.drafter
    graphs = drafter.__dict__.get(GRAPHS)
    if graphs is None:
        return {}
    k = drafter.num_speculative_tokens
    if isinstance(graphs, AssistantGraphs):
        return _assistant_parts(drafter, graphs, sizes, context)
    first = DraftGraphs(drafter, graphs._groups, graphs._primary_table, graphs._propose, sizes, (1,))
    with graph_capture(device=runner.device):
        first.capture(torch.cuda.graph_pool_handle())
    out = {}
    for graph in (graphs, first):
        graph._inputs.seq_lens.fill_(context)
        graph._inputs.positions.copy_(
            (torch.arange(k + 1, device=runner.device) + context - k - 1).repeat(graph.batch_sizes[-1])
        )
        graph.mark_live(0)
    for n in sizes:
        whole = _median_ms(graphs._graphs[n, k].cuda_graph.replay)
        once = _median_ms(first._graphs[n, 1].cuda_graph.replay)
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(20):
            graphs._graphs[n, k].cuda_graph.replay()
        host = (time.perf_counter() - began) / 20 * 1e3
        torch.cuda.synchronize()
        out[str(n)] = {
            "whole": round(whole, 3),
            "first": round(once, 3),
            "further": round((whole - once) / max(1, k - 1), 3),
            "host": round(host, 3),
        }
    return out


def _assistant_parts(drafter: Any, graphs: Any, sizes: list[int], context: int) -> dict[str, dict[str, float]]:
    """:func:`draft_parts` of an assistant, whose passes are alike."""
    k, out = drafter.num_speculative_tokens, {}
    runner = drafter._runner
    for group in drafter.draft_attn_groups:  # blocks of its own for every request, or a cache would serve them
        table = runner.input_batch.block_table[group.kv_cache_group_id].get_device_tensor(max(sizes))
        table.random_(1, runner.kv_cache_config.num_blocks)
    drafter.seq_lens.fill_(context)
    drafter.positions.fill_(context - 1)
    for n in sizes:
        graph = graphs._graphs[graphs._padded[n], k][0]
        whole = _median_ms(graph.replay)
        began = time.perf_counter()
        for _ in range(20):
            graph.replay()
        host = (time.perf_counter() - began) / 20 * 1e3
        torch.cuda.synchronize()
        out[str(n)] = {"whole": round(whole, 3), "pass": round(whole / k, 3), "host": round(host, 3)}
    return out


def without_head(worker: Any) -> bool:
    """From now on an assistant's drafts read its head in bfloat16; False where it has no NVFP4 copy."""
    from vllm_gemma4_spec.performance.argmax import HEAD
    from vllm_gemma4_spec.performance.graph_capture import capture_drafts

    drafter = worker.model_runner.drafter
    if getattr(drafter, HEAD, None) is None:
        return False
    setattr(drafter, HEAD, None)
    capture_drafts(worker.model_runner)
    return True


def profile_replay(worker: Any, size: int) -> list[tuple[str, float, float]]:
    """Kernels of one replay in order: name, start and duration in microseconds."""
    from torch.profiler import ProfilerActivity, profile

    from vllm_gemma4_spec.performance.draft_graphs import GRAPHS

    graphs = worker.model_runner.drafter.__dict__.get(GRAPHS)
    if graphs is None:
        return []
    captured = graphs._graphs[size, worker.model_runner.drafter.num_speculative_tokens]
    graph = captured[0] if isinstance(captured, tuple) else captured.cuda_graph
    graph.replay()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        graph.replay()
        torch.cuda.synchronize()
    kernels = [e for e in prof.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels.sort(key=lambda e: e.time_range.start)
    first = kernels[0].time_range.start if kernels else 0
    return [(e.name[:120], e.time_range.start - first, e.time_range.elapsed_us()) for e in kernels]


def profile_begins(worker: Any) -> None:
    from torch.profiler import ProfilerActivity, profile

    worker.model_runner.benchmark_profile = profile(activities=[ProfilerActivity.CUDA])
    worker.model_runner.benchmark_profile.__enter__()


def profile_ends(worker: Any) -> list[tuple[str, float, float]]:
    """Kernels since ``profile_begins`` in order: name, start and duration in microseconds."""
    torch.cuda.synchronize()
    prof = worker.model_runner.benchmark_profile
    prof.__exit__(None, None, None)
    kernels = [e for e in prof.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels.sort(key=lambda e: e.time_range.start)
    first = kernels[0].time_range.start if kernels else 0
    return [(e.name[:120], e.time_range.start - first, e.time_range.elapsed_us()) for e in kernels]


_STEP = ("execute_model", "sample_tokens")


def _now() -> tuple[torch.cuda.Event, float]:
    """The same moment of the card and of the host."""
    event = torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    event.record()
    event.synchronize()
    return event, time.perf_counter()


def host_begins(worker: Any, profiled: bool) -> None:
    """From now on it is noted when each step begins, what it takes the host and when the card has done it; profiled,
    the host's time by function, too, which makes all of them longer."""
    runner = worker.model_runner
    card_began, began = _now()
    profile, times = cProfile.Profile(), []
    runner.benchmark_host = profile, times, card_began

    def timed(name: str, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        if profiled:
            profile.enable()
        try:
            return getattr(type(runner), name)(runner, *args, **kwargs)
        finally:
            profile.disable()
            ended, event = time.perf_counter(), torch.cuda.Event(enable_timing=True)
            event.record()
            times.append((name, start - began, ended - start, event))

    for name in _STEP:
        setattr(runner, name, functools.partial(timed, name))


def host_ends(worker: Any, top: int = 40) -> dict[str, Any]:
    """Of each call since :func:`host_begins` milliseconds: when it began, what it took the host, when the card had done
    what it launched; and the functions with most time of their own."""
    runner = worker.model_runner
    for name in _STEP:
        delattr(runner, name)
    profile, noted, began = runner.benchmark_host
    torch.cuda.synchronize()
    times = [
        (name, round(1e3 * start, 2), round(1e3 * took, 2), round(began.elapsed_time(event), 2))
        for name, start, took, event in noted
    ]
    rows = (
        [
            (own, calls, f"{Path(file).parent.name}/{Path(file).name}:{line} {name}" if line else name)
            for (file, line, name), (_, calls, own, _, _) in pstats.Stats(profile).stats.items()  # type: ignore[attr-defined]
        ]
        if profile.getstats()
        else []
    )
    rows.sort(reverse=True)
    return {"calls": times, "functions": [[round(1e3 * own, 2), calls, name] for own, calls, name in rows[:top]]}


def linear_times(worker: Any, tokens: int, bandwidth: float) -> list[dict[str, Any]]:
    """Per shape of the drafter's linear layers: microseconds of one call in a graph, and its floor.

    Args:
        tokens: rows of the input.
        bandwidth: GB/s, for the floor: bytes of the weight over it.
    """
    from vllm.distributed.parallel_state import graph_capture  # tells the other ranks where its all-reduces read

    runner = worker.model_runner
    shapes: dict[tuple[int, int, str], list[Any]] = {}
    for module in runner.drafter.model.modules():
        if hasattr(module, "input_size_per_partition") and hasattr(module, "output_size_per_partition"):
            kind = type(module.quant_method).__name__
            shapes.setdefault((module.output_size_per_partition, module.input_size_per_partition, kind), []).append(
                module
            )
    rows = []
    for (size_n, size_k, kind), modules in shapes.items():
        x = torch.randn(tokens, size_k, device=runner.device).to(runner.dtype)

        def calls(modules: list[Any] = modules, x: torch.Tensor = x) -> None:
            for module in modules:  # different weights each time, so the cache holds none of them
                module(x)

        with torch.inference_mode():
            calls()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with graph_capture(runner.device) as here, torch.cuda.graph(graph, stream=here.stream):
                calls()
        nbytes = sum(p.numel() * p.element_size() for p in modules[0].parameters())
        rows.append(
            {
                "shape": [size_n, size_k],
                "method": kind,
                "layers": len(modules),
                "us": round(_median_ms(graph.replay) * 1e3 / len(modules), 2),
                "floor_us": round(nbytes / bandwidth / 1e3, 2),
            }
        )
    return sorted(rows, key=lambda r: -r["us"] * r["layers"])


def bandwidth_and_bytes(worker: Any) -> dict[str, float]:
    """Copy bandwidth in GB/s (bytes read plus written); bytes a pass of each model must read, and allocated, in GB."""
    from shapes import weight_bytes

    from vllm_gemma4_spec.performance.argmax import HEAD

    runner = worker.model_runner
    allocated = torch.cuda.memory_allocated()
    a = torch.empty(2**31, dtype=torch.uint8, device=runner.device)
    b = torch.empty_like(a)
    seconds = _median_ms(lambda: b.copy_(a), 10) / 1e3
    out = {"bandwidth": 2 * a.numel() / seconds / 1e9, "target": weight_bytes(runner.get_model()) / 1e9}
    if getattr(runner, "drafter", None) is not None:
        out["drafter"] = weight_bytes(runner.drafter.model) / 1e9
        if (head := getattr(runner.drafter, HEAD, None)) is not None:  # its NVFP4 copy is read in its place
            out["drafter"] += sum(t.numel() * t.element_size() * s for t, s in head_parts(head)) / 1e9
    out["allocated"] = allocated / 1e9
    return {name: round(value, 3) for name, value in out.items()}


def finite(worker: Any) -> bool:
    """Whether the target's logits are finite: random weights must mean something."""
    runner = worker.model_runner
    with torch.inference_mode():
        hidden = torch.randn(4, runner.model_config.get_hidden_size(), device=runner.device).to(runner.dtype)
        return bool(torch.isfinite(runner.model.compute_logits(hidden)).all())
