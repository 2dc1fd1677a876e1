"""Client libraries in pinned releases, and scripted agents, against the demo pair on a real ``vllm serve``.

``GEMMA4_CLIENTS`` names the folder of the clients' environments (``make test-clients`` makes it). The table of
docs/reference/clients.md is written where ``GEMMA4_CLIENTS_PAGE`` names the page.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients import agent_loops as agents
from tests.clients import drive
from vllm_gemma4_spec.demo import build, run
from vllm_gemma4_spec.demo.server import Server

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("GEMMA4_CLIENTS") or ROOT / ".venv-clients")
# Clients that do not take the newest release of openai have environments of their own.
ENVIRONMENTS = {"instructor": "instructor", "llama_index": "llama-index"}
BEGIN, END = "<!-- clients: begin -->", "<!-- clients: end -->"
MARKS = ("<|", "|>", "call:", "thought\n")
_rows: dict[str, list[str]] = {}

pytestmark = pytest.mark.slow


def python_of(client: str) -> Path:
    return FOLDER / ENVIRONMENTS.get(client, "current") / "bin" / "python"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    pair, _ = build.ensure(build.default_folder())
    arguments = run.serve_arguments(pair, speculate=True)
    # The pair has seen no JSON: where a grammar lets it, it writes space without end.
    arguments += ["--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}']
    with Server(arguments, tmp_path_factory.mktemp("server") / "log") as server:
        yield server
    page = os.environ.get("GEMMA4_CLIENTS_PAGE")
    if page and set(_rows) == set(drive.CLIENTS):
        _write(Path(page))


def _write(page: Path) -> None:
    table = ["| client | API | reasoning | tool loop of two rounds | structured output |", "|---|---|---|---|---|"]
    table += [f"| {' | '.join(_rows[client])} |" for client in drive.CLIENTS]
    text = page.read_text()
    head, _, rest = text.partition(BEGIN)
    page.write_text("\n".join([head + BEGIN, "", *table, "", END]) + rest.partition(END)[2])


def seen_by(client: str, url: str) -> dict[str, Any]:
    python = python_of(client)
    if not python.is_file():
        pytest.skip(f"{python} is missing; `make test-clients` makes it")
    environment = {**os.environ, "NO_PROXY": "*", "no_proxy": "*", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    command = [str(python), str(ROOT / "tests/clients/drive.py"), client, url]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return seen


@pytest.mark.parametrize("client", drive.CLIENTS)
def test_what_a_client_shows(served: Server, client: str) -> None:
    seen = seen_by(client, served.url)
    shows = drive.SHOWS[client]
    for way in ("whole", "streamed"):
        found = seen[way]
        if shows["reasoning"]:
            assert found["reasoning"], found
            assert found["content"]
        if "called" in found:
            assert found["called"] == ["Oslo"]
            assert "21 degrees" in found["last"]
        assert found["structured"]["city"] in ("Oslo", "Rome")
        for text in (found.get("reasoning", ""), found.get("content", ""), found.get("last", "")):
            assert not any(mark in text for mark in MARKS), text
    if client != "instructor":  # it names the forced tool PartialCity where it streams: another prompt
        assert seen["whole"] == seen["streamed"]
    _rows[client] = row(client, seen)


def row(client: str, seen: dict[str, Any]) -> list[str]:
    """Of the table, for what has passed."""
    shows = drive.SHOWS[client]
    reasoning = "shown" if shows["reasoning"] else "-"
    loop = "right" if "called" in seen["whole"] else "-"
    return [f"{shows['name']} {seen['version']}", shows["api"], reasoning, loop, f"right ({shows['structured']})"]


@pytest.mark.parametrize("agent", [agents.on_responses, agents.on_messages], ids=lambda f: f.__name__)
def test_agents(served: Server, agent: Any) -> None:
    """Requests as Codex and Claude Code send them, five turns with tools. The demo pair knows conversations of one turn
    only, so what it says after the first is not looked at (``chat/test_agents.py`` does, on scripts)."""
    whole = agent(agents.to(served.url), stream=False)
    assert len(whole) == 5
    assert whole[0].calls == [("get_weather", {"city": "Oslo"})]
    assert whole[0].answer == "It is sunny in Oslo, with 21 degrees."
    assert whole[0].reasoning
    for turn in whole:
        assert not any(mark in text for text in (turn.answer, turn.reasoning) for mark in MARKS), turn
    assert agent(agents.to(served.url), stream=True) == whole
