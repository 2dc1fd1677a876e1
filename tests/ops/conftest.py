"""Real servers for all tests of this folder: with speculation, and without."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import tiny_tokenizer
from tests.support.commands import vllm_server


@pytest.fixture(scope="session")
def served_model(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "model"
    shutil.copytree(tiny["target"], folder)
    tiny_tokenizer.save(folder)
    return folder


@pytest.fixture(scope="session")
def speculating_server(
    tiny: dict[str, Path], served_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    speculative = {"method": "draft_model", "model": str(tiny["close"]), "num_speculative_tokens": 3}
    log = tmp_path_factory.mktemp("server") / "log"
    with vllm_server(served_model, log, "--speculative-config", json.dumps(speculative)) as url:
        yield url


@pytest.fixture(scope="session")
def plain_server(served_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with vllm_server(served_model, tmp_path_factory.mktemp("server") / "log") as url:
        yield url
