"""Configurations that would go wrong are refused when the engine is made; another model's are vLLM's business."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import vllm_gemma4_spec
from tests.support import tiny_models
from tests.support.engine import engine
from tests.support.stock import without
from vllm_gemma4_spec.engine.patches import ENGINE_CHECKS
from vllm_gemma4_spec.errors import EngineConfigError


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 4's own head sizes, 256 and 512."""
    config = tiny_models.target_config(head_dim=256, global_head_dim=512, num_attention_heads=2)
    return tiny_models.save(config, tmp_path_factory.mktemp("wide") / "model")


def error(model: Path, drafter: Path | None = None) -> str:
    with pytest.raises(EngineConfigError) as caught, engine(model, drafter):
        pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_head_sizes_that_a_cpu_cannot_attend_with(wide: Path, tiny: dict[str, Path]) -> None:
    """Stock starts, and its engine ends at the first request."""
    assert f"{wide}: global_head_dim is 512, and the CPU attention of vLLM 0.19.1 takes 32, 64, " in error(wide)
    assert f"{wide}: global_head_dim is 512" in error(tiny["target"], wide)


def test_the_v2_model_runner(tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """No patch of the model runner would be in its way, while their state says on."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    assert "VLLM_USE_V2_MODEL_RUNNER=1: the V2 model runner" in error(tiny["target"])
    assert "unset it" in error(tiny["target"], tiny["drafter"])


def test_stock_takes_every_setting(tiny: dict[str, Path], wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.engine.arg_utils import EngineArgs

    with without(ENGINE_CHECKS):
        assert EngineArgs(str(wide), skip_tokenizer_init=True).create_engine_config() is not None
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
        assert EngineArgs(str(tiny["target"]), skip_tokenizer_init=True).create_engine_config() is not None


def test_another_models_settings_are_left_to_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM
    from vllm.engine.arg_utils import EngineArgs

    shape = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 512, "num_hidden_layers": 1}
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, max_position_embeddings=128, **shape)
    ).save_pretrained(tmp_path)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    vllm_gemma4_spec.apply()
    assert EngineArgs(str(tmp_path), skip_tokenizer_init=True).create_engine_config() is not None
