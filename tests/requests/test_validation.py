"""Bad input is refused with the name of its field; the frontend's own check, as an engine has it, without an engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import scripted
from tests.support.stock import without
from vllm_gemma4_spec.requests.patches import REQUEST_ERRORS

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "schema": ({"json": {"type": "nothing"}}, "structured_outputs.json"),
    "schema that is no JSON": ({"json": "{"}, "structured_outputs.json"),
    "schema that is no schema": ({"json": {"type": 3}}, "structured_outputs.json"),
    "regex": ({"regex": "[0-9"}, "structured_outputs.regex"),
    "grammar": ({"grammar": "root ::= ("}, "structured_outputs.grammar"),
    "empty grammar": ({"grammar": " "}, "structured_outputs.grammar"),
    "no choice": ({"choice": []}, "structured_outputs.choice"),
    "budget without --reasoning-config": ({"thinking_token_budget": 3}, "thinking_token_budget"),
    "negative budget": ({"thinking_token_budget": -1}, "thinking_token_budget"),
}


@pytest.fixture(scope="module")
def check(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], None]:
    """What the frontend does with a request's parameters."""
    import vllm_gemma4_spec

    vllm_gemma4_spec.apply()
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.sampling_params import StructuredOutputsParams
    from vllm.v1.engine.input_processor import InputProcessor

    folder: Path = scripted.save(tmp_path_factory.mktemp("scripted") / "target")
    config = EngineArgs(str(folder), dtype="float32", reasoning_parser="gemma4").create_engine_config()
    processor = InputProcessor(config)

    def run(fields: dict[str, Any]) -> None:
        budget = fields.get("thinking_token_budget")
        constraint = {k: v for k, v in fields.items() if k != "thinking_token_budget"}
        params = SamplingParams(
            thinking_token_budget=budget,
            structured_outputs=StructuredOutputsParams(**constraint) if constraint else None,
        )
        processor._validate_params(params, ("generate",))

    return run


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused_is_named(check: Any, name: str) -> None:
    from vllm.exceptions import VLLMValidationError

    fields, field = BAD[name]
    with pytest.raises(VLLMValidationError) as raised:
        check(fields)
    assert raised.value.parameter == field
    assert field in str(raised.value)


def test_good_input_passes(check: Any) -> None:
    check({"regex": "[0-9]{2}"})
    check({"json": {"type": "object"}})
    check({})


def test_stock_names_no_field(check: Any) -> None:
    with without(REQUEST_ERRORS):
        for fields, _ in BAD.values():
            with pytest.raises(ValueError) as raised:  # noqa: PT011 - of any text
                check(fields)
            assert getattr(raised.value, "parameter", None) is None
