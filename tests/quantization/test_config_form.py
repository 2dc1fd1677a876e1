"""A checkpoint whose config a later transformers wrote gives the reference's log-probabilities in the real engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.checkpoints import reference
from tests.hf_config.test_normal_form import as_written_later
from tests.quantization.comparison import FIXTURES, TOKENS, engine_logprobs, text_only


@pytest.mark.parametrize(
    "name", ["26b-mm-awq-lite", *(pytest.param(n, marks=pytest.mark.slow) for n in ("31b-nvfp4", "e4b-awq-lite"))]
)
def test_logprobs_equal_the_reference(name: str, tmp_path: Path) -> None:
    folder = shutil.copytree(FIXTURES / name, tmp_path / name)
    config = as_written_later(json.loads((folder / "config.json").read_text()))
    (folder / "config.json").write_text(json.dumps(config))
    ours = engine_logprobs(folder, **text_only(folder))
    torch.testing.assert_close(ours, reference.logprobs(FIXTURES / name, TOKENS), atol=1e-4, rtol=0)
