"""The doctor finds what is wrong and exits with 0 only when nothing is."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from tests.support.commands import free_port, gemma4_spec, in_process, printed


def findings(done: subprocess.CompletedProcess[str]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(f["section"], f["name"]): f for f in printed("doctor", done)["findings"]}


def test_all_well() -> None:
    done = gemma4_spec("doctor", "--json")
    assert done.returncode == 0, done.stdout
    found = findings(done)
    assert found["versions", "vllm"]["found"] == "0.19.1"
    assert found["patches", "draft-groups"]["state"] == "ok"
    assert json.loads(done.stdout)["healthy"] is True


@pytest.mark.parametrize(
    ("env", "where", "word"),
    [
        ({"VLLM_GEMMA4_SPEC_PATCH_DRAFT_GROUPS": "0"}, ("patches", "draft-groups"), "off"),
        ({"VLLM_GEMMA4_SPEC_PATCH_DRAFT_GROPS": "1"}, ("environment", "VLLM_GEMMA4_SPEC"), "unknown"),
        ({"VLLM_NVFP4_GEMM_BACKEND": "emulation"}, ("environment", "VLLM_NVFP4_GEMM_BACKEND"), "emulation"),
        ({"VLLM_PLUGINS": "other"}, ("plugin", "VLLM_PLUGINS"), "other"),
    ],
    ids=["patch off", "unknown switch", "emulation", "plugin filtered"],
)
def test_each_fault_is_a_problem_with_advice(env: dict[str, str], where: tuple[str, str], word: str) -> None:
    import vllm_gemma4_spec

    vllm_gemma4_spec.undo()  # other tests of this process may have applied the patches
    done = in_process("doctor", "--json", **env)
    assert done.returncode == 1
    finding = findings(done)[where]
    assert finding["state"] == "problem"
    assert word in finding["found"]
    assert finding["advice"]


def test_no_server_is_one_line() -> None:
    done = gemma4_spec("doctor", "--url", f"http://127.0.0.1:{free_port()}")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "no answer" in done.stderr


@pytest.mark.slow
def test_processes_of_a_real_server(speculating_server: str) -> None:
    done = gemma4_spec("doctor", "--url", speculating_server, "--workers", "1", "--json")
    assert done.returncode == 0, done.stdout
    server = {name: f for (section, name), f in findings(done).items() if section == "server"}
    assert sorted(name.split(" ")[0] for name in server) == ["APIServer", "EngineCore", "vllm", "workers"]
    assert all("draft-groups" in f["found"] for name, f in server.items() if name.startswith(("API", "Engine")))


@pytest.mark.slow
def test_a_missing_worker_is_a_problem(speculating_server: str) -> None:
    done = gemma4_spec("doctor", "--url", speculating_server, "--workers", "2", "--json")
    assert done.returncode == 1
    assert findings(done)["server", "workers"]["state"] == "problem"
