"""The demo's server: waited for, reported when it fails, and gone with all its processes in every case."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from tests.support.commands import interrupted_start
from vllm_gemma4_spec.demo import build
from vllm_gemma4_spec.demo.server import Server, ServerError, environment, last_error

# Stands in for `vllm serve`: a child that ignores SIGTERM, /health and /metrics, and what the test asks for.
STAND_IN = """
import http.server, os, signal, subprocess, sys, time
mode, pids = sys.argv[1], sys.argv[2]
port = int(sys.argv[sys.argv.index("--port") + 1])
if mode == "fails":
    print("INFO loading")
    print("ValueError: no such model: nowhere")
    print("RuntimeError: Engine core initialization failed")
    sys.exit(1)
stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", stubborn])
open(pids, "w").write(f"{os.getpid()} {child.pid}")
if mode == "hangs":
    time.sleep(600)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(404 if self.path == "/nowhere" else 200)
        self.end_headers()
        self.wfile.write(b"fine")
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def server(mode: str, folder: Path, timeout: float = 60.0) -> Server:
    return Server([mode, str(folder / "pids")], folder / "log", timeout, program=(sys.executable, "-c", STAND_IN))


def running(folder: Path) -> list[int]:
    alive = []
    for pid in map(int, (folder / "pids").read_text().split()):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        alive += [pid] if state != "Z" else []
    return alive


@pytest.fixture(autouse=True)
def _short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_gemma4_spec.demo.server.STOP_SECONDS", 1.0)


def wait_for_pids(folder: Path) -> None:
    while not (folder / "pids").exists() or len((folder / "pids").read_text().split()) < 2:
        time.sleep(0.05)


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt, SystemExit])
def test_all_processes_are_gone_after_the_block(tmp_path: Path, error: type[BaseException] | None) -> None:
    try:
        with server("serves", tmp_path) as running_server:
            wait_for_pids(tmp_path)
            assert running_server.get("/metrics") == "fine"
            assert len(running(tmp_path)) == 2
            if error:
                raise error
    except BaseException as raised:
        assert type(raised) is error  # noqa: PT017
    assert running(tmp_path) == []


def test_ctrl_c_while_the_process_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between fork and the constructor's end nobody else knows it."""
    started = interrupted_start(monkeypatch, "import time; time.sleep(60)")
    with pytest.raises(KeyboardInterrupt), Server([], tmp_path / "log"):
        pytest.fail("the block was entered")
    assert started[0].returncode is not None


def test_proxies_of_the_environment_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with server("serves", tmp_path) as s:
        assert s.get("/health") == "fine"


def test_an_early_end_is_one_line_with_cause_and_log(tmp_path: Path) -> None:
    with pytest.raises(ServerError) as raised, server("fails", tmp_path):
        pass
    message = str(raised.value)
    assert "exit code 1" in message
    assert "no such model: nowhere" in message
    assert str(tmp_path / "log") in message
    assert "\n" not in message


def test_a_server_that_never_gets_ready_is_given_up_and_taken_down(tmp_path: Path) -> None:
    waited: list[float] = []
    hanging = server("hangs", tmp_path, timeout=3.0)
    hanging.waiting = waited.append
    with pytest.raises(ServerError, match=r"not ready after 3 s"), hanging:
        pass
    assert waited
    assert running(tmp_path) == []


def test_a_refused_path_names_status_and_log(tmp_path: Path) -> None:
    with server("serves", tmp_path) as s, pytest.raises(ServerError, match=r"GET /nowhere .*404"):
        s.get("/nowhere")


@pytest.mark.parametrize(
    ("log", "line"),
    [
        ("(APIServer pid=7) ValueError: first\nnoise\nRuntimeError: second\n", "first"),
        ("vllm-gemma4-spec: vLLM 0.18 found\n", "vLLM 0.18 found"),
        ("loading\nKilled\n", "Killed"),
        ("", "it wrote nothing"),
    ],
)
def test_last_error_finds_the_cause(tmp_path: Path, log: str, line: str) -> None:
    (tmp_path / "log").write_text(log)
    assert line in last_error(tmp_path / "log")


def test_one_folder_of_the_cache_holds_all_that_the_demo_leaves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("VLLM_CACHE_ROOT", "VLLM_GEMMA4_SPEC_DEMO_DIR"):
        monkeypatch.delenv(name, raising=False)
    ours = tmp_path / "vllm-gemma4-spec"
    assert Path(environment()["VLLM_CACHE_ROOT"]).is_relative_to(ours)
    assert build.default_folder().is_relative_to(ours)
    monkeypatch.setenv("VLLM_CACHE_ROOT", "/mine")
    assert environment()["VLLM_CACHE_ROOT"] == "/mine"
