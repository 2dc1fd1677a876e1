"""Code in a process of its own, forked from one in which its imports have been made.

``run``: nothing of vLLM or of this package was imported before, only what vLLM builds on. ``run_after_vllm``: vLLM was,
unpatched. ``interpreted``: a module in a process where Triton interprets kernels on the CPU, after vLLM was imported.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

_LIBRARIES = """
import aiohttp, fastapi, gguf, openai.types.responses, torch, transformers, uvicorn
import torch._dynamo.repro.after_dynamo, torch._inductor.compile_fx, torch._inductor.standalone_compile
import torch.utils.cpp_extension, transformers.modeling_gguf_pytorch_utils
import transformers.models.auto.image_processing_auto, transformers.models.auto.modeling_auto
from transformers import PreTrainedModel, PretrainedConfig
assert not [m for m in sys.modules if m.split(".")[0] in ("vllm", "vllm_gemma4_spec")]
"""
_VLLM = """
import importlib
for module in {modules}: importlib.import_module(module)
assert not [m for m in sys.modules if m.split(".")[0] == "vllm_gemma4_spec"]
"""
# Read when triton is imported. With no visible device vLLM keeps triton without a driver for it. It loads no plugin
# there: a script applies the patches that it wants.
_INTERPRETER = {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "TRITON_INTERPRET": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_PLUGINS": "",
}


def _vllm() -> str:
    from vllm_gemma4_spec.registry import PATCHES

    # vLLM's own order for convertors
    modules = ["vllm.config", "vllm", *(edit.module for patch in PATCHES for edit in patch.edits)]
    return _VLLM.format(modules=list(dict.fromkeys(modules)))


# For `run` to begin with: what multiprocessing spawns is forked from a process that is as this one is now, so that it
# need not import the libraries again.
FORKED_CHILDREN = """
import multiprocessing, os, socket
from multiprocessing import connection, forkserver
def forked_children():
    address, (alive, ours) = connection.arbitrary_address("AF_UNIX"), os.pipe()
    context = multiprocessing.get_context("forkserver")
    multiprocessing.get_context = lambda method=None: context
    server = forkserver._forkserver
    server._forkserver_address, server._forkserver_alive_fd = address, ours
    server.ensure_running = lambda: None
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        if os.fork() == 0:
            os.close(ours)
            forkserver.main(listener.fileno(), alive, [])
    os.close(alive)
forked_children()
"""

_IMPORTS = {
    "libraries": lambda: _LIBRARIES,
    "vllm": lambda: _LIBRARIES + _vllm(),
    "interpreter": lambda: "import sys, triton\n" + _vllm() + "from vllm import LLM\n",
}


@functools.cache
def _server(kind: str) -> socket.socket:
    """A connection to the process of ``kind``, which all processes of one run of the tests share.

    Its session is its own: whoever ends the process that happened to start it ends no other's.
    """
    run_id = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    path = Path(tempfile.gettempdir()) / f"fork-{run_id[-12:]}-{kind}"
    client = socket.socket(socket.AF_UNIX)
    with Path(__file__).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            client.connect(str(path))
        except OSError:  # nobody has started it, or it has ended
            path.unlink(missing_ok=True)
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(path))
                listener.listen()
                subprocess.Popen(
                    [sys.executable, "-m", "tests.support.fork_server", str(listener.fileno()), _IMPORTS[kind]()],
                    cwd=ROOT,
                    env=_clean() | (_INTERPRETER if kind == "interpreter" else {}),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    start_new_session=True,
                    pass_fds=[listener.fileno()],
                )
            client.connect(str(path))
    return client


def _clean() -> dict[str, str]:
    """Not VLLM_DIST_IDENT and the like, which an engine in this process leaves behind."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    return kept | {"PYTHONPATH": str(ROOT), "VLLM_LOGGING_LEVEL": "INFO"}


def _fork(kind: str, code: str, env: dict[str, str], arguments: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    client = _server(kind)
    with tempfile.TemporaryDirectory() as folder:
        files = {name: str(Path(folder) / name) for name in ("stdout", "stderr")}
        order = {"code": code, "env": env, "arguments": list(arguments), "root": str(ROOT)} | files
        client.sendall(json.dumps(order).encode() + b"\n")
        status = client.recv(64)
        assert status, f"the process that others are forked from ({kind}) has ended"
        stdout, stderr = (Path(files[name]).read_text() for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess([code, *arguments], int(status), stdout, stderr)


def run(code: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run ``code``, with ``env`` beside the environment: what is patched where is a matter of whole processes."""
    return _fork("libraries", textwrap.dedent(code), _clean() | env, arguments)


def run_after_vllm(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """As ``run``, where every module of vLLM that a patch touches was imported before."""
    return _fork("vllm", textwrap.dedent(code), _clean() | env)


def interpreted(module: str, *arguments: str | Path) -> None:
    """``python -m MODULE ARGUMENTS``, with Triton's kernels interpreted on the CPU.

    Triton 3.6's interpreter takes ``int`` of arrays of one dimension, which NumPy refuses from 2.4 on (vLLM 0.19.1
    installs 2.2): the test is skipped there.
    """
    code = f"import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    done = _fork("interpreter", code, dict(os.environ) | _INTERPRETER, [str(a) for a in arguments])
    if "triton/runtime/interpreter.py" in done.stderr and "only 0-dimensional arrays can be" in done.stderr:
        pytest.skip("Triton's interpreter does not work with this NumPy")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def run_from_nothing(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """As ``run``, where also torch, transformers and the rest must not have been imported before."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=_clean() | env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
