"""The comparison of two junit files, on files that pytest itself writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import upstream_tests  # noqa: E402
from upstream_tests import Outcome  # noqa: E402

MODULE = """
import os, pytest
overlay = os.environ["WAY"] == "overlay"
def test_passes(): pass
def test_skipped(): pytest.skip("no reason")
@pytest.mark.xfail
def test_xfails(): assert False
def test_fails(): raise OSError("We couldn't connect to the hub")
def test_better(): assert overlay
class TestThings:
    @pytest.mark.parametrize("n", [1, 2])
    def test_worse(self, n): assert not overlay or n == 2
@pytest.fixture
def broken():
    yield
    assert not overlay
def test_teardown(broken): pass
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, upstream_tests.Outcomes]:
    work = tmp_path_factory.mktemp("work")
    (work / "tests").mkdir()
    (work / "tests/test_it.py").write_text(MODULE)
    (work / "tests/test_uncollected.py").write_text("import no_such_module")
    out = {}
    for way in upstream_tests.WAYS:
        junit = work / f"{way}.xml"
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "--continue-on-collection-errors", f"--junitxml={junit}", "tests"],
            cwd=work,
            env={"WAY": way, "PATH": "/usr/bin"},
            capture_output=True,
            check=False,
        )
        out[way] = upstream_tests.read_junit(junit)
        for test in out[way]:
            assert upstream_tests._file(work, test) in ("tests/test_it.py", "tests/test_uncollected.py")
    return out


def test_outcomes(found: dict[str, upstream_tests.Outcomes]) -> None:
    states = {t.rpartition(".")[2]: o.state for t, o in found["stock"].items()}
    assert states == {
        "test_it::test_passes": "passed",
        "test_it::test_skipped": "skipped",
        "test_it::test_xfails": "xfailed",
        "test_it::test_fails": "failed",
        "test_it::test_better": "failed",
        "TestThings::test_worse[1]": "passed",
        "TestThings::test_worse[2]": "passed",
        "test_it::test_teardown": "passed",
        "test_uncollected": "error",
    }


def test_what_got_worse_and_better(found: dict[str, upstream_tests.Outcomes]) -> None:
    pairs = {p.test.rpartition("::")[2]: p.worse for p in upstream_tests.differences(found["stock"], found["overlay"])}
    assert pairs == {"test_better": False, "test_worse[1]": True, "test_teardown": True}


def test_a_test_that_disappears_is_worse() -> None:
    (pair,) = upstream_tests.differences({"t": Outcome("failed")}, {})
    assert pair.worse


def test_the_report_names_what_differs_and_what_fails(found: dict[str, upstream_tests.Outcomes]) -> None:
    pairs = upstream_tests.differences(found["stock"], found["overlay"])
    page = upstream_tests.report({"group": found}, {p.test: p for p in pairs if p.worse})
    assert "| group | 4 passed, 1 xfailed, 1 skipped, 2 failed, 1 error |" in page
    assert "## Worse with the plugin: 2" in page
    assert "test_better`: failed → passed" in page
    assert "needs a download" in page
    assert "needs a package" in page


def test_every_excluded_module_is_below_a_group() -> None:
    paths = [p for ps in upstream_tests.GROUPS.values() for p in ps]
    for excluded in upstream_tests.EXCLUDED:
        assert any(excluded.startswith(p + "/") for p in paths), excluded


def test_patches_in_force_are_those_of_the_groups_own_modules() -> None:
    patches = upstream_tests.Patches(
        states={},
        in_force={
            "tests/v1/spec_decode/test_eagle.py": {"draft-groups": [3, 3], "own-blocks": [3, 5], "chat-output": [0, 9]},
            "tests/v1/spec_decode/test_ngram.py": {"draft-groups": [0, 3], "own-blocks": [4, 5], "chat-output": [0, 9]},
            "tests/v1/worker/test_gpu_model_runner.py": {"draft-groups": [0, 3], "own-blocks": [0, 5]},
        },
    )
    assert patches.of_group("speculation") == "draft-groups, own-blocks (4 of 5)"
    assert patches.of_group("model runner") == "none"
