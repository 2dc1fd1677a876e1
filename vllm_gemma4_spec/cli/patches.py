"""``vllm-gemma4-spec patches``: what the overlay changes in vLLM, and whether it fits the one installed."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead of a table.")] = False,
) -> None:
    """List every patch: name, group, switch, and whether its targets are those of vLLM 0.19.1.

    Example: vllm-gemma4-spec patches --json
    """
    from vllm_gemma4_spec.patching import fingerprint
    from vllm_gemma4_spec.patching.engine import PATCHER

    rows = []
    fits = True
    found = fingerprint.installed(s for patch in PATCHER.known() for s in patch.checked_symbols)
    for status, patch in zip(PATCHER.status(), PATCHER.known(), strict=True):
        marks = {s: {"found": found[s], "wanted": fingerprint.wanted(s)} for s in patch.checked_symbols}
        fit = all(m["found"] == m["wanted"] for m in marks.values())
        fits &= fit
        rows.append({**dataclasses.asdict(status), "fits": fit, "fingerprints": marks})
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        table = Table("patch", "group", "targets fit 0.19.1", "switch (0 = off)")
        for row in rows:
            table.add_row(str(row["name"]), str(row["group"]), "yes" if row["fits"] else "NO", str(row["switch"]))
        Console().print(table)
    if not fits:
        raise typer.Exit(1)
