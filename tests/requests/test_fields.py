"""Every field of every request of vLLM 0.19.1 is listed, each claim has its test, and the page is the list."""

from __future__ import annotations

import ast
import functools
import importlib
from pathlib import Path
from typing import Any

import pytest

from tests.requests import generator
from vllm_gemma4_spec.requests import fields
from vllm_gemma4_spec.requests.fields import MODELS, Verdict

TESTS = Path(__file__).parents[1]
# In every request of the generator, without a chance of its own.
ALWAYS = {"max_tokens"}


def names(model: str) -> set[str]:
    """Fields of a class of vLLM's, msgspec's or pydantic's."""
    module, _, name = model.partition(":")
    cls: Any = getattr(importlib.import_module(module), name)
    return set(cls.__struct_fields__) if hasattr(cls, "__struct_fields__") else set(cls.model_fields)


@pytest.mark.parametrize("model", MODELS)
def test_every_field_is_listed(model: str) -> None:
    listed = set(MODELS[model])
    assert names(model) - listed == set(), "not listed in vllm_gemma4_spec/requests/fields.py"
    assert listed - names(model) == set(), "listed, but not a field"


@functools.cache
def functions(file: Path) -> set[str]:
    return {n.name for n in ast.parse(file.read_text()).body if isinstance(n, ast.FunctionDef)}


def test_every_claim_has_its_test() -> None:
    for model in MODELS.values():
        for name, field in model.items():
            assert field.shown, name
            if field.verdict is Verdict.SAME:
                file, _, test = field.shown.partition("::")
                assert test in functions(TESTS / f"{file}.py"), name
    random = {n for n, f in fields.SAMPLING_PARAMS.items() if f is fields.RANDOM}
    assert random - generator.FIELDS.keys() - ALWAYS == set(), "said to be in the random requests"
    sources = "".join(
        Path(str(importlib.import_module(m).__file__)).read_text()
        for m in (
            "vllm.sampling_params",
            "vllm.entrypoints.openai.completion.serving",
            "vllm.entrypoints.openai.responses.protocol",
            "vllm.entrypoints.openai.responses.serving",
            "vllm.entrypoints.serve.render.serving",
            "vllm.renderers.base",
        )
    ).replace('"\n                "', "")
    for model in MODELS.values():
        for field in model.values():
            assert field.verdict is not Verdict.REFUSED or field.shown in sources, field


def test_the_page_is_the_list() -> None:
    page = (TESTS.parent / "docs" / "reference" / "compatibility.md").read_text()
    assert page.partition(fields.START)[2].partition(fields.END)[0].strip() == fields.page().strip(), (
        "run `make fields`"
    )
