"""Bad input is refused with the name of its field; the frontend's own check, as an engine has it, without an engine."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support import scripted
from tests.support.stock import without
from vllm_gemma4_spec.requests.patches import REQUEST_ERRORS
from vllm_gemma4_spec.requests.validation import CONSTRAINTS

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
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The frontend's own, of a server without ``--reasoning-config``."""
    import vllm_gemma4_spec

    vllm_gemma4_spec.apply()
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.input_processor import InputProcessor

    folder: Path = scripted.save(tmp_path_factory.mktemp("scripted") / "target")
    config = EngineArgs(str(folder), dtype="float32", reasoning_parser="gemma4").create_engine_config()
    return InputProcessor(config)


def params(fields: dict[str, Any]) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    constraint = {k: v for k, v in fields.items() if k in CONSTRAINTS}
    return SamplingParams(
        **{k: v for k, v in fields.items() if k not in CONSTRAINTS},
        structured_outputs=StructuredOutputsParams(**constraint) if constraint else None,
    )


@pytest.fixture
def check(processor: Any) -> Callable[[dict[str, Any]], None]:
    """What the frontend does with a request's parameters."""
    return lambda fields: processor._validate_params(params(fields), ("generate",))


@pytest.fixture
def llama(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is not a Gemma 4."""
    monkeypatch.setattr(processor.model_config.hf_config, "model_type", "llama")


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


@pytest.mark.usefixtures("llama")
def test_another_models_errors_are_vllms(check: Any) -> None:
    for fields, _ in BAD.values():
        with pytest.raises(ValueError) as raised:  # noqa: PT011 - of any text
            check(fields)
        assert getattr(raised.value, "parameter", None) is None


def test_a_negative_budget_is_told_from_a_missing_reasoning_config(check: Any) -> None:
    with pytest.raises(ValueError, match="must be 0 or more, got -1"):
        check({"thinking_token_budget": -1})


def test_what_vllm_names_stays_named(check: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match="Requested sample logprobs of 1000") as raised:
        check({"logprobs": 1000})
    assert raised.value.parameter == "logprobs"


@pytest.mark.parametrize("fields", [{"min_p": 0.5}, {"logit_bias": {3: 1.0}}], ids=lambda fields: next(iter(fields)))
def test_what_speculation_does_not_have_is_named(
    check: Any, processor: Any, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.exceptions import VLLMValidationError

    check(fields)
    monkeypatch.setattr(processor, "speculative_config", object())
    with pytest.raises(VLLMValidationError, match="not yet supported with speculative decoding") as raised:
        check(fields)
    assert raised.value.parameter == next(iter(fields))


def test_an_error_about_no_field_stays_as_it_is(check: Any, processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.sample.logits_processor import LogitsProcessor

    class Own(LogitsProcessor):
        @classmethod
        def validate_params(cls, sampling_params: Any) -> None:
            raise ValueError("a user's own rule")

    monkeypatch.setattr(processor.model_config, "logits_processors", [Own])
    with pytest.raises(ValueError, match=r"^a user's own rule$"):
        check({})


def generate(processor: Any, fields: dict[str, Any]) -> Any:
    from vllm.v1.engine.async_llm import AsyncLLM

    engine: Any = SimpleNamespace(model_config=processor.model_config, input_processor=processor)
    return AsyncLLM.generate(engine, "a prompt", params(fields), "an id")


def respond(processor: Any, fields: dict[str, Any], **client: Any) -> Any:
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses

    engine = SimpleNamespace(**client or {"input_processor": processor})
    serving: Any = SimpleNamespace(model_config=processor.model_config, engine_client=engine)
    rest: Any = (None,) * 5
    return OpenAIServingResponses.responses_stream_generator(serving, None, params(fields), *rest)  # type: ignore[arg-type]


@pytest.mark.parametrize("begin", [generate, respond])
def test_bad_input_is_refused_before_there_is_a_stream(begin: Any, processor: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    for fields, field in BAD.values():
        with pytest.raises(VLLMValidationError) as raised:
            begin(processor, fields)
        assert raised.value.parameter == field
    assert inspect.isasyncgen(begin(processor, {"regex": "[0-9]"}))


@pytest.mark.parametrize("begin", [generate, respond])
def test_only_what_may_be_refused_is_looked_at_twice(
    begin: Any, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(processor, "_validate_params", lambda params, tasks: seen.append(params))
    for fields in ({}, {"temperature": 0.5, "logprobs": 1}):
        assert inspect.isasyncgen(begin(processor, fields))
    assert not seen
    for fields in ({"min_p": 0.5}, {"logit_bias": {3: 1.0}}, {"thinking_token_budget": 0}, {"regex": "[0-9]"}):
        begin(processor, fields)
    assert len(seen) == 4


@pytest.mark.usefixtures("llama")
@pytest.mark.parametrize("begin", [generate, respond])
def test_another_models_streams_begin_as_in_stock(begin: Any, processor: Any) -> None:
    assert inspect.isasyncgen(begin(processor, {"regex": "[0-9"}))


def test_a_client_that_cannot_look_at_parameters(processor: Any) -> None:
    assert inspect.isasyncgen(respond(processor, {"regex": "[0-9"}, errored=False))
