"""The page and the schemas of --json; other tests hold what the commands print against them (``printed``)."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest

from tests.support.commands import ROOT, in_process, printed
from vllm_gemma4_spec import cli
from vllm_gemma4_spec.ops import output

NO_JSON = {"schema"}  # prints JSON without being asked


def test_every_command_has_json_and_a_schema() -> None:
    import importlib

    for name, module in cli.COMMANDS.items():
        options = inspect.signature(importlib.import_module(module).command).parameters
        assert ("as_json" in options) == (name not in NO_JSON), name
    assert set(output.OUTPUTS) == set(cli.COMMANDS) - NO_JSON


def test_the_page_is_current() -> None:
    assert (ROOT / "docs" / "reference" / "json.md").read_text() == output.page(), "run `make schemas`"


@pytest.mark.parametrize("command", output.OUTPUTS)
def test_schemas_are_json_schemas_of_objects(command: str) -> None:
    import jsonschema

    schema = output.schema(command)
    jsonschema.validators.validator_for(schema).check_schema(schema)
    assert schema["type"] == "object"


def test_the_command() -> None:
    done = in_process("schema", "top")
    assert done.returncode == 0
    assert json.loads(done.stdout) == output.schema("top")
    done = in_process("schema", "nonsense")
    assert done.returncode == 2
    assert "choose from doctor" in done.stderr


def test_inspect_prints_what_its_schema_says() -> None:
    done = in_process("inspect", str(Path(__file__).parents[1] / "checkpoints" / "fixtures" / "31b-awq-full"), "--json")
    assert done.returncode == 1  # NaN block scales
    assert printed("inspect", done)["nan_blocks"] > 0
