"""The documentation builds with every warning an error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(site)]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)


def test_site_builds_strictly(tmp_path: Path) -> None:
    done = build(ROOT / "mkdocs.yml", tmp_path / "site")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "how-to" / "choose-k" / "index.html").is_file()
    for page in (tmp_path / "site").rglob("index.html"):
        text = page.read_text()
        assert "![" not in text, f"{page}: a figure is raw Markdown"
        assert "&lt;\\|" not in text, f"{page}: a control token with a backslash"
    assert "<img" in (tmp_path / "site" / "explanation" / "how-it-works" / "index.html").read_text()


def test_every_page_is_in_the_navigation() -> None:
    import yaml

    text = (ROOT / "mkdocs.yml").read_text()
    nav = yaml.safe_load(text)["nav"]
    listed = set(_leaves(nav))
    assert {p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")} <= listed


def _leaves(node: object) -> list[str]:
    if isinstance(node, str):
        return [node]
    values = node.values() if isinstance(node, dict) else node
    assert isinstance(values, list) or hasattr(values, "__iter__")
    return [leaf for value in values for leaf in _leaves(value)]  # type: ignore[union-attr]


def test_pages_made_from_the_code_are_current() -> None:
    from tools import reference_pages

    for name, page in reference_pages.PAGES.items():
        assert (reference_pages.FOLDER / name).read_text() == page(), f"make reference: {name}"
