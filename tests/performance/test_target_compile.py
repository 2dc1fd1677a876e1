"""torch.compile's settings for a Gemma 4 target. What they are worth takes a GPU: ``benchmarks/full_shape.py``."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch._inductor import config
from vllm import platforms
from vllm.compilation.backends import VllmBackend
from vllm.engine.arg_utils import EngineArgs

from tests.support import engine as _engine  # sets the environment
from tests.support import tiny_models
from tests.support.configs import GEMMA4, LLAMA
from tests.support.stock import without
from vllm_gemma4_spec.performance import compile_settings
from vllm_gemma4_spec.performance.compile_settings import LaunchChoices
from vllm_gemma4_spec.performance.patches import TARGET_COMPILE

assert _engine
pytestmark = pytest.mark.usefixtures("inductor")
PDL = "triton.enable_pdl"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save(tiny_models.target_config(), tmp_path_factory.mktemp("model") / "target")


def finished(folder: Path, **own: Any) -> Any:
    """The config of an engine for this model."""
    args = EngineArgs(
        str(folder), skip_tokenizer_init=True, dtype="float32", compilation_config={"inductor_compile_config": own}
    )
    return args.create_engine_config()


def settings(made: Any) -> dict[str, Any]:
    found: dict[str, Any] = made.compilation_config.inductor_compile_config
    return found


@pytest.mark.usefixtures("hopper")
def test_a_target_is_compiled_with_dependent_launch(folder: Path) -> None:
    made = finished(folder)
    assert settings(made)[PDL] is True
    VllmBackend(made)
    assert config.inductor_choices_class is LaunchChoices


@pytest.mark.usefixtures("hopper")
def test_stock_compiles_a_target_without_dependent_launch(folder: Path) -> None:
    with without(TARGET_COMPILE):
        made = finished(folder)
        assert PDL not in settings(made)
        VllmBackend(made)
        assert config.inductor_choices_class is None


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("value", [True, False])
def test_what_a_user_sets_stays(folder: Path, value: bool) -> None:
    made = finished(folder, **{PDL: value})
    assert settings(made)[PDL] is value
    VllmBackend(made)
    assert config.inductor_choices_class is (LaunchChoices if value else None)


def test_before_hopper_nothing_changes(folder: Path) -> None:
    made = finished(folder)  # this machine has no card at all
    assert PDL not in settings(made)
    VllmBackend(made)
    assert config.inductor_choices_class is None


def given(model: Any) -> dict[str, Any]:
    """The settings that an engine for ``model`` gets when nothing else is in its config."""

    def original(made: Any) -> None:
        made.compilation_config = SimpleNamespace(inductor_compile_config={})

    made = SimpleNamespace(model_config=model)
    compile_settings.vllm_config(original)(made)
    return settings(made)


@pytest.mark.usefixtures("hopper")
def test_another_model_is_compiled_as_in_stock() -> None:
    assert given(LLAMA) == {}


@pytest.mark.parametrize(
    ("cuda", "capability", "wanted"),
    [(True, 90, {PDL: True}), (True, 100, {PDL: True}), (True, 89, {}), (False, 0, {})],
    ids=["Hopper", "Blackwell", "Ada", "no CUDA"],
)
def test_which_cards_take_it(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, capability: int, wanted: dict[str, Any]
) -> None:
    platform = SimpleNamespace(is_cuda=lambda: cuda, has_device_capability=lambda least: capability >= least)
    monkeypatch.setattr(platforms, "current_platform", platform)
    assert given(GEMMA4) == wanted


@pytest.mark.usefixtures("hopper")
def test_graphs_compiled_without_it_are_not_taken_for_these(folder: Path) -> None:
    """The setting is part of the key of vLLM's compile cache."""
    ours = finished(folder).compute_hash()
    with without(TARGET_COMPILE):
        assert finished(folder).compute_hash() != ours
