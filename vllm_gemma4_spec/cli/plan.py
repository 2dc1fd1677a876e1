"""``vllm-gemma4-spec plan``: KV cache groups, memory, floors and the best k, from two configs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_gemma4_spec.cli import _rich as rich
from vllm_gemma4_spec.cli._tables import show

if TYPE_CHECKING:
    from vllm_gemma4_spec.ops.plan.groups import Group
    from vllm_gemma4_spec.ops.plan.report import Machine, Report, Size, Speed

_RATES = "0.5 0.7 0.9"


def command(
    target: Annotated[str, typer.Option(help="The model that answers: folder, config.json or Hub id.")],
    drafter: Annotated[
        list[str] | None,
        typer.Option(help="The drafter: folder, config.json or Hub id; of several, says which pays on which card."),
    ] = None,
    target_weights: Annotated[str | None, typer.Option(help="bf16, fp8 or nvfp4; default: the checkpoint's.")] = None,
    drafter_weights: Annotated[str | None, typer.Option(help="As --target-weights.")] = None,
    kv_dtype: Annotated[str, typer.Option(help="bf16, fp8 or float32.")] = "bf16",
    context: Annotated[int, typer.Option(min=1, help="Tokens of each request.")] = 4096,
    requests: Annotated[int, typer.Option(min=1, help="Requests that decode at once.")] = 1,
    hardware: Annotated[
        list[str] | None, typer.Option(help="A card, e.g. H200 or 'DGX Spark'; may be repeated. Default: all.")
    ] = None,
    bandwidth: Annotated[float | None, typer.Option(min=0.001, help="GB/s of a machine of your own.")] = None,
    memory: Annotated[float, typer.Option(min=0.001, help="GB of that machine.")] = 80,
    utilization: Annotated[float, typer.Option(min=0.01, max=1, help="Share of the memory that vLLM takes.")] = 0.9,
    acceptance: Annotated[
        str, typer.Option(help="Acceptance rates, separated by spaces; for a rate per position, commas: 0.8,0.6,0.45.")
    ] = _RATES,
    target_ms: Annotated[float | None, typer.Option(min=0, help="Measured step of the target, for its floor.")] = None,
    draft_ms: Annotated[float | None, typer.Option(min=0, help="Measured pass of the drafter, for its floor.")] = None,
    overhead_ms: Annotated[float, typer.Option(min=0, help="Added to every step with drafts.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Write tok/s by k to this file (PNG, SVG, PDF).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; docs/reference/json.md has the schema.")] = False,
) -> None:
    """Compute KV cache groups, memory, time per step and the best k. Needs no weights, no GPU and no vLLM.

    Example: vllm-gemma4-spec plan --target google/gemma-4-31B-it --drafter google/gemma-4-E4B-it --hardware H200
    """
    from vllm_gemma4_spec.cli import _checks
    from vllm_gemma4_spec.ops import plots
    from vllm_gemma4_spec.ops.plan import model, report, timing
    from vllm_gemma4_spec.ops.plan.configs import PlanError
    from vllm_gemma4_spec.ops.plan.plot import save

    if kv_dtype not in model.KV_BYTES:
        raise PlanError(f"--kv-dtype {kv_dtype}: choose {', '.join(model.KV_BYTES)}")
    machines = [timing.named(name) for name in hardware or (() if bandwidth else timing.hardware())]
    if bandwidth:
        source = "--bandwidth and --memory"
        machines.append(timing.Hardware("given", memory * 1e9, bandwidth * 1e9, source, marlin=True))  # the larger need
    curves = {text: timing.curve(text) for text in acceptance.split()}
    if not curves:
        raise PlanError("--acceptance is empty; write a rate such as 0.7")
    if plot:
        plots.check(plot)

    big = model.load(target, target_weights)
    small = [model.load(name, drafter_weights) for name in drafter or ()]
    given = report.Given(
        None if target_ms is None else target_ms / 1e3, None if draft_ms is None else draft_ms / 1e3, overhead_ms / 1e3
    )
    with _checks.slow("computing", as_json):
        made = report.compare(
            big,
            small,
            machines,
            curves,
            requests=requests,
            context=context,
            kv_dtype=kv_dtype,
            utilization=utilization,
            given=given,
        )
    if as_json:
        typer.echo(made.model_dump_json(indent=2))
    else:
        _print(rich.Console(highlight=False), made)
    if plot:
        title = " + ".join(f"{m.name} ({m.weights})" for m in (big, *small[:1]))
        title += f", {requests} request{'s' if requests > 1 else ''} at {context} tokens"
        lines = {
            m.name + _plot_note(m): {a: s.tok_s or s.tok_s_at_most for a, s in m.acceptance.items()}
            for m in made.machines
        }
        save(lines, title, plot)


def _print(console: rich.Console, made: Report) -> None:
    several = bool(made.others)
    drafters = [made.drafter, *(other.drafter for other in made.others)]
    for role, one in (("target", made.target), *(("drafter", drafter) for drafter in drafters)):
        if one:
            size = f"{one.weight_bytes / 1e9:.1f} GB {one.weights}, text model"
            files = f"; files {one.files_bytes / 1e9:.1f} GB" if one.files_bytes else ""
            console.print(f"{role:<8} {one.name}: {one.layers} layers, {size}{files}")
    reads = [(made.drafter, made.bytes_per_draft_step), *((o.drafter, o.bytes_per_draft_step) for o in made.others)]
    names = [f"each draft of {one.name}" if several else "each draft" for one, _ in reads if one]
    drafts = "".join(f", {size / 1e9:.2f} GB ({name})" for name, (_, size) in zip(names, reads, strict=False))
    many = "s" if made.requests > 1 else ""
    console.print(
        f"a step reads {made.bytes_per_target_step / 1e9:.2f} GB (target){drafts}; "
        f"{made.requests} request{many} at {made.context} tokens"
    )
    console.print(
        f"KV cache{_with(made.drafter, several)}: {made.kv_bytes_per_token / 1024:.0f} KiB per further token, at most "
        f"{made.kv_bytes_per_request / 2**20:.0f} MiB per request of {made.context} tokens\n"
    )
    table = rich.Table("groups", "of", "attention", "window", "block size", "layers each")
    for run in _runs(made.groups):
        first, last = run[0], run[-1]
        number = f"{first.number}" if first is last else f"{first.number}-{last.number}"
        sizes = sorted({g.size for g in run})
        table.add_row(
            f"{len(run)} ({number})",
            first.owner,
            first.kind,
            str(first.window or "-"),
            str(first.block_size),
            "-".join(str(n) for n in dict.fromkeys((sizes[0], sizes[-1]))),
        )
    show(console, table)
    rates = list(made.machines[0].acceptance)
    heads = ("card", "fit", "longest", "times", "target ms", "draft ms", "plain tok/s", *[f"a={r}" for r in rates])
    speeds = rich.Table(heads[0], *(["drafter"] if several else []), *heads[1:])
    rows = [(made.drafter, made.machines), *((o.drafter, o.machines) for o in made.others)]
    best = {(c.machine, c.acceptance): c for c in made.choices}
    for i in range(len(made.machines)):
        for one, m in ((drafter, machines[i]) for drafter, machines in rows):
            name = one.name if one else None
            chosen = [(c := best.get((m.name, r))) is not None and several and c.drafter == name for r in rates]
            cells = [_best(m.acceptance[r]) + "*" * c if m.fits else "-" for r, c in zip(rates, chosen, strict=True)]
            plain = _range(m.acceptance[rates[0]], 0) if m.fits else "-"
            count = f"{m.requests_that_fit:.0f}" if m.fits else "none"
            times = (f"{m.target_ms:.2f}", f"{m.draft_ms:.2f}")
            which = [m.name, name or "-"] if several else [m.name]
            speeds.add_row(*which, count, str(m.longest_prompt), m.times, *times, plain, *cells)
    show(console, speeds)
    console.print(
        f"fit: requests of {made.context} tokens that fit at once; longest: tokens of the longest prompt; a=…: best k "
        "at that acceptance and its tok/s, all requests together."
    )
    if several:
        console.print(
            "*: what pays, by the lower end of its range; no star in a column: plain decoding. A column is right for a "
            "drafter that reaches its acceptance on your traffic."
        )
        for choice in made.choices:
            what = f"{choice.drafter}, k = {choice.k}" if choice.drafter else "plain decoding"
            doubt = "" if choice.sure else "; the ranges overlap"
            console.print(f"  {choice.machine}, a={choice.acceptance}: {what}, {choice.tok_s:.0f} tok/s{doubt}")
    kinds = {m.times for m in made.machines}
    if "measured" in kinds:
        files = ", ".join(dict.fromkeys(m.measured_by for m in made.machines if m.measured_by))
        console.print(f"measured: from step times measured on that card with this pair ({files}).")
    if "floors" in kinds:
        console.print(
            "floors: bytes / bandwidth, a bound that no step beats. This pair was not measured on that card: tok/s lie "
            "between the bound and what is left of it on a card as far from its bound as the H200 that was measured."
        )
    copies = ", ".join(f"{m.name} {m.copies / 1e9:.1f} GB" for m in made.machines if m.copies)
    if copies:
        console.print(f"Of the memory, weights that kernels hold a second time: {copies}.")


def _with(drafter: Size | None, several: bool) -> str:
    return f" with {drafter.name}" if several and drafter else ""


def _best(speed: Speed) -> str:
    return f"k={speed.best_k} {_range(speed, speed.best_k)}"


def _range(speed: Speed, k: int) -> str:
    """What is expected at ``k``; from the slowest measured to the bound where nothing is known of this card."""
    if speed.tok_s is not None:
        return f"{speed.tok_s[k]:.0f}"
    return f"{speed.tok_s_at_least[k]:.0f}-{speed.tok_s_at_most[k]:.0f}"


def _plot_note(machine: Machine) -> str:
    if not machine.fits:
        return " (does not fit)"
    return " (bound)" if machine.times == "floors" else f" ({machine.times})"


def _runs(groups: Sequence[Group]) -> list[list[Group]]:
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
