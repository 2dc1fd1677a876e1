"""Says what a release still needs: ``make release-check``. Nothing is built, uploaded or registered."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
NAME = "vllm-gemma4-spec"
_SDIST = ("pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "Makefile", "docs/index.md", "tests/conftest.py")
_LINK = re.compile(r"\]\((?!https?://|#|mailto:)([^)#\s]+)")


class Need(NamedTuple):
    """One condition of a release, and whether it holds."""

    subject: str
    holds: bool
    text: str


def version(root: Path) -> str:
    """The version that the package says it has."""
    found = re.search(r'__version__ = "([^"]+)"', (root / "vllm_gemma4_spec" / "_version.py").read_text())
    if not found:
        raise SystemExit("vllm_gemma4_spec/_version.py has no __version__")
    return found.group(1)


def versions(root: Path) -> Need:
    """A number that a release can have."""
    now = version(root)
    return Need("version", bool(re.fullmatch(r"\d+\.\d+\.\d+", now)), f"{now} in vllm_gemma4_spec/_version.py")


def changelog(root: Path) -> Need:
    """A dated title for this version, and nothing left under Unreleased."""
    text, now = (root / "CHANGELOG.md").read_text(), version(root)
    dated = re.search(rf"^## \[{re.escape(now)}\] - \d{{4}}-\d\d-\d\d$", text, re.M)
    rest = re.search(r"^## \[Unreleased\]\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    if not dated:
        return Need("changelog", False, f"CHANGELOG.md has no title `## [{now}] - DATE`")
    if rest and rest.group(1).strip():
        return Need("changelog", False, "CHANGELOG.md still has entries under [Unreleased]")
    return Need("changelog", True, dated.group()[3:])


def clean(root: Path) -> Need:
    """Nothing that is not committed."""
    done = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=False)
    changed = len(done.stdout.splitlines())
    return Need("tree", done.returncode == 0 and not changed, f"{changed} files not committed")


def links(root: Path) -> Need:
    """Relative links of the first pages lead somewhere."""
    broken = [
        f"{page}: {link}"
        for page in ("README.md", *(p.relative_to(root).as_posix() for p in sorted(root.glob("overlays/*/README.md"))))
        for link in _LINK.findall((root / page).read_text())
        if not (root / page).parent.joinpath(link).exists()
    ]
    return Need("links", not broken, "; ".join(broken) or "README and overlays lead to files that are there")


def wheel(root: Path, dist: Path) -> Need:
    """A wheel of this version, with the package and without what only the checkout has."""
    file = dist / f"vllm_gemma4_spec-{version(root)}-py3-none-any.whl"
    if not file.is_file():
        return Need("wheel", False, f"{file.name} is not in {dist.name}/: make wheel")
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
    strays = [n for n in names if not n.startswith(("vllm_gemma4_spec/", "vllm_gemma4_spec-"))]
    if strays or "vllm_gemma4_spec/__init__.py" not in names:
        return Need("wheel", False, f"{file.name} holds {', '.join(strays[:3]) or 'no package'}")
    return Need("wheel", True, f"{file.name}, {len(names)} files")


def sdist(root: Path, dist: Path) -> Need:
    """A source distribution of this version from which the tests can run."""
    file = dist / f"vllm_gemma4_spec-{version(root)}.tar.gz"
    if not file.is_file():
        return Need("sdist", False, f"{file.name} is not in {dist.name}/: make wheel")
    with tarfile.open(file) as archive:
        names = {n.partition("/")[2] for n in archive.getnames()}
    missing = [name for name in _SDIST if name not in names]
    return Need("sdist", not missing, f"{file.name} lacks {', '.join(missing)}" if missing else file.name)


def index_name() -> Need:
    """Not looked up: whoever releases must see that the name is theirs."""
    text = f"register {NAME} on the index first; until then no text may install it by that name"
    return Need("index name", False, text + " (by hand)")


def needs(root: Path, dist: Path) -> Iterator[Need]:
    """Every condition, in the order of docs/contributing/release.md."""
    yield versions(root)
    yield changelog(root)
    yield clean(root)
    yield links(root)
    yield wheel(root, dist)
    yield sdist(root, dist)
    yield index_name()


def main() -> int:
    """Prints them; 1 while something is missing that this script can see."""
    missing = 0
    for need in needs(ROOT, ROOT / "dist"):
        by_hand = need.text.endswith("(by hand)")
        missing += not need.holds and not by_hand
        print(f"{'ok  ' if need.holds else 'todo' if by_hand else 'MISS'}  {need.subject:<10}  {need.text}")
    return int(missing > 0)


if __name__ == "__main__":
    sys.exit(main())
