"""Every command where there is only this package and what ``pip install`` brings with it: one line, no traceback."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.support.commands import ROOT, gemma4_spec
from tests.support.fake_server import State, fake_server

FIXTURE = ROOT / "tests/checkpoints/fixtures/31b-nvfp4"


def brought() -> set[str]:
    """Distributions that ``pip install .`` installs, this one left out."""
    found: set[str] = set()
    todo = ["vllm-gemma4-spec"]
    while todo:
        for text in importlib.metadata.requires(todo.pop()) or ():
            wanted = Requirement(text)
            if wanted.name not in found and (wanted.marker is None or wanted.marker.evaluate({"extra": ""})):
                found.add(wanted.name)
                todo.append(wanted.name)
    return found


@pytest.fixture(scope="module")
def laptop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with links to those packages and to this one."""
    site = tmp_path_factory.mktemp("site")
    for name in brought():
        distribution = importlib.metadata.distribution(name)
        tops = {Path(str(file)).parts[0] for file in distribution.files or () if ".." not in Path(str(file)).parts}
        for top in tops - {"__pycache__"}:
            (site / top).symlink_to(Path(str(distribution.locate_file(top))).resolve())
    (site / "vllm_gemma4_spec").symlink_to(ROOT / "vllm_gemma4_spec")
    entry_points = site / "vllm_gemma4_spec-0.dist-info"
    entry_points.mkdir()
    own = importlib.metadata.distribution("vllm-gemma4-spec")
    for file in ("METADATA", "entry_points.txt"):
        (entry_points / file).write_text(own.read_text(file) or "")
    return site


def run(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    own = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), sysconfig.get_config_var("DESTSHARED")]
    code = (
        f"import sys; sys.path[:] = {[*own, str(site)]!r}; sys.argv[0] = 'vllm-gemma4-spec'\n"
        "from vllm_gemma4_spec.cli import main; main()"
    )
    command = [sys.executable, "-I", "-S", "-c", code, *arguments]
    env = {"PATH": os.environ["PATH"], "NO_COLOR": "1", "HF_HOME": str(site / "none"), "COLUMNS": "200"}
    return subprocess.run(command, cwd=site, env=env, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["patches"], "vLLM is not installed here"),
        (["inspect", str(FIXTURE)], "needs torch, which is not installed here"),
        (["repair", str(FIXTURE), "--out", "repaired"], "needs torch, which is not installed here"),
        (["demo"], "vllm is not installed in this Python"),
        (["plan", "--target", "google/gemma-4-31B-it", "--plot", "plan.svg"], "matplotlib"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_needs_more_says_so_in_one_line(laptop: Path, arguments: list[str], words: str) -> None:
    done = run(laptop, *arguments)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert words in line


def test_what_needs_no_more_runs(laptop: Path) -> None:
    assert run(laptop, "plan", "--target", "google/gemma-4-31B-it", "--hardware", "H200").returncode == 0
    local = run(laptop, "doctor")
    assert (local.returncode, local.stderr) == (1, "")
    assert "\n1 problem\n" in local.stdout
    with fake_server(State()) as url:
        assert "0 problems" in run(laptop, "doctor", "--url", url).stdout
        assert run(laptop, "top", "--url", url, "--interval", "0.1").returncode == 0
        bench = run(laptop, "bench", "--url", url)
    assert bench.returncode == 2
    assert len(bench.stderr.splitlines()) == 1


def test_quantize_with_a_python_without_torch_is_one_line(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    done = gemma4_spec("quantize", str(FIXTURE), str(tmp_path / "made"), "--recipe", "nvfp4", "--python", str(python))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert f"which {python} does not have" in line
