"""The plugin's metrics where vLLM's ``/metrics`` serves the files of prometheus_client's multiprocess mode."""

from __future__ import annotations

import importlib
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

import vllm_gemma4_spec
from tests.support.commands import gemma4_spec, printed, vllm_server
from tests.support.stock import without
from vllm_gemma4_spec.metrics import reports, server_info
from vllm_gemma4_spec.metrics.patches import SERVER_FIGURES
from vllm_gemma4_spec.ops import server
from vllm_gemma4_spec.ops.server import Sample


@pytest.fixture
def several_servers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What ``--api-server-count 2`` sets for each API server."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    monkeypatch.setenv(reports.FOLDER, str(tmp_path))


@pytest.fixture
def one_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process with the plugin loaded, in which vLLM is about to build its server."""
    monkeypatch.setenv(reports.FOLDER, str(tmp_path))
    importlib.import_module("vllm.entrypoints.serve.instrumentator.metrics")
    vllm_gemma4_spec.register()
    reports.write()


def shown() -> dict[str, float]:
    """What is sampled, by name."""
    return {s.name: s.value for s in samples()}


def samples(**state: Any) -> list[Any]:
    """What vLLM's own route answers with; ``state``: of its application."""
    from fastapi import FastAPI
    from fastapi.testclient import TestClient
    from vllm.entrypoints.serve.instrumentator import metrics

    app = FastAPI()
    metrics.attach_router(app)
    for name, value in state.items():  # as vLLM does, once the routes are there
        setattr(app.state, name, value)
    answer = TestClient(app).get("/metrics")
    assert answer.status_code == 200
    return [s for family in text_string_to_metric_families(answer.text) for s in family.samples]


@pytest.mark.usefixtures("several_servers")
def test_stock_shows_what_the_files_hold_and_no_more() -> None:
    with without(SERVER_FIGURES):
        assert shown() == {}


@pytest.mark.usefixtures("several_servers")
def test_metrics_beside_those_of_the_files(tmp_path: Path) -> None:
    from prometheus_client.values import MultiProcessValue

    vllm_gemma4_spec.apply()
    reports.write()
    value = MultiProcessValue(lambda: 7)("counter", "vllm:seen", "vllm:seen_total", (), (), "in a file")
    value.inc(3)
    metrics = shown()
    assert metrics["vllm:seen_total"] == 3
    assert metrics["gemma4_spec_process"] == 1
    assert metrics["gemma4_spec_drafts_skipped_total"] == reports._counts["drafts_skipped"][""]  # of this process


@pytest.mark.usefixtures("one_server")
def test_one_api_server_serves_its_own_registry() -> None:
    """No second collector, whose series would be there twice."""
    metrics = shown()
    assert metrics["gemma4_spec_process"] == 1
    assert "python_info" in metrics


@pytest.mark.parametrize("servers", ["one_server", "several_servers"])
def test_the_server_says_what_it_runs(
    servers: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm_gemma4_spec.apply()
    request.getfixturevalue(servers)
    monkeypatch.setattr(server_info, "_apps", [])
    model = SimpleNamespace(model="a/model", hf_config=SimpleNamespace(model_type="gemma4"), quantization=None)
    spec = SimpleNamespace(method="draft_model", num_speculative_tokens=4, model="a/drafter")
    args = SimpleNamespace(
        tool_call_parser="gemma4",
        enable_auto_tool_choice=True,
        structured_outputs_config=SimpleNamespace(reasoning_parser=None),
    )
    config = SimpleNamespace(model_config=model, speculative_config=spec)
    (sample,) = (s for s in samples(vllm_config=config, args=args) if s.name == "gemma4_spec_server")
    assert sample.value == 1
    assert sample.labels == {
        "model": "a/model",
        "model_type": "gemma4",
        "quantization": "",
        "method": "draft_model",
        "k": "4",
        "drafter": "a/drafter",
        "runner": "V1",
        "reasoning_parser": "",
        "tool_call_parser": "gemma4",
    }


@pytest.mark.slow
def test_either_of_two_api_servers_shows_every_process(
    tiny: dict[str, Path], served_model: Path, tmp_path: Path
) -> None:
    speculative = json.dumps({"method": "draft_model", "model": str(tiny["close"]), "num_speculative_tokens": 3})
    arguments = ("--api-server-count", "2", "--speculative-config", speculative)
    everyone = ["ApiServer_0", "ApiServer_1", "EngineCore", "main"]
    with vllm_server(served_model, tmp_path / "log", *arguments) as url:
        end = time.monotonic() + 120
        while processes(server.samples(url)) != everyone:  # /health answers when one of the two is up
            assert time.monotonic() < end
            time.sleep(1)
        while not {"ApiServer_0", "ApiServer_1"} <= answered(tmp_path / "log"):  # either may take a new connection
            assert time.monotonic() < end
            metrics = server.samples(url)
            assert processes(metrics) == everyone
            assert "vllm:generation_tokens_total" in {s.name for s in metrics}
        done = gemma4_spec("doctor", "--url", url, "--workers", "1", "--json")
        found = [f for f in printed("doctor", done)["findings"] if f["section"] == "server"]
        problems = {f["name"] for f in found if f["state"] == "problem"}
        assert problems == {"reasoning parser", "tool call parser"}  # it was started without either
        assert printed("top", gemma4_spec("top", "--url", url, "--interval", "0.2", "--json"))["processes"] == 4


def processes(metrics: list[Sample]) -> list[str]:
    return sorted(s.labels["process"] for s in metrics if s.name == "gemma4_spec_process")


def answered(log: Path) -> set[str]:
    """The processes that answered a request for ``/metrics``."""
    return {line.split()[0].strip("(") for line in log.read_text().splitlines() if "GET /metrics" in line}
