"""A user's mistakes: each ends with one line that names the thing, and with exit code 2."""

from __future__ import annotations

import ctypes
import http.server
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import tiny_models
from tests.support.commands import environment, free_port, in_process
from vllm_gemma4_spec import errors

MAIN = [sys.executable, "-c", "from vllm_gemma4_spec.cli import main; main()"]


def one_line(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


class _Anything(http.server.BaseHTTPRequestHandler):
    """A web server that is no vLLM; below /locked it wants a key, below /json it answers JSON of another kind."""

    def do_GET(self) -> None:
        self.send_response(401 if self.path.startswith("/locked") else 200)
        self.end_headers()
        self.wfile.write(b"{}" if self.path.startswith("/json") else b"<html>hello</html>")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[str]:
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Anything)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture
def asking(tmp_path: Path) -> list[list[str]]:
    """The commands that ask a server, without its address."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "hello"}\n')
    return [["doctor"], ["top", "--interval", "0.1"], ["bench", "--prompts", str(prompts)]]


def test_no_server(asking: list[list[str]]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    for command in asking:
        one_line(in_process(*command, "--url", url), url, "no answer")


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://127.0.0.1", "http://", "http://host:port", "nonsense"])
def test_no_address(asking: list[list[str]], url: str) -> None:
    for command in asking:
        one_line(in_process(*command, "--url", url), url, "http://127.0.0.1:8000")


@pytest.mark.parametrize("path", ["", "/json"])
def test_a_server_of_another_kind(asking: list[list[str]], elsewhere: str, path: str) -> None:
    for command in asking:
        done = in_process(*command, "--url", elsewhere + path)
        one_line(done, elsewhere, "server?")


def test_a_missing_key(asking: list[list[str]], elsewhere: str) -> None:
    for command in asking:
        one_line(in_process(*command, "--url", f"{elsewhere}/locked"), "401", "--api-key")


@pytest.mark.parametrize("command", [["plan", "--target"], ["inspect"], ["repair", "--out", "out"]])
def test_no_such_folder(command: list[str], tmp_path: Path) -> None:
    one_line(in_process(*command, str(tmp_path / "missing")), str(tmp_path / "missing"))


def test_a_folder_of_another_kind(tmp_path: Path) -> None:
    for command in (["plan", "--target"], ["inspect"]):
        one_line(in_process(*command, str(tmp_path)), str(tmp_path))


def test_a_file_in_place_of_a_folder_and_a_place_where_none_can_be_made(tmp_path: Path) -> None:
    model = tiny_models.save(tiny_models.target_config(), tmp_path / "model")
    file = model / "model.safetensors"
    one_line(in_process("inspect", str(file)), str(file), "a file; name the folder that holds the checkpoint")
    one_line(in_process("repair", str(model), "--out", "/proc/x"), "--out /proc/x: no folder can be made in /proc")


@pytest.mark.parametrize("program", ["/usr/bin/vllm", "/x/api_server.py", "/x/vllm_command.py"])
def test_a_program_of_vllms_ends_with_one_line_whatever_its_name(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error = errors.VersionError("another vLLM")
    monkeypatch.setattr("sys.argv", [program])
    with pytest.raises(SystemExit, match=r"^vllm-gemma4-spec: another vLLM$"):
        errors.stop(error)
    monkeypatch.setattr("sys.argv", ["/home/me/server.py"])
    with pytest.raises(errors.VersionError):  # somebody else's program can catch it
        errors.stop(error)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], ["No such command", "nonsense", "vllm-gemma4-spec --help"]),
        (["plan"], ["vllm-gemma4-spec plan: Missing option", "--target"]),
        (["plan", "--tarrget", "x"], ["No such option", "--tarrget"]),
        (["plan", "--target", "x", "--context", "many"], ["vllm-gemma4-spec plan: Invalid value", "--context"]),
        (["top", "--url", "http://127.0.0.1:1", "--interval", "0"], ["--interval"]),
    ],
)
def test_options_that_cannot_be(arguments: list[str], words: list[str]) -> None:
    one_line(in_process(*arguments), *words)


def without_privilege(*command: str) -> subprocess.CompletedProcess[str]:
    """In a process that the permissions of files bind, also where the tests run as root."""

    def drop() -> None:
        for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, out of the bounding set
            ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)

    before = drop if os.geteuid() == 0 else None
    return subprocess.run(
        [*MAIN, *command], env=environment(), preexec_fn=before, capture_output=True, text=True, check=False
    )


def test_no_permission(tmp_path: Path) -> None:
    folder, closed, prompts = tmp_path / "closed", tmp_path / "config.json", tmp_path / "prompts.jsonl"
    folder.mkdir(mode=0o555)
    config = tiny_models.target_config().to_json_string()
    closed.write_text(config)
    closed.chmod(0)
    prompts.write_text('{"prompt": "hello"}\n')
    prompts.chmod(0)
    one_line(without_privilege("plan", "--target", str(closed)), str(closed), "Permission denied")
    one_line(without_privilege("demo-models", "--out", str(folder / "pair")), str(folder), "Permission denied")
    bench = ["bench", "--url", "http://127.0.0.1:1"]
    one_line(without_privilege(*bench, "--prompts", str(prompts)), str(prompts), "not readable")
    prompts.chmod(0o644)
    plot = ["--prompts", str(prompts), "--plot", str(folder / "bench.png")]
    one_line(without_privilege(*bench, *plot), str(folder), "Permission denied")  # before the first request


class _Metrics(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"vllm:num_requests_running 1\n")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def metrics() -> Iterator[str]:
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Metrics)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


def test_top_in_a_pipe_prints_one_look_in_whole_lines(metrics: str) -> None:
    done = in_process("top", "--url", metrics, "--interval", "0.1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(metrics)
    assert done.stdout.count("1 running") == 1
    assert done.stdout.endswith("\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_top_ends_quietly(metrics: str, number: signal.Signals, code: int) -> None:
    command = [*MAIN, "top", "--url", metrics, "--interval", "0.1", "--count", "1000"]
    process = subprocess.Popen(
        [*command, "--json"], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline()
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in error


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    process = subprocess.Popen(
        [*MAIN, "schema", "plan"], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    error = process.stderr.read()
    process.wait(60)
    assert b"Traceback" not in error, error


def test_a_terminal_gets_colours_and_a_pipe_none() -> None:
    """``script`` gives the command a terminal of its own."""
    command = f'{sys.executable} -c "from vllm_gemma4_spec.cli import main; main()" patches'
    env = {k: v for k, v in environment().items() if k != "NO_COLOR"} | {"TERM": "xterm-256color"}
    shown = subprocess.run(
        ["script", "-qec", command, "/dev/null"], env=env, capture_output=True, text=True, check=False
    )
    assert "\x1b[" in shown.stdout
    piped = subprocess.run([*MAIN, "patches"], env=env, capture_output=True, text=True, check=False)
    assert "\x1b[" not in piped.stdout
