"""A release of transformers that vLLM cannot read Gemma 4 with ends the start in one line."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import vllm_gemma4_spec
from tests.support import tiny_models
from tests.support.commands import ROOT
from tests.support.stock import without
from vllm_gemma4_spec.errors import VersionError
from vllm_gemma4_spec.patching import version
from vllm_gemma4_spec.patching.version import TRANSFORMERS
from vllm_gemma4_spec.startup.patches import TRANSFORMERS_VERSION


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """``installed(version)`` makes the distribution's metadata say that ``version`` of transformers is here."""
    original = importlib.metadata.version

    def install(found: str) -> None:
        replaced = lambda name: found if name == "transformers" else original(name)  # noqa: E731
        monkeypatch.setattr(version.importlib.metadata, "version", replaced)

    return install


@pytest.mark.parametrize("found", ["5.15.0", "5.24.0", "5.5.0"])
def test_a_gemma_4_does_not_start(installed: Callable[[str], None], found: str, tmp_path: Path) -> None:
    from vllm.config import ModelConfig

    vllm_gemma4_spec.apply()
    tiny_models.target_config(architectures=["Gemma4ForCausalLM"], dtype="float32").save_pretrained(tmp_path)
    options = {"dtype": "float32", "skip_tokenizer_init": True}
    assert ModelConfig(str(tmp_path), **options).get_head_size() == 64
    installed(found)
    with pytest.raises(VersionError) as error:
        ModelConfig(str(tmp_path), **options)
    assert str(error.value).startswith(f"transformers: {found} (wanted {TRANSFORMERS}); ")
    assert str(error.value).endswith(f"pip install 'transformers{TRANSFORMERS}'")


def test_stock_asks_for_no_release(installed: Callable[[str], None], tmp_path: Path) -> None:
    from vllm.config import ModelConfig

    tiny_models.target_config(architectures=["Gemma4ForCausalLM"], dtype="float32").save_pretrained(tmp_path)
    with without(TRANSFORMERS_VERSION):
        installed("5.24.0")
        assert ModelConfig(str(tmp_path), dtype="float32", skip_tokenizer_init=True).get_head_size() == 64


def test_the_extras_and_the_constraints_take_none_of_those() -> None:
    declared = [Requirement(r) for r in importlib.metadata.requires("vllm-gemma4-spec") or ()]
    for extra in ("vllm", "cpu", "quantize"):
        found = [r for r in declared if r.marker and r.marker.evaluate({"extra": extra}) and r.name == "transformers"]
        assert [r.specifier for r in found] == [TRANSFORMERS]
    pinned: dict[str, list[str]] = {}
    for line in (ROOT / "constraints" / "cuda.txt").read_text().splitlines():
        if line and not line.lstrip().startswith("#"):
            requirement = Requirement(line)
            pinned.setdefault(requirement.name, []).append(str(requirement.specifier).removeprefix("=="))
    assert pinned["vllm"] == ["0.19.1"]
    assert all(Version(found) in TRANSFORMERS for found in pinned["transformers"])
    assert pinned["torch"] == ["2.10.0"]
