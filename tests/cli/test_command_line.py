"""The console script itself."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.support.commands import gemma4_spec, in_process
from vllm_gemma4_spec import __version__
from vllm_gemma4_spec.cli import COMMANDS
from vllm_gemma4_spec.registry import PATCHES


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from vllm_gemma4_spec.cli import main; sys.argv[0] = 'vllm-gemma4-spec'; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def test_help_names_every_command() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in COMMANDS)


def test_every_command_has_help_with_an_example() -> None:
    for name in COMMANDS:
        done = in_process(name, "--help")
        assert done.returncode == 0, done.stderr
        assert f"vllm-gemma4-spec {name}" in " ".join(done.stdout.split()), name


def test_version() -> None:
    assert run("--version").stdout == f"vllm-gemma4-spec {__version__}\n"


def test_an_unknown_command_is_no_traceback() -> None:
    done = run("nonsense")
    assert done.returncode == 2
    assert "No such command" in done.stderr
    assert "Traceback" not in done.stderr


def test_patches_fit_the_installed_vllm() -> None:
    done = run("patches", "--json")
    assert done.returncode == 0
    rows = json.loads(done.stdout)["patches"]
    assert [r["name"] for r in rows] == [p.name for p in PATCHES]
    assert all(r["fits"] for r in rows)
    for mark in (m for r in rows for m in r["fingerprints"].values()):
        assert mark["found"] == mark["wanted"]


def test_nothing_is_cut_in_a_narrow_terminal() -> None:
    shown = gemma4_spec("patches", COLUMNS="50").stdout
    assert all(p.name in shown and p.name.upper().replace("-", "_") in shown for p in PATCHES)
    text = gemma4_spec("plan", "--help", COLUMNS="50").stdout
    assert all(option in text for option in ("--target-weights", "--drafter-weights", "--overhead-ms"))
    assert max(map(len, text.splitlines())) <= 50
