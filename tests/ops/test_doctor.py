"""The doctor finds what is wrong and exits with 0 only when nothing is."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from tests.support.commands import free_port, gemma4_spec, in_process, printed
from tests.support.fake_server import ALL_ON, INFO, State, fake_server


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


def off(*names: str) -> dict[str, int]:
    return ALL_ON | dict.fromkeys(names, 0)


def test_a_server_as_it_must_be() -> None:
    with fake_server(State()) as url:
        done = in_process("doctor", "--url", url, "--json")
        shown = in_process("doctor", "--url", url).stdout
    assert done.returncode == 0, done.stdout
    found = findings(done)["server", "speculation"]["found"]
    assert found == (
        "draft_model with /models/gemma-4-E4B-it, k = 3, 1000 drafts verified, acceptance length 2.80, "
        "acceptance by position from 0: 80% 60% 40%"
    )
    assert shown.rstrip().endswith("0 problems")


_BOTH_OFF = {"APIServer": off("draft-groups"), "EngineCore": off("draft-groups")}
_ALL_OFF = {name: dict.fromkeys(ALL_ON, 0) for name in ("APIServer", "EngineCore")}


@pytest.mark.parametrize(
    ("state", "name", "words"),
    [
        (State(processes=_ALL_OFF), "APIServer (100)", ["answers may be wrong", "VLLM_GEMMA4_SPEC"]),
        (State(processes=_BOTH_OFF), "EngineCore (101)", ["draft-groups", "VLLM_GEMMA4_SPEC_PATCH_DRAFT_GROUPS"]),
        (State(processes={"APIServer": ALL_ON, "EngineCore": off("adaptive-k")}), "EngineCore (101)", ["environment"]),
        (State(processes={"APIServer": ALL_ON}), "EngineCore", ["unpatched"]),
        (State(processes={}), "plugin", ["patches on"]),
        (State(accepted=(), info=INFO | {"method": "", "k": "", "drafter": ""}), "speculation", ["--no-speculation"]),
        (State(accepted=(10, 1, 0)), "speculation", ["does not fit"]),
        (State(info=INFO | {"runner": "V2"}), "model runner", ["VLLM_USE_V2_MODEL_RUNNER"]),
        (State(info=INFO | {"reasoning_parser": ""}), "reasoning parser", ["--reasoning-parser gemma4"]),
        (State(info=INFO | {"tool_call_parser": "hermes"}), "tool call parser", ["--enable-auto-tool-choice"]),
    ],
)
def test_what_is_wrong_with_a_server_is_said(state: State, name: str, words: list[str]) -> None:
    with fake_server(state) as url:
        done = in_process("doctor", "--url", url, "--json")
    assert done.returncode == 1, done.stdout
    problems = {k[1]: f for k, f in findings(done).items() if f["state"] == "problem"}
    assert name in problems, problems
    assert all(word in problems[name]["advice"] for word in words), problems[name]


def test_a_silent_engine_is_told_from_a_busy_one_and_from_a_refusal() -> None:
    """The API server answers all the same; only a token says that the engine does."""
    with fake_server(State()) as url:
        assert findings(in_process("doctor", "--url", url, "--json"))["server", "engine"]["state"] == "ok"
    seen = {}
    for engine in ("silent", "busy", "no completions here"):
        with fake_server(State(engine=engine)) as url:
            done = in_process("doctor", "--url", url, "--patience", "0.2", "--json")
        found = findings(done)["server", "engine"]
        seen[engine] = (done.returncode, found["state"])
        said = "no completions here" if " " in engine else "no token within 0.2 s; 1 running, 0 waiting"
        assert said in found["found"]
    assert seen == {"silent": (1, "problem"), "busy": (0, "note"), "no completions here": (0, "note")}


def test_a_model_that_is_no_gemma_4_is_said() -> None:
    info = INFO | {"model": "/models/opt", "model_type": "opt", "quantization": "", "method": ""}
    with fake_server(State(info=info, accepted=())) as url:
        done = in_process("doctor", "--url", url, "--no-speculation", "--json")
    found = findings(done)["server", "model"]
    assert (done.returncode, found["state"], found["found"]) == (0, "note", "gemma-4, /models/opt, opt")
    assert "no Gemma 4" in found["advice"]


def test_patches_that_a_server_does_not_need_may_be_off() -> None:
    """A plain bf16 server: neither drafting nor ModelOpt; the same patches off beside a drafter are a problem."""
    names = off("draft-groups", "own-blocks", "modelopt-nvfp4")
    plain = INFO | {"method": "", "k": "", "drafter": "", "quantization": ""}
    processes = {"APIServer": names, "EngineCore": names}
    with fake_server(State(processes=processes, accepted=(), info=plain)) as url:
        done = in_process("doctor", "--url", url, "--no-speculation", "--json")
    assert done.returncode == 0, done.stdout
    with fake_server(State(processes=processes)) as url:
        assert in_process("doctor", "--url", url).returncode == 1


def test_problems_come_last_and_patches_take_one_line() -> None:
    with fake_server(State(accepted=())) as url:
        lines = in_process("doctor", "--url", url).stdout.splitlines()
    place = lines.index("1 problem")
    assert lines[place + 1].split() == ["problem", "server,", "speculation:", "off", "(wanted", "on)"]
    assert not any("problem" in line for line in lines[:place])
    assert len([line for line in lines if "draft-groups" in line]) == 0
    assert len([line for line in in_process("doctor", "-v").stdout.splitlines() if "fingerprints match" in line]) > 20


@pytest.fixture
def no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where only this package and what it depends on are installed."""
    from vllm_gemma4_spec.ops import doctor
    from vllm_gemma4_spec.patching import version

    for module in (version, doctor, doctor.here):
        monkeypatch.setattr(module, "vllm_version", lambda: None)


@pytest.mark.usefixtures("no_vllm")
def test_without_vllm_there_is_one_problem() -> None:
    done = in_process("doctor", "--json")
    assert [f["name"] for f in json.loads(done.stdout)["findings"] if f["state"] == "problem"] == ["vllm"]
    done = in_process("patches")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "vLLM is not installed here" in done.stderr


@pytest.mark.usefixtures("no_vllm")
def test_a_laptop_without_vllm_examines_a_server() -> None:
    with fake_server(State()) as url:
        assert in_process("doctor", "--url", url).returncode == 0
        assert in_process("top", "--url", url, "--interval", "0.1").returncode == 0
        done = in_process("bench", "--url", url)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "vLLM is not installed here" in done.stderr


def test_no_server_is_one_line() -> None:
    done = gemma4_spec("doctor", "--url", f"http://127.0.0.1:{free_port()}")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "no answer" in done.stderr
