"""Client libraries in pinned releases, against the demo pair on a real ``vllm serve``: what their users see."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients import drive
from vllm_gemma4_spec.demo import build, run
from vllm_gemma4_spec.demo.server import Server

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("GEMMA4_CLIENTS_PYTHON") or ROOT / ".venv-clients" / "bin" / "python")
# Their classes have no field for reasoning.
WITHOUT_REASONING = {"instructor", "llama_index"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.is_file(), reason=f"{PYTHON} is missing; `make test-clients` makes it"),
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    pair, _ = build.ensure(build.default_folder())
    arguments = run.serve_arguments(pair, speculate=True)
    with Server(arguments, tmp_path_factory.mktemp("server") / "log") as server:
        yield server


def seen_by(client: str, url: str) -> dict[str, Any]:
    command = [str(PYTHON), "-m", "tests.clients.drive", client, url]
    environment = {**os.environ, "NO_PROXY": "*", "no_proxy": "*", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("client", drive.CLIENTS)
def test_what_a_client_shows(served: Server, client: str) -> None:
    seen = seen_by(client, served.url)
    assert set(seen) == {"whole", "streamed"}
    assert seen["whole"] == seen["streamed"]
    for way in seen.values():
        assert way["structured"]["city"] in ("Oslo", "Rome")
        if client == "instructor":
            assert way["tools"]["city"] in ("Oslo", "Rome")
            continue
        assert bool(way["reasoning"]) == (client not in WITHOUT_REASONING)
        assert way["content"]
        assert way["called"] == ["Oslo", "Rome"]
        assert way["last"]
        for text in (way["reasoning"], way["content"], way["last"]):
            assert not any(mark in text for mark in ("<|", "|>", "call:", "thought\n"))
