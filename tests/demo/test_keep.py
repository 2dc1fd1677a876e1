"""``demo --keep``: the server stays up, the commands to try are printed, Ctrl-C ends it in order."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.commands import in_process
from vllm_gemma4_spec.cli import demo as command
from vllm_gemma4_spec.demo import build, run, server

URL = "http://127.0.0.1:8123"


class Fake:
    """A server that says when it is stopped."""

    url = URL
    events: list[str]

    def __init__(self, *_: Any) -> None:
        pass

    def __enter__(self) -> Fake:
        Fake.events = ["up"]
        return self

    def __exit__(self, *_: Any) -> None:
        Fake.events.append("down")

    def get(self, path: str) -> str:
        return ""


@pytest.mark.parametrize("keep", [False, True])
def test_the_server_stays_up_until_ctrl_c(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, keep: bool) -> None:
    def ctrl_c(seconds: float) -> None:
        Fake.events.append("waiting")
        raise KeyboardInterrupt

    monkeypatch.setattr(server, "Server", Fake)
    monkeypatch.setattr(run, "require_vllm", lambda: None)
    monkeypatch.setattr(run, "questions", list)
    monkeypatch.setattr(run, "connect", lambda server: None)
    monkeypatch.setattr(run, "serve_arguments", lambda *arguments: [])
    drafting = SimpleNamespace(drafts=2, proposed=6, accepted=5, accepted_at=[2, 2, 1], acceptance_length=3.5)
    monkeypatch.setattr(run, "drafting", lambda text: drafting)
    monkeypatch.setattr("vllm_gemma4_spec.cli.demo_models.ensure_with_bar", lambda folder: (None, False))
    monkeypatch.setattr(build, "default_folder", lambda: tmp_path)
    monkeypatch.setattr(command.time, "sleep", ctrl_c)
    done = in_process("demo", *["--keep"] * keep)
    assert done.returncode == 0, done.stderr
    assert Fake.events == ["up", *["waiting"] * keep, "down"]
    # Without --keep a second server drafts with the assistant.
    assert done.stdout.count("acceptance length 3.50") == (1 if keep else 2)
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert (f"vllm-gemma4-spec doctor --url {URL}" in lines) is keep
    assert (f"vllm-gemma4-spec top --url {URL}" in lines) is keep
    if keep:
        (curl,) = (shlex.split(line) for line in lines if line.startswith("curl"))
        assert json.loads(curl[-1])["stream"] is True
        assert json.loads(curl[-1])["temperature"] == 0  # else the first answer waits for vLLM's compiler
        assert curl[2].startswith(URL)
