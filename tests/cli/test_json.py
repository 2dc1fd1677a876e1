"""The page and the schemas of --json; other tests hold what the commands print against them (``printed``)."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import ROOT
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
    assert (ROOT / "docs" / "json.md").read_text() == output.page(), "run `make schemas`"


@pytest.mark.parametrize("command", output.OUTPUTS)
def test_schemas_are_json_schemas_of_objects(command: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = output.schema(command)
    jsonschema.validators.validator_for(schema).check_schema(schema)
    assert schema["type"] == "object"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["vllm-gemma4-spec", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "schema", "top") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found == output.schema("top")
    assert run(monkeypatch, "schema", "nonsense") == 2
    assert "choose from doctor" in capsys.readouterr().err


def test_inspect_prints_what_its_schema_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fixture = Path(__file__).parents[1] / "checkpoints" / "fixtures" / "31b-awq-full"
    assert run(monkeypatch, "inspect", str(fixture), "--json") == 1  # NaN block scales
    output.adapter("inspect").validate_json(capsys.readouterr().out, strict=True)
