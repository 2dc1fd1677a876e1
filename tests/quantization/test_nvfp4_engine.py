"""ModelOpt's own exports in the real engine: every log-probability equals the float32 reference.

The reference decodes the exported tensors bit by bit and leaves the rest to transformers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoints import reference
from tests.quantization.comparison import (
    FIXTURES,
    MISTAKES,
    TOKENS,
    edited,
    engine_logprobs,
    per_expert,
    text_only,
    without,
)

NAMES = sorted(p.name for p in FIXTURES.iterdir())

# Quantized linears as vLLM fuses them: four a layer; E4B's two of per-layer inputs each and one for all.
LINEARS = {"31b-nvfp4": 16, "31b-awq-full": 16, "31b-svdquant": 16, "e4b-awq-lite": 25, "e4b-awq-clip": 25}
LINEARS |= {"26b-mm-awq-lite": 8}

TOLERANCE = 1e-3  # ten times what float32 rounding was seen to make of it
WIDE = 100 * TOLERANCE  # what a decoding mistake must exceed


@pytest.mark.parametrize("name", NAMES)
def test_logprobs_equal_the_reference(name: str) -> None:
    folder = FIXTURES / name
    layers: dict[str, float] = {}
    ours = engine_logprobs(folder, layers, **text_only(folder))
    torch.testing.assert_close(ours, reference.logprobs(folder, TOKENS), atol=TOLERANCE, rtol=0)
    assert len(layers) == LINEARS[name]
    assert max(layers.values()) < 1e-5, {k: v for k, v in layers.items() if v > 1e-5}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_tolerance_catches(mistake: str, tmp_path: Path) -> None:
    """What the comparison above would see if the engine decoded a checkpoint wrongly."""
    name, edit = MISTAKES[mistake]
    wrong = edited(FIXTURES / name, tmp_path / "wrong", edit)
    right = reference.logprobs(FIXTURES / name, TOKENS)
    assert (reference.logprobs(wrong, TOKENS) - right).abs().max() > WIDE


def test_the_engine_itself_differs_when_the_branch_is_gone(tmp_path: Path) -> None:
    """The same through the engine once, so that the comparison is known to fail end to end."""
    wrong = edited(FIXTURES / "31b-svdquant", tmp_path / "wrong", without("svdquant"))
    assert (engine_logprobs(wrong) - reference.logprobs(FIXTURES / "31b-svdquant", TOKENS)).abs().max() > WIDE


def test_the_other_names_of_the_low_rank_factors(tmp_path: Path) -> None:
    def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {k.replace("weight_quantizer._svdquant", "svdquant"): v for k, v in tensors.items()}

    folder = edited(FIXTURES / "31b-svdquant", tmp_path / "renamed", renamed)
    assert any(k.endswith("proj.svdquant_lora_a") for k in load_file(folder / "model.safetensors"))
    torch.testing.assert_close(
        engine_logprobs(folder), reference.logprobs(FIXTURES / "31b-svdquant", TOKENS), atol=TOLERANCE, rtol=0
    )


def test_packed_weights_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dequantized per call, where memory allows no more."""
    monkeypatch.setenv("VLLM_GEMMA4_SPEC_NVFP4_WEIGHTS", "packed")
    ours = engine_logprobs(FIXTURES / "31b-svdquant")
    torch.testing.assert_close(ours, reference.logprobs(FIXTURES / "31b-svdquant", TOKENS), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("weights", ["dequantized", "packed"])
def test_experts_in_nvfp4(weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = edited(FIXTURES / "26b-mm-awq-lite", tmp_path / "experts", per_expert)
    assert np.isfinite(reference.logprobs(folder, TOKENS)).all()
    monkeypatch.setenv("VLLM_GEMMA4_SPEC_NVFP4_WEIGHTS", weights)
    ours = engine_logprobs(folder, **text_only(folder))
    torch.testing.assert_close(ours, reference.logprobs(folder, TOKENS), atol=TOLERANCE, rtol=0)
