"""Every built page, looked at by a browser at the width of a desk and of a phone."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.docs import browser
from tests.docs.test_site import ROOT, build

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser.chromium() is None, reason="no Chromium: pages are not looked at"),
]
WIDTHS = (1280, 400)
EXTENSIONS = "markdown_extensions: [pymdownx.superfences]\n"
RAW = re.compile(r"!\[|\]\(|\*\*\w|^#{1,6} |^```|^\| ?-{3}|\\[|<>]", re.M)

_BAD = """# Bad

<div>
![raw](figure.svg)
</div>

![gone](nothing.svg)

<p style="width: 900px">wide</p>

`<\\|turn>`

1. one

   ```
   code
   ```

2. two
"""


def looked(site: Path, scratch: Path) -> list[dict[str, Any]]:
    pages = [p.relative_to(site).as_posix() for p in sorted(site.rglob("index.html"))]
    assert pages
    return browser.look(site, pages, WIDTHS, scratch)


def findings(seen: list[dict[str, Any]]) -> list[str]:
    """What is wrong, one line each."""
    found = []
    for page in seen:
        where = f"{page['page']} at {page['width']}"
        if page["wide"] > page["width"]:
            found.append(f"{where}: {page['wide']} px wide")
        found += [f"{where}: beyond the edge: {node}" for node in page["beyond"]]
        found += [f"{where}: figure {f['source']} is not drawn" for f in page["figures"] if not f["drawn"]]
        found += [f"{where}: figure {f['source']} has no text" for f in page["figures"] if not f["named"]]
        found += [f"{where}: a list begins anew: {node}" for node in page["broken"]]
        found += [f"{where}: raw Markdown: {match}" for match in RAW.findall(page["text"])]
        found += [f"{where}: backslash: {code}" for code in page["code"] if "<\\|" in code or "\\|>" in code]
    return found


def test_pages_are_as_meant(tmp_path: Path) -> None:
    done = build(ROOT / "mkdocs.yml", tmp_path / "site")
    assert done.returncode == 0, done.stderr
    seen = looked(tmp_path / "site", tmp_path / "browser")
    assert {"explanation/how-it-works/index.html", "contributing/architecture/index.html"} <= {
        page["page"] for page in seen if page["figures"]
    }
    assert not findings(seen)


def test_the_readme_is_as_meant(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text((ROOT / "README.md").read_text())
    for name in ("docs", "overlays"):
        shutil.copytree(ROOT / name, docs / name)
    text = re.sub(r"^nav:\n(?:[ #].*\n)+", "", (ROOT / "mkdocs.yml").read_text(), flags=re.M)
    (tmp_path / "mkdocs.yml").write_text(text)
    build(tmp_path / "mkdocs.yml", tmp_path / "site")  # not strict: it links to files that are no pages
    seen = browser.look(tmp_path / "site", ["index.html"], WIDTHS, tmp_path / "browser")
    assert all(page["figures"] for page in seen)
    assert not findings(seen)


def test_what_is_looked_for_is_seen(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(_BAD)
    config = tmp_path / "mkdocs.yml"
    config.write_text("site_name: bad\ntheme: {name: material, font: false}\nplugins: []\n" + EXTENSIONS)
    build(config, tmp_path / "site")
    found = " ".join(findings(looked(tmp_path / "site", tmp_path / "browser")))
    for each in ("400: 9", "raw Markdown: ![", "nothing.svg is not drawn", "backslash: <\\|turn>", "begins anew: two"):
        assert each in found, found
