"""Many runs of tests, each in a fork of one process that has imported vLLM and nothing of this package."""

from __future__ import annotations

import contextlib
import gc
import glob
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

PACKAGE = "vllm_gemma4_spec"
# Tests fork processes from some that those with one of these share (``tests/support/fresh.py``).
_RUN_ID = "PYTEST_XDIST_TESTRUNUID"
_held: dict[str, socket.socket] = {}


def preload() -> None:
    """To be called once, before the first fork."""
    os.environ[_RUN_ID] = f"forks{os.getpid()}"
    import tests.support.engine  # noqa: F401, I001 - sets the environment, which OpenMP reads when torch is imported
    import torch
    import vllm.entrypoints.openai.api_server
    import vllm.v1.engine.llm_engine
    import vllm.v1.worker.gpu_model_runner  # noqa: F401

    # Two processes of two threads each wait for each other's cores, spinning: a step took twenty times as long.
    assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"])
    assert not any(name.partition(".")[0] == PACKAGE for name in sys.modules)
    gc.collect()
    gc.freeze()  # pages of what was imported stay shared


def fork(work: Callable[[], int], output: Path | str = os.devnull) -> int:
    """The id of a process, and session, of its own that ends with what ``work`` returns."""
    child = os.fork()
    if child == 0:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        code = 3
        with contextlib.suppress(BaseException):
            code = work()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return child


def end(child: int) -> None:
    """Its children, too, but for those in sessions of their own."""
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)


def hold_servers() -> None:
    """What tests fork processes from is slow to start and ends when nobody is connected: call this now and then."""
    for path in glob.glob(f"{tempfile.gettempdir()}/fork-{os.environ[_RUN_ID][-12:]}-*"):
        if path not in _held:
            client = socket.socket(socket.AF_UNIX)
            with contextlib.suppress(OSError):
                client.connect(path)
                _held[path] = client
