"""torch.compile's settings for a draft model. What they are worth takes a GPU: ``benchmarks/full_shape.py``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import torch
from torch._inductor import config
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import V

from tests.support import engine as _engine  # sets the environment
from tests.support.configs import GEMMA4, LLAMA, vllm_config
from tests.support.stock import without
from vllm_gemma4_spec.performance.compile_settings import LaunchChoices
from vllm_gemma4_spec.performance.patches import DRAFT_COMPILE

assert _engine
pytestmark = pytest.mark.usefixtures("inductor")
PDL = "triton.enable_pdl"


class Backends:
    """Compiler settings that vLLM's backends keep, of a model named so or made under a tag."""

    def __init__(self, model: Any = GEMMA4, **own: Any) -> None:
        from vllm.config import VllmConfig

        self.config = VllmConfig()
        self.config.model_config = model  # the drafter's, where one is made
        self.config.compilation_config.inductor_compile_config = {"size_asserts": False, **own}

    def settings(self, prefix: str = "", tag: str | None = None) -> dict[str, Any]:
        from vllm.compilation.backends import VllmBackend, set_model_tag

        with set_model_tag(tag) if tag else nullcontext():
            backend = VllmBackend(self.config, prefix)
        return backend.inductor_config


@pytest.mark.usefixtures("hopper")
def test_a_drafter_has_compiler_settings_of_its_own() -> None:
    backends = Backends()
    assert backends.settings(tag="draft_model") == {"size_asserts": False, PDL: True}
    assert backends.settings("draft_model") == {"size_asserts": False, PDL: True}  # loaded from the cache: no tag then
    assert backends.settings() == backends.config.compilation_config.inductor_compile_config == {"size_asserts": False}


@pytest.mark.usefixtures("hopper")
def test_stock_compiles_a_drafter_as_the_target() -> None:
    with without(DRAFT_COMPILE):
        assert Backends().settings(tag="draft_model") == {"size_asserts": False}


@pytest.mark.usefixtures("hopper")
def test_another_models_drafter_is_compiled_as_in_stock() -> None:
    assert Backends(LLAMA).settings(tag="draft_model") == {"size_asserts": False}


@pytest.mark.parametrize("capability", [(8, 9), None])
def test_before_hopper_nothing_changes(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert Backends().settings(tag="draft_model") == {"size_asserts": False}


def test_from_hopper_on_a_drafter_has_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert Backends().settings(tag="draft_model") == {"size_asserts": False, PDL: True}


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("value", [True, False])
def test_what_a_user_sets_stays(value: bool) -> None:
    backends = Backends(**{PDL: value})
    assert backends.settings(tag="draft_model")[PDL] is backends.settings()[PDL] is value


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(("drafter", "choices"), [(GEMMA4, LaunchChoices), (LLAMA, None)], ids=["gemma4", "llama"])
def test_the_choices_are_there_before_anything_is_compiled(
    monkeypatch: pytest.MonkeyPatch, drafter: Any, choices: Any
) -> None:
    from vllm.v1.spec_decode import draft_model

    seen: list[Any] = []

    def get_model(**_: Any) -> torch.nn.Module:
        seen.append(config.inductor_choices_class)
        return torch.nn.Module()

    monkeypatch.setattr(draft_model, "get_model", get_model)
    proposer = SimpleNamespace(_create_draft_vllm_config=lambda: None, vllm_config=vllm_config(GEMMA4, drafter))
    draft_model.DraftModelProposer._get_model(proposer)
    assert seen == [choices]


@pytest.mark.slow  # starts Python and a C++ compiler three times
def test_a_second_start_loads_what_the_first_one_compiled(tmp_path: Path) -> None:
    """Settings are part of the key by which layers of one shape find the one that was compiled."""

    def start(*arguments: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "tests.performance.second_start", *arguments]
        env = {**os.environ, "VLLM_CACHE_ROOT": str(tmp_path)}
        done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    starts = start(), start(), start("forget")
    assert [found["loaded"] for found in starts] == [False, True, True]
    assert [found["pdl"] for found in starts] == [True, True, False]
    # The third compiles again what it finds under another key.
    assert [found["artifacts_saved"] > 0 for found in starts] == [True, False, True]


@pytest.mark.parametrize(
    ("values", "hint", "drafter", "persistent"),
    [
        (2560, ReductionHint.INNER, True, True),  # a hidden state of E4B
        (2560, ReductionHint.INNER, False, False),  # the target's: Inductor's own limit is 1,024
        (512, ReductionHint.INNER, False, True),
        (262_144, ReductionHint.INNER, True, False),  # the vocabulary
        (2560, ReductionHint.OUTER, True, False),
    ],
)
def test_a_drafters_rows_stay_in_registers(values: int, hint: ReductionHint, drafter: bool, persistent: bool) -> None:
    features = SimpleNamespace(get_reduction_hint=lambda: hint, reduction_numel=sympy.Integer(values))
    sizes = SimpleNamespace(statically_known_leq=lambda value, limit: value <= limit)
    graph: Any = SimpleNamespace(sizevars=sizes)
    with config.patch({PDL: drafter}), V.set_graph_handler(graph):
        assert LaunchChoices().should_use_persistent_reduction(features, cooperative_reduction=False) == persistent
