"""A checkpoint whose config a later transformers wrote gives the reference's log-probabilities in the real engine."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from tests.checkpoints import reference
from tests.hf_config.test_normal_form import as_written_later
from tests.quantization.comparison import FIXTURES, TOKENS, engine_logprobs, text_only
from vllm_gemma4_spec.errors import CheckpointError


@pytest.mark.parametrize(
    "name", ["26b-mm-awq-lite", *(pytest.param(n, marks=pytest.mark.slow) for n in ("31b-nvfp4", "e4b-awq-lite"))]
)
def test_logprobs_equal_the_reference(name: str, tmp_path: Path) -> None:
    folder = shutil.copytree(FIXTURES / name, tmp_path / name)
    config = as_written_later(json.loads((folder / "config.json").read_text()))
    (folder / "config.json").write_text(json.dumps(config))
    ours = engine_logprobs(folder, **text_only(folder))
    # In float64: transformers in float32 is off by 6e-5 itself for this E4B.
    truth = reference.logprobs(FIXTURES / name, TOKENS, double=True).float()
    torch.testing.assert_close(ours, truth, atol=1e-4, rtol=0)


def test_forms_that_differ_end_the_start_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the `vllm` command and as an exception elsewhere."""
    from vllm.config import ModelConfig

    import vllm_gemma4_spec

    vllm_gemma4_spec.apply()
    config = as_written_later(json.loads((FIXTURES / "31b-nvfp4" / "config.json").read_text()))
    (tmp_path / "config.json").write_text(json.dumps(config | {"global_head_dim": 128}))
    message = r"config\.json: global_head_dim is 128 and per_layer_config gives [^\n]* delete the other$"
    with pytest.raises(CheckpointError, match=message):
        ModelConfig(str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["/usr/bin/vllm", "serve"])
    with pytest.raises(SystemExit, match=f"^vllm-gemma4-spec: [^\n]*{message}"):
        ModelConfig(str(tmp_path))
