"""docs/how-to/migrating.md says what became of every line of the published quick start, and the overlay agrees."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/how-to/migrating.md").read_text()
OVERLAY = ROOT / "overlays/deckard-spark"
ROWS = {row[0]: row[1] for row in (re.split(r" *\| *", line.strip("| ")) for line in PAGE.splitlines() if "|" in line)}
SERVICE = ["image:", "container_name:", "restart:", "network_mode: host", ":/models/deckard", ":/models/e4b-drafter"]
SERVICE += ["modelopt_patched.py", "serving_chat_patched.py", "eagle_patched.py", "ipc: host", "driver: nvidia"]
SERVICE += ["count: all", "capabilities: [gpu]"]
VARIABLES = ["VLLM_TEST_FORCE_FP8_MARLIN=1", "VLLM_MARLIN_USE_ATOMIC_ADD=1", "VLLM_ALLOW_LONG_MAX_MODEL_LEN=1"]
VARIABLES += ["TORCH_MATMUL_PRECISION=high", "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"]
OPTIONS = ["--served-model-name deckard-31b", "--quantization modelopt", "--dtype auto", "--kv-cache-dtype fp8"]
OPTIONS += ["--tensor-parallel-size 1", "--max-model-len 131072", "--max-num-seqs 4", "--gpu-memory-utilization 0.85"]
OPTIONS += ["--trust-remote-code", "--host 0.0.0.0 --port 8000", "--enable-chunked-prefill", "--enable-prefix-caching"]
OPTIONS += ["--enable-auto-tool-choice", "--tool-call-parser gemma4", "--reasoning-parser gemma4"]
OPTIONS += ["vllm serve /models/deckard", "--speculative-config"]


@pytest.mark.parametrize("old", SERVICE + VARIABLES + OPTIONS)
def test_every_old_line_has_a_row(old: str) -> None:
    (now,) = [now for row, now in ROWS.items() if old in row]
    assert now


@pytest.mark.parametrize("old", OPTIONS)
def test_options_that_stay_are_in_the_settings_and_no_other(old: str) -> None:
    settings = yaml.safe_load((OVERLAY / "serve.yaml").read_text())
    name, _, value = old.removeprefix("--").partition(" ")
    now = next(now for row, now in ROWS.items() if old in row)
    if now == "left out":
        assert name not in settings
    elif now == "stays":
        assert settings[name] == (yaml.safe_load(value) if value else True)


@pytest.mark.parametrize("variable", VARIABLES)
def test_variables_that_are_kept_are_set_and_no_other(variable: str) -> None:
    environment = yaml.safe_load((OVERLAY / "compose.yaml").read_text())["services"]["vllm"]["environment"]
    assert (variable in environment) == (ROWS[f"`{variable}`"] == "kept")
