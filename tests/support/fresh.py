"""Code in a Python process in which nothing of vLLM or of this package was imported before."""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Forks a process per piece of code from one that has what vLLM builds on: importing that takes most of a start.
_PARENT = """
import json, os, sys
import aiohttp, fastapi, gguf, openai.types.responses, torch, transformers, uvicorn
import torch._dynamo.repro.after_dynamo, torch._inductor.compile_fx, torch._inductor.standalone_compile
import torch.utils.cpp_extension, transformers.modeling_gguf_pytorch_utils
import transformers.models.auto.image_processing_auto, transformers.models.auto.modeling_auto
from transformers import PreTrainedModel, PretrainedConfig
assert not [m for m in sys.modules if m.split(".")[0] in ("vllm", "vllm_gemma4_spec")]
for line in iter(sys.stdin.readline, ""):
    order = json.loads(line)
    pid = os.fork()
    if pid == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
else:
    sys.exit()
for number, name in ((0, os.devnull), (1, order["stdout"]), (2, order["stderr"])):
    os.dup2(os.open(name, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT), number)
os.environ.clear()
os.environ.update(order["env"])
exec(compile(order["code"], "<string>", "exec"), {"__name__": "__main__"})
"""


@functools.cache
def _parent() -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", _PARENT],
        cwd=ROOT,
        env=_clean(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(process.kill)
    return process


def _clean() -> dict[str, str]:
    """Not VLLM_DIST_IDENT and the like, which an engine in this process leaves behind."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    return kept | {"PYTHONPATH": str(ROOT), "VLLM_LOGGING_LEVEL": "INFO"}


def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run ``code``, with ``env`` beside the environment: what is patched where is a matter of whole processes."""
    code = textwrap.dedent(code)
    parent = _parent()
    assert parent.stdin is not None
    assert parent.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        files = {name: str(Path(folder) / name) for name in ("stdout", "stderr")}
        parent.stdin.write(json.dumps({"code": code, "env": _clean() | env} | files) + "\n")
        parent.stdin.flush()
        status = int(parent.stdout.readline())
        stdout, stderr = (Path(files[name]).read_text() for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess([code], status, stdout, stderr)


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
