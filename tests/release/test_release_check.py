"""``make release-check`` says what a release needs."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

import pytest

from tools import release_check


@pytest.fixture
def ready(tmp_path: Path) -> Path:
    """A tree and ``dist`` of a release that lacks nothing."""
    (tmp_path / "vllm_gemma4_spec").mkdir()
    (tmp_path / "vllm_gemma4_spec" / "_version.py").write_text('__version__ = "1.2.3"\n')
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## [Unreleased]\n\n## [1.2.3] - 2026-12-01\n\n- All\n")
    (tmp_path / "README.md").write_text("[changes](CHANGELOG.md), [site](https://example.org), [below](#below)\n")
    dist = tmp_path / "dist"
    dist.mkdir()
    with zipfile.ZipFile(dist / "vllm_gemma4_spec-1.2.3-py3-none-any.whl", "w") as wheel:
        wheel.writestr("vllm_gemma4_spec/__init__.py", "")
        wheel.writestr("vllm_gemma4_spec-1.2.3.dist-info/METADATA", "")
    with tarfile.open(dist / "vllm_gemma4_spec-1.2.3.tar.gz", "w:gz") as sdist:
        for name in release_check._SDIST:
            sdist.add(tmp_path / "README.md", f"vllm_gemma4_spec-1.2.3/{name}")
    return tmp_path


def missing(root: Path) -> set[str]:
    """What is named, besides the tree (no repository here) and the index name (by hand)."""
    found = {need.subject for need in release_check.needs(root, root / "dist") if not need.holds}
    return found - {"tree", "index name"}


def test_a_release_that_lacks_nothing(ready: Path) -> None:
    assert missing(ready) == set()


@pytest.mark.parametrize(
    ("file", "text", "subject"),
    [
        ("CHANGELOG.md", "## [Unreleased]\n\n- All\n", "changelog"),
        ("CHANGELOG.md", "## [Unreleased]\n\n- More\n\n## [1.2.3] - 2026-12-01\n", "changelog"),
        ("README.md", "[gone](docs/gone.md)\n", "links"),
    ],
)
def test_what_is_missing_is_named(ready: Path, file: str, text: str, subject: str) -> None:
    (ready / file).write_text(text)
    assert missing(ready) == {subject}


def test_another_version_needs_everything_anew(ready: Path) -> None:
    (ready / "vllm_gemma4_spec" / "_version.py").write_text('__version__ = "1.2.4.dev0"\n')
    assert missing(ready) == {"version", "changelog", "wheel", "sdist"}


def test_a_wheel_that_holds_tests(ready: Path) -> None:
    with zipfile.ZipFile(ready / "dist" / "vllm_gemma4_spec-1.2.3-py3-none-any.whl", "a") as wheel:
        wheel.writestr("tests/conftest.py", "")
    assert missing(ready) == {"wheel"}


def test_links_of_this_checkout_lead_somewhere() -> None:
    assert release_check.links(release_check.ROOT).holds
