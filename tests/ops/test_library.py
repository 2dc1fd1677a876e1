"""The Python API as docs/reference/api.md has it: its example serves, status() can be read, apply() warns."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

import vllm_gemma4_spec
from tests.support.commands import environment, free_port, post
from tests.support.fresh import run_from_nothing
from vllm_gemma4_spec import library
from vllm_gemma4_spec.registry import PATCHES
from vllm_gemma4_spec.settings import patch_switch

PAGE = (Path(__file__).parents[2] / "docs/reference/api.md").read_text()
(EXAMPLE,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)


def test_status_says_which_process_it_speaks_of_and_what_is_off() -> None:
    patch = PATCHES[-1].name
    switch = patch_switch(patch).name
    done = run_from_nothing(
        "import os, vllm_gemma4_spec as p; s = p.status(); assert s.pid == os.getpid(); print(s)",
        **{switch: "0"},
    )
    head, *lines = done.stdout.splitlines()
    pid = r"vllm-gemma4-spec \S+ in process \d+ \(MainProcess\): "
    assert re.fullmatch(pid + rf"{len(PATCHES) - 1} not applied, 1 off", head), done.stderr
    assert [line.split()[0] for line in lines] == [p.name for p in PATCHES]
    (off,) = (line for line in lines if "off" in line.split())
    assert re.fullmatch(rf"  {patch} +off  \({switch}=0\)", off)


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    caplog.clear()
    library.warn_of_unpatched_processes()
    return caplog.messages


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """An engine process of its own, in a program like any other; vLLM's logger reaches pytest's."""
    for name in ("VLLM_PLUGINS", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_GEMMA4_SPEC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(library.logger, "handlers", [caplog.handler])
    monkeypatch.setattr(library.logger, "propagate", False)
    # Whatever tests before left: a logging configuration may disable the loggers that it does not name.
    monkeypatch.setattr(library.logger, "disabled", False)
    caplog.set_level(logging.WARNING, logger=library.logger.name)
    monkeypatch.setattr(library.multiprocessing, "parent_process", lambda: None)
    monkeypatch.setattr(library, "_script_without_guard", lambda: None)


@pytest.mark.usefixtures("several")
def test_apply_warns_of_a_list_of_plugins_without_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert warned(caplog) == []
    for allowed in ("", "lora_filesystem_resolver"):
        monkeypatch.setenv("VLLM_PLUGINS", allowed)
        (text,) = warned(caplog)
        assert "leaves gemma4_spec out" in text
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    assert warned(caplog) == []
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING")
    monkeypatch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver, gemma4_spec")
    assert warned(caplog) == []


@pytest.mark.usefixtures("several")
def test_apply_warns_where_no_entry_point_is_installed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library.importlib.metadata, "entry_points", lambda group: [])
    (text,) = warned(caplog)
    assert "not installed, only importable" in text


@pytest.mark.parametrize("guard", [False, True])
def test_apply_warns_of_a_program_without_a_guard(tmp_path: Path, guard: bool) -> None:
    script = tmp_path / "server.py"
    lines = ["from vllm_gemma4_spec import library", "library.warn_of_unpatched_processes()"]
    script.write_text("\n".join([*lines, 'if __name__ == "__main__":', "    print()"] if guard else lines))
    env = {k: v for k, v in environment().items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, check=True)
    assert ("has no `if __name__" in done.stderr) is not guard


def test_the_page_names_what_the_package_exports_and_every_state() -> None:
    exported = re.findall(r"^\| `(\w+)(?:\(\))?` \|", PAGE, re.M)
    assert set(vllm_gemma4_spec.__all__) <= set(exported)
    states = re.search(r"state: (.*?)\n\s+replaced", library.PatchStatus.__doc__ or "", re.S)
    assert states is not None
    assert all(f"| `{state}` |" in PAGE for state in re.findall(r"``([a-z ]+)``", states[1]))


@pytest.mark.slow
def test_the_example_serves(tiny: dict[str, Path], served_model: Path, tmp_path: Path) -> None:
    script, port, log = tmp_path / "server.py", free_port(), tmp_path / "log"
    script.write_text(EXAMPLE)
    env = environment(VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind", OMP_NUM_THREADS="1")
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as out:
        command = [sys.executable, str(script), str(served_model), str(tiny["close"]), str(port)]
        process = subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True)
    try:
        end = time.monotonic() + 400
        while True:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < end, log.read_text()[-3000:]
            with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=30) as response:
                text = json.load(response)["text"]
                break
            time.sleep(2)
        assert f"in process {process.pid} (MainProcess): " in text
        assert re.search(r"^  draft-groups +(on|waiting)$", text, re.M)
        assert isinstance(post(url, {"prompt": "hello", "max_tokens": 5})["text"], str)
        assert "leaves gemma4_spec out" not in log.read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
