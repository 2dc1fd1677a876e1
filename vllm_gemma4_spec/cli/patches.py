"""``vllm-gemma4-spec patches``: what the plugin changes in vLLM, and whether it fits the one installed."""

from __future__ import annotations

from typing import Annotated

import typer

from vllm_gemma4_spec.cli import _rich as rich
from vllm_gemma4_spec.cli._tables import show
from vllm_gemma4_spec.ops.output import Output
from vllm_gemma4_spec.settings import PATCH_PREFIX


class Mark(Output):
    """Of one symbol of vLLM: the first 16 hex digits of the SHA-256 of its source."""

    found: str | None
    """null: the symbol is gone"""
    wanted: str


class Row(Output):
    """One patch."""

    name: str
    group: str
    """correctness or convenience"""
    state: str
    """in this process: not applied, off, waiting, on, left out or failed"""
    targets: list[str]
    switch: str
    """the variable that leaves it out with 0"""
    scope: str
    """which engines, models or checkpoints it acts on"""
    related: str
    """related upstream changes: numbers of issues and pull requests, or "none found" first"""
    fits: bool
    """every fingerprint is as wanted"""
    fingerprints: dict[str, Mark]
    """by symbol"""


class Report(Output):
    """Every patch, in the order they are applied."""

    fits: bool
    """every patch fits"""
    patches: list[Row]


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; docs/reference/json.md has the schema.")] = False,
) -> None:
    """List every patch: name, group, switch, and whether its targets are those of vLLM 0.19.1.

    Example: vllm-gemma4-spec patches --json
    """
    from vllm_gemma4_spec.patching import fingerprint
    from vllm_gemma4_spec.patching.version import require_installed
    from vllm_gemma4_spec.registry import PATCHER

    require_installed()
    rows = []
    found = fingerprint.installed(s for patch in PATCHER.known for s in patch.checked_symbols)
    for status, patch in zip(PATCHER.status(), PATCHER.known, strict=True):
        marks = {s: Mark(found=found[s], wanted=fingerprint.wanted(s)) for s in patch.checked_symbols}
        rows.append(
            Row(
                name=status.name,
                group=status.group,
                state=status.state,
                targets=list(status.targets),
                switch=status.switch,
                scope=patch.scope,
                related=patch.related,
                fits=all(m.found == m.wanted for m in marks.values()),
                fingerprints=marks,
            )
        )
    report = Report(fits=all(r.fits for r in rows), patches=rows)
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
    else:
        table = rich.Table("patch", "group", "fits 0.19.1", f"{PATCH_PREFIX}… (0 = off)")
        for row in rows:
            table.add_row(row.name, row.group, "yes" if row.fits else "NO", row.switch.removeprefix(PATCH_PREFIX))
        show(rich.Console(), table)
    if not report.fits:
        raise typer.Exit(1)
