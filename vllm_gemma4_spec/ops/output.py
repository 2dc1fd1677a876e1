"""What commands print with ``--json``, as pydantic models: one description for the code, the schema and the page."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter

CONFIG = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Output(BaseModel):
    """Base of everything printed with ``--json``; a text below a field describes it."""

    model_config = CONFIG


# Command -> what one line or text of its --json is.
OUTPUTS = {
    "doctor": "vllm_gemma4_spec.ops.doctor.findings:Report",
    "plan": "vllm_gemma4_spec.ops.plan.report:Report",
    "bench": "vllm_gemma4_spec.ops.bench.report:Report",
    "top": "vllm_gemma4_spec.ops.live:Live",
    "inspect": "vllm_gemma4_spec.checkpoints.inspection:Report",
    "repair": "vllm_gemma4_spec.checkpoints.repairing:Repair",
    "quantize": "vllm_gemma4_spec.checkpoints.inspection:Report",
    "patches": "vllm_gemma4_spec.cli.patches:Report",
    "demo": "vllm_gemma4_spec.cli.demo:Report",
    "demo-models": "vllm_gemma4_spec.cli.demo_models:Report",
}


def adapter(command: str) -> TypeAdapter[Any]:
    """Validates and describes what ``command --json`` prints."""
    module, _, name = OUTPUTS[command].partition(":")
    return TypeAdapter(getattr(importlib.import_module(module), name))


def schema(command: str) -> dict[str, Any]:
    """The JSON Schema of ``command --json``."""
    return adapter(command).json_schema(mode="serialization")


_HEAD = """# JSON output

What each command prints with `--json`. Generated from the models in the code by `make schemas`; tests hold this page
against them and what the commands print against both. `vllm-gemma4-spec schema COMMAND` prints the same as JSON Schema.
"""


def _type(node: dict[str, Any]) -> str:
    """A JSON Schema node in a few words."""
    if "$ref" in node:
        return str(node["$ref"]).rpartition("/")[2]
    if "anyOf" in node:
        return " or ".join(_type(part) for part in node["anyOf"])
    if "enum" in node:
        return " or ".join(f"`{json.dumps(value)}`" for value in node["enum"])
    if node.get("type") == "array":
        return f"list of {_type(node.get('items') or node.get('prefixItems', [{}])[0])}"
    if node.get("type") == "object":
        values = node.get("additionalProperties")
        return f"object: text to {_type(values)}" if isinstance(values, dict) else "object"
    kind = str(node.get("type", "any"))
    return {"string": "text"}.get(kind, kind)


def _rows(node: dict[str, Any]) -> list[str]:
    lines = ["| key | value | |", "|---|---|---|"]
    for name, value in node["properties"].items():
        text = " ".join(str(value.get("description", "")).split()).replace("|", "\\|")
        lines.append(f"| `{name}` | {_type(value)} | {text} |")
    return lines


def page() -> str:
    """``docs/reference/json.md``."""
    lines = [_HEAD]
    for command in OUTPUTS:
        found = schema(command)
        parts = found.pop("$defs", {})
        lines.append(f"## {command}\n")
        if command == "quantize":
            lines.append("That of [inspect](#inspect) for the checkpoint written.\n")
            continue
        lines += [*_rows(found), ""]
        for name, part in parts.items():
            if "properties" in part:
                lines += [f"**{name}**: {_first_line(part)}\n", *_rows(part), ""]
            else:
                lines.append(f"**{name}**: {_type(part)}\n")
    return "\n".join(lines).rstrip() + "\n"


def _first_line(part: dict[str, Any]) -> str:
    return str(part.get("description", "")).split("\n\n")[0].replace("\n", " ")


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
