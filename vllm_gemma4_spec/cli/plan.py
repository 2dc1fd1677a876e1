"""``vllm-gemma4-spec plan``: KV cache groups, memory, floors and the best k, from two configs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from vllm_gemma4_spec.ops.plan.groups import Cache, Group

_RATES = "0.5 0.7 0.9"


def command(
    target: Annotated[Path, typer.Option(help="Folder or config.json of the model that answers.")],
    drafter: Annotated[Path | None, typer.Option(help="Folder or config.json of the drafter.")] = None,
    target_weights: Annotated[str | None, typer.Option(help="bf16, fp8 or nvfp4; default: the checkpoint's.")] = None,
    drafter_weights: Annotated[str | None, typer.Option(help="As --target-weights.")] = None,
    kv_dtype: Annotated[str, typer.Option(help="bf16, fp8 or float32.")] = "bf16",
    context: Annotated[int, typer.Option(min=1, help="Tokens of each request.")] = 4096,
    requests: Annotated[int, typer.Option(min=1, help="Requests that decode at once.")] = 1,
    hardware: Annotated[list[str] | None, typer.Option(help="One of the table; may be repeated. Default: all.")] = None,
    bandwidth: Annotated[float | None, typer.Option(min=0.001, help="GB/s of a machine of your own.")] = None,
    memory: Annotated[float, typer.Option(min=0.001, help="GB of that machine.")] = 80,
    utilization: Annotated[float, typer.Option(min=0.01, max=1, help="vLLM's --gpu-memory-utilization.")] = 0.9,
    acceptance: Annotated[
        str, typer.Option(help="Rates per draft, by spaces; or one curve by commas: 0.8,0.6,0.45.")
    ] = _RATES,
    target_ms: Annotated[float | None, typer.Option(min=0, help="Measured step of the target, for its floor.")] = None,
    draft_ms: Annotated[float | None, typer.Option(min=0, help="Measured pass of the drafter, for its floor.")] = None,
    overhead_ms: Annotated[float, typer.Option(min=0, help="Added to every step with drafts.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Write tok/s by k to this file (PNG, SVG, PDF).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; docs/plan.md has the schema.")] = False,
) -> None:
    """Compute groups, memory, bytes per step, floors and the best k. Needs no weights and no GPU.

    Example: vllm-gemma4-spec plan --target gemma-4-31B-it --drafter gemma-4-E4B-it --target-weights nvfp4
    """
    from vllm_gemma4_spec.ops.plan import groups, model, timing
    from vllm_gemma4_spec.ops.plan.plot import save

    kv_bytes = {"bf16": 2.0, "fp8": 1.0, "float32": 4.0}.get(kv_dtype)
    if kv_bytes is None:
        raise model.PlanError(f"--kv-dtype {kv_dtype}: choose bf16, fp8 or float32")
    table = timing.hardware()
    unknown = [name for name in hardware or () if name not in table]
    if unknown:
        raise model.PlanError(f"--hardware {unknown[0]}: choose from {', '.join(table)}, or give --bandwidth")
    machines = [table[name] for name in hardware or (() if bandwidth else table)]
    if bandwidth:
        machines.append(timing.Hardware("given", memory * 1e9, bandwidth * 1e9, "--bandwidth and --memory"))
    curves = {text: timing.curve(text) for text in acceptance.split()}
    if not curves:
        raise model.PlanError("--acceptance is empty; write a rate such as 0.7")

    big = model.load(target, target_weights)
    small = model.load(drafter, drafter_weights) if drafter else None
    load = timing.Workload(requests, context, kv_bytes)
    weights = sum(m.files_bytes or m.weight_bytes for m in (big, small) if m)
    report: dict[str, Any] = {
        "target": _model(big),
        "drafter": _model(small) if small else None,
        "context": context,
        "requests": requests,
        "bytes_per_target_step": round(load.pass_bytes(big)),
        "bytes_per_draft_step": round(load.pass_bytes(small)) if small else 0,
        "machines": [],
    }
    cache = None
    for machine in machines:
        free = int(machine.memory * utilization - weights)
        cache = groups.plan_cache(big, small, free, context, kv_dtype)
        floors = timing.Steps.floors(big, small, load, machine.bandwidth, overhead_ms / 1e3)
        steps = timing.Steps(
            floors.draft if draft_ms is None else draft_ms / 1e3,
            floors.target if target_ms is None else (target_ms / 1e3,) * len(floors.target),
            floors.overhead,
        )
        most = timing.MAX_K if small else 0
        report["machines"].append(
            {
                "name": machine.name,
                "bandwidth": machine.bandwidth,
                "memory": machine.memory,
                "source": machine.source,
                "fits": cache.requests >= 1,
                "kv_memory": max(0, free),
                "requests_that_fit": round(cache.requests, 2),
                "tokens_that_fit": int(cache.requests * context),
                "target_ms": round(steps.target[0] * 1e3, 3),
                "draft_ms": round(steps.draft * 1e3, 3),
                "acceptance": {
                    text: {
                        "tok_s": [round(timing.speed(steps, rates, k, requests), 2) for k in range(most + 1)],
                        "best_k": timing.best_k(steps, rates, requests) if small else 0,
                    }
                    for text, rates in curves.items()
                },
            }
        )
    assert cache is not None
    report["groups"] = [dataclasses.asdict(g) for g in cache.groups]
    report["kv_bytes_per_token"] = round(cache.bytes_per_token)
    report["kv_bytes_per_request"] = cache.request_bytes
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _print(Console(highlight=False), report, cache)
    if plot:
        title = " + ".join(f"{m.name} ({m.weights})" for m in (big, small) if m)
        title += f", {requests} request{'s' if requests > 1 else ''} at {context} tokens"
        lines = {
            m["name"] + ("" if m["fits"] else " (does not fit)"): {a: c["tok_s"] for a, c in m["acceptance"].items()}
            for m in report["machines"]
        }
        save(lines, title, plot)


def _model(model: Any) -> dict[str, Any]:
    return {
        "name": model.name,
        "weights": model.weights,
        "layers": model.layers,
        "weight_bytes": round(model.weight_bytes),
        "files_bytes": model.files_bytes,
    }


def _print(console: Console, report: dict[str, Any], cache: Cache) -> None:
    for role in ("target", "drafter"):
        one = report[role]
        if one:
            size = f"{one['weight_bytes'] / 1e9:.1f} GB {one['weights']}, text model"
            files = f"; files {one['files_bytes'] / 1e9:.1f} GB" if one["files_bytes"] else ""
            console.print(f"{role:<8} {one['name']}: {one['layers']} layers, {size}{files}")
    console.print(
        f"a step reads {report['bytes_per_target_step'] / 1e9:.2f} GB (target), "
        f"{report['bytes_per_draft_step'] / 1e9:.2f} GB (each draft), at {report['context']} tokens, "
        f"{report['requests']} request(s)"
    )
    console.print(
        f"KV cache: {cache.bytes_per_token / 1024:.0f} KiB per further token, at most "
        f"{cache.request_bytes / 2**20:.0f} MiB per request of {report['context']} tokens\n"
    )
    groups = Table("groups", "of", "attention", "window", "block size", "layers each", title_justify="left")
    for run in _runs(cache.groups):
        first, last = run[0], run[-1]
        number = f"{first.number}" if first is last else f"{first.number}-{last.number}"
        groups.add_row(
            f"{len(run)} ({number})",
            first.owner,
            first.kind,
            str(first.window or "-"),
            str(first.block_size),
            str(max(len(g.layers) for g in run)),
        )
    console.print(groups)
    rates = list(report["machines"][0]["acceptance"])
    fits = Table("machine", "target ms", "draft ms", "requests fit", "k=0 tok/s", *[f"a={r}" for r in rates])
    for m in report["machines"]:
        cells = [_best(m["acceptance"][r]) if m["fits"] else "-" for r in rates]
        plain = f"{m['acceptance'][rates[0]]['tok_s'][0]:.0f}" if m["fits"] else "-"
        count = f"{m['requests_that_fit']:.0f}" if m["fits"] else "does not fit"
        fits.add_row(m["name"], f"{m['target_ms']:.2f}", f"{m['draft_ms']:.2f}", count, plain, *cells)
    console.print(fits)
    console.print("a=…: best k and its tok/s at most. All times are floors (bytes / bandwidth) unless given.")


def _best(entry: dict[str, Any]) -> str:
    return f"k={entry['best_k']} {entry['tok_s'][entry['best_k']]:.0f}"


def _runs(groups: tuple[Group, ...]) -> list[list[Group]]:
    """Neighbouring groups that differ in their members only."""
    runs: list[list[Group]] = []
    for group in groups:
        key = (group.owner, group.kind, group.window, group.block_size)
        last = runs[-1][0] if runs else None
        if last and (last.owner, last.kind, last.window, last.block_size) == key:
            runs[-1].append(group)
        else:
            runs.append([group])
    return runs
