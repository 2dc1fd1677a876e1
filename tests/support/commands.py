"""Runs this package's commands and vLLM's server as a user does: in processes of their own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm_gemma4_spec.demo.build import Pair
from vllm_gemma4_spec.demo.server import VLLM_SERVE, reserved_port
from vllm_gemma4_spec.ops import output

ROOT = Path(__file__).parents[2]
_MAIN = "from vllm_gemma4_spec.cli import main; main()"
MAIN = [sys.executable, "-c", _MAIN]


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without the reports folder of engines that it runs itself."""
    env = {k: v for k, v in os.environ.items() if k != "GEMMA4_SPEC_REPORTS"}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return env | {"PYTHONPATH": path, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "NO_COLOR": "1"} | changes


def interrupted_start(monkeypatch: pytest.MonkeyPatch, code: str) -> list[subprocess.Popen[Any]]:
    """``subprocess.Popen`` starts this Python code from now on, and meets Ctrl-C before it is done. What it started."""
    started: list[subprocess.Popen[Any]] = []
    popen = subprocess.Popen

    def interrupted(_: Any, **options: Any) -> subprocess.Popen[Any]:
        started.append(popen([sys.executable, "-c", code], **options))
        signal.raise_signal(signal.SIGINT)
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    return started


def gemma4_spec(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """``vllm-gemma4-spec ARGS``."""
    return subprocess.run(
        [*MAIN, *args], env=environment(**env), capture_output=True, text=True, timeout=600, check=False
    )


def in_process(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """As :func:`gemma4_spec`, through the same entry point, without paying for the imports again."""
    from vllm_gemma4_spec import cli

    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr("sys.argv", ["vllm-gemma4-spec", *args])
        patch.setenv("NO_COLOR", "1")
        for name, value in env.items():
            patch.setenv(name, value)
        with pytest.raises(SystemExit) as end:
            cli.main()
    return subprocess.CompletedProcess(args, int(end.value.code or 0), out.getvalue(), err.getvalue())


def printed(command: str, done: subprocess.CompletedProcess[str]) -> Any:
    """What ``command --json`` printed, after it was held against the documented schema."""
    output.adapter(command).validate_json(done.stdout, strict=True)
    return json.loads(done.stdout)


_reserved: list[socket.socket] = []


def free_port() -> int:
    """A port that nobody else is given while this process runs: it stays bound, and nothing listens at it."""
    _reserved.append(reserved_port())
    return int(_reserved[-1].getsockname()[1])


# vLLM gives this process of data-parallel engines 30 seconds to import vLLM, which is less than a busy machine takes.
LATE = "DP Coordinator process failed to report ZMQ addresses"


@contextlib.contextmanager
def vllm_server(model: Path, log: Path, *args: str, port: int = 0, **env: str) -> Iterator[str]:
    """A real ``vllm serve``, small and in float32; yields its address and ends it, children included."""
    port = port or free_port()
    command = [*VLLM_SERVE, str(model), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
    command += ["--max-num-seqs", "4", "--block-size", "16", "--num-gpu-blocks-override", "1024", *args]
    url = f"http://127.0.0.1:{port}"
    for last in (False, False, True):
        with log.open("w") as out:
            process = subprocess.Popen(
                command,
                env=environment(VLLM_LOGGING_LEVEL="INFO", **env),
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            try:
                _wait(process, url, log)
            except AssertionError:
                if last or LATE not in log.read_text():
                    raise
                continue
            yield url
            return
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the engine core, too, where its parent was killed at start
            process.wait(10)


PARSERS = ("--reasoning-parser", "gemma4", "--tool-call-parser", "gemma4", "--enable-auto-tool-choice")


def demo_server(
    pair: Pair, log: Path, speculates: bool = True, parsers: bool = True, port: int = 0, **env: str
) -> contextlib.AbstractContextManager[str]:
    """:func:`vllm_server` of the demo's pair, as ``gemma4-demo``, with k = 3."""
    arguments = ["--served-model-name", "gemma4-demo", *(PARSERS if parsers else ())]
    if speculates:
        config = {"method": "draft_model", "model": str(pair.drafter), "num_speculative_tokens": 3}
        arguments += ["--speculative-config", json.dumps(config)]
    return vllm_server(pair.target, log, *arguments, port=port, **env)


def post(url: str, body: dict[str, Any]) -> Any:
    """What a server answers to ``body`` as JSON."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.load(response)


def counted(url: str, name: str) -> dict[str, float]:
    """vLLM's counter ``name`` at ``/metrics`` -> by engine."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as response:
        metrics = response.read().decode()
    found = re.findall(rf'^vllm:{name}_total\{{engine="(\d+)".*\}} (\S+)$', metrics, re.MULTILINE)
    return {engine: float(value) for engine, value in found}


def _wait(process: subprocess.Popen[bytes], url: str, log: Path, seconds: float = 420) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-3000:]
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
            return
        time.sleep(1)
    raise AssertionError(f"no server after {seconds} s: {log.read_text()[-3000:]}")
