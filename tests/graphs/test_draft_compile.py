"""torch.compile's settings for a draft model. What they are worth takes a GPU: ``benchmarks/full_shape.py``."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import torch
from torch._inductor import config
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import V

import vllm_gemma4_spec
from tests.support import engine as _engine  # sets the environment
from tests.support.stock import without
from vllm_gemma4_spec.graphs.inductor import Choices
from vllm_gemma4_spec.patches.graphs import DRAFT_COMPILE

assert _engine
PDL = "triton.enable_pdl"


@pytest.fixture(autouse=True)
def _patched() -> Iterator[None]:
    vllm_gemma4_spec.apply()
    with config.patch(inductor_choices_class=None):
        yield


def settings_of_a_drafter(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0), own: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inductor's settings while the proposer makes its model, when vLLM's backend copies them, and afterwards."""
    from vllm.v1.spec_decode import draft_model

    inductor = {"size_asserts": False, **(own or {})}
    seen: list[dict[str, Any]] = []

    def get_model(**_: Any) -> torch.nn.Module:
        seen.append(dict(inductor))
        return torch.nn.Module()

    monkeypatch.setattr(draft_model, "get_model", get_model)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    proposer = SimpleNamespace(
        _create_draft_vllm_config=lambda: None,
        device=torch.device("cuda"),
        vllm_config=SimpleNamespace(compilation_config=SimpleNamespace(inductor_compile_config=inductor)),
    )
    draft_model.DraftModelProposer._get_model(proposer)
    return seen[0], inductor


def test_a_drafter_has_compiler_settings_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter, afterwards = settings_of_a_drafter(monkeypatch)
    assert drafter == {"size_asserts": False, PDL: True}
    assert afterwards == {"size_asserts": False}  # the target's
    assert config.inductor_choices_class is Choices


def test_stock_compiles_a_drafter_as_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    with without(DRAFT_COMPILE):
        drafter, afterwards = settings_of_a_drafter(monkeypatch)
    assert drafter == afterwards == {"size_asserts": False}
    assert config.inductor_choices_class is None


def test_before_hopper_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter, _ = settings_of_a_drafter(monkeypatch, capability=(8, 9))
    assert PDL not in drafter


@pytest.mark.parametrize("value", [True, False])
def test_what_a_user_sets_stays(monkeypatch: pytest.MonkeyPatch, value: bool) -> None:
    drafter, afterwards = settings_of_a_drafter(monkeypatch, own={PDL: value})
    assert drafter[PDL] is afterwards[PDL] is value


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
        assert Choices().should_use_persistent_reduction(features, cooperative_reduction=False) == persistent
