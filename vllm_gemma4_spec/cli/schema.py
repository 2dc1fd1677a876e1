"""``vllm-gemma4-spec schema``: what another command prints with --json, as JSON Schema."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from vllm_gemma4_spec.errors import SettingError


def command(of: Annotated[str, typer.Argument(metavar="COMMAND", help="A command with --json, e.g. plan.")]) -> None:
    """Print the JSON Schema of COMMAND's --json; docs/reference/json.md has all of them as tables.

    Example: vllm-gemma4-spec schema plan
    """
    from vllm_gemma4_spec.ops import output

    if of not in output.OUTPUTS:
        raise SettingError(f"schema {of}: no command with --json; choose from {', '.join(output.OUTPUTS)}")
    typer.echo(json.dumps(output.schema(of), indent=2))
