"""The console script itself."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.commands import gemma4_spec, in_process
from vllm_gemma4_spec import __version__
from vllm_gemma4_spec.cli import COMMANDS, SUMMARIES, _checks
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


def loaded_by(*arguments: str) -> set[str]:
    """Heavy packages that a command has imported when it ends."""
    code = (
        "import sys; from vllm_gemma4_spec.cli import main; sys.argv[0] = 'vllm-gemma4-spec'\n"
        "try: main()\n"
        "finally: print('loaded', *sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    names = done.stderr.rsplit("loaded", 1)[1].split()
    return {"torch", "transformers", "vllm", "rich", "pydantic"} & set(names)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_the_list_of_commands_imports_none_of_them(arguments: list[str]) -> None:
    assert loaded_by(*arguments) == set()


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["plan", "--help"],
        ["plan", "--target", "nobody/nothing"],
        ["inspect", "/nonexistent"],
        ["repair", "/nonexistent", "--out", "/nonexistent/out"],
        ["quantize", "/nonexistent", "/nonexistent/out", "--recipe", "nvfp4"],
        ["doctor", "--workers", "none"],
        ["top", "--url", "http://127.0.0.1:9"],
        ["bench", "--url", "http://127.0.0.1:9"],
    ],
    ids=lambda a: " ".join(a),
)
def test_help_and_refusals_import_nothing_heavy(arguments: list[str]) -> None:
    assert loaded_by(*arguments) <= {"pydantic"}


def test_plan_and_inspect_read_configs_without_torch(tmp_path: Path) -> None:
    models = ("--target", "google/gemma-4-31B-it", "--drafter", "google/gemma-4-E4B-it", "--hardware", "H200")
    assert loaded_by("plan", *models) == {"pydantic", "rich"}


def test_summaries_are_of_the_commands() -> None:
    assert set(SUMMARIES) == set(COMMANDS)
    listed = " ".join(run("--help").stdout.split())
    assert all(f" {name} {text}" in listed for name, text in SUMMARIES.items())


def test_options_are_completed() -> None:
    done = gemma4_spec(
        _VLLM_GEMMA4_SPEC_COMPLETE="complete_bash", COMP_WORDS="vllm-gemma4-spec plan --tar", COMP_CWORD="2"
    )
    assert "--target" in done.stdout.split(), done.stderr


def test_what_takes_longer_than_a_second_says_what_it_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with _checks.slow("asking"):
        pass
    with _checks.slow("reading", quiet=True):
        time.sleep(1.1)
    assert capsys.readouterr().err == ""
    with _checks.slow("computing"):
        time.sleep(1.3)
    assert capsys.readouterr().err == "computing\n"
