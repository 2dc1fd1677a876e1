"""Bad input is answered with HTTP 400 that names the field."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm.exceptions import VLLMValidationError

from vllm_gemma4_spec.scope import gemma4_model

CONSTRAINTS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


def verify(original: Callable[..., None]) -> Callable[..., None]:
    """``SamplingParams.verify``, which the frontend calls for every request.

    Raises:
        VLLMValidationError: a negative budget, or what the original raises, with the field that it is about.

    Patch: ``request-errors``. Evidence: ``tests/requests/test_validation.py::test_stock_names_no_field``. Related
    upstream change: none found.
    """

    @functools.wraps(original)
    def wrapper(self: Any, model_config: Any, *args: Any, **kwargs: Any) -> None:
        if not gemma4_model(model_config):
            original(self, model_config, *args, **kwargs)
            return
        budget = self.thinking_token_budget
        if budget is not None and budget < 0:
            raise VLLMValidationError(
                f"thinking_token_budget must be 0 or more, got {budget}.",
                parameter="thinking_token_budget",
                value=budget,
            )
        constraint = _constraint(self)  # vLLM writes a choice as a grammar
        try:
            original(self, model_config, *args, **kwargs)
        except VLLMValidationError:
            raise
        except Exception as error:
            field = _refused_with_speculation(self, error) or constraint
            if field is None:
                raise
            raise VLLMValidationError(f"{field}: {error}", parameter=field) from error

    return wrapper


def validate_params(original: Callable[..., None]) -> Callable[..., None]:
    """``InputProcessor._validate_params``: the original names a budget without ``--reasoning-config`` in its text.

    Patch: ``request-errors``. Evidence: ``tests/requests/test_validation.py::test_stock_names_no_field``. Related
    upstream change: none found.
    """

    @functools.wraps(original)
    def wrapper(self: Any, params: Any, *args: Any, **kwargs: Any) -> None:
        try:
            original(self, params, *args, **kwargs)
        except VLLMValidationError:
            raise
        except ValueError as error:
            if not gemma4_model(self.model_config) or "thinking_token_budget" not in str(error):
                raise
            raise VLLMValidationError(
                str(error), parameter="thinking_token_budget", value=params.thinking_token_budget
            ) from error

    return wrapper


def _constraint(params: Any) -> str | None:
    names = [n for n in CONSTRAINTS if getattr(params.structured_outputs, n, None) is not None]
    return f"structured_outputs.{names[0]}" if names else None


def _refused_with_speculation(params: Any, error: Exception) -> str | None:
    if "not yet supported with speculative decoding" not in str(error):
        return None
    return "logit_bias" if params.logit_bias else "min_p"


def generate(original: Callable[..., Any]) -> Callable[..., Any]:
    """``AsyncLLM.generate``: refuse before there is a stream, which would begin with HTTP 200.

    The original is a generator: it looks at a request when its first output is asked for.

    Patch: ``request-errors``. Evidence: ``tests/requests/test_validation.py::test_stock_names_no_field``. Related
    upstream change: none found.
    """

    @functools.wraps(original)
    def wrapper(self: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        if gemma4_model(self.model_config) and _may_be_refused(sampling_params):
            self.input_processor._validate_params(sampling_params, ("generate",))
        return original(self, prompt, sampling_params, *args, **kwargs)

    return wrapper


def responses_stream_generator(original: Callable[..., Any]) -> Callable[..., Any]:
    """``OpenAIServingResponses.responses_stream_generator``, where ``generate`` is not called before the stream begins.

    Unrefused, the error would break the stream off without a word.

    Patch: ``request-errors``. Evidence: ``tests/requests/test_validation.py::test_stock_names_no_field``. Related
    upstream change: none found.
    """

    @functools.wraps(original)
    def wrapper(self: Any, request: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        processor = getattr(self.engine_client, "input_processor", None)
        if processor is not None and gemma4_model(self.model_config) and _may_be_refused(sampling_params):
            processor._validate_params(sampling_params, ("generate",))
        return original(self, request, sampling_params, *args, **kwargs)

    return wrapper


def _may_be_refused(params: Any) -> bool:
    fields = (params.structured_outputs, params.thinking_token_budget, params.logit_bias, params.min_p or None)
    return any(field is not None for field in fields)
