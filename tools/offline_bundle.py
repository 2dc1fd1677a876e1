"""One archive with what `make test-gpu` needs on a GPU machine without a package index, beside vLLM 0.19.1 itself.

    python tools/offline_bundle.py [--python 3.12] [--out dist/gpu-tests.tar.gz]      # or: make offline-bundle

There: unpack it, `sh install.sh [PYTHON]`, and `make test-gpu GPU_PYTHON=PYTHON` in its folder `checkout`. It holds the
committed state of this checkout, this package's wheel and those of the test tools with their dependencies.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("pytest", "pytest-timeout", "hypothesis")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
INSTALL = """#!/bin/sh
# sh install.sh [PYTHON]: into the Python that has vLLM 0.19.1. Nothing is fetched.
set -e
cd "$(dirname "$0")"
"${1:-python3}" -m pip install --no-index --find-links wheels --no-deps wheels/*.whl
"""


def pinned() -> list[str]:
    """The test tools in the versions that the constraints name."""
    text = (ROOT / "constraints" / "cpu.txt").read_text()
    lines = {name: line for line in text.splitlines() if (name := re.split("==", line)[0]) in TOOLS}
    return [lines.get(tool, tool) for tool in TOOLS]


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--python", default="3.12", help="version of the machine's Python")
    ap.add_argument("--out", type=Path, default=ROOT / "dist" / "gpu-tests.tar.gz")
    args = ap.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        wheels = folder / "wheels"
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", "--dest", str(wheels)]
        download += ["--python-version", args.python]
        download += [word for platform in PLATFORMS for word in ("--platform", platform)]
        subprocess.run([*download, *pinned()], check=True)
        build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(wheels)]
        subprocess.run([*build, str(ROOT), str(ROOT / "demo")], check=True)
        (folder / "install.sh").write_text(INSTALL)
        archive = ["git", "archive", "--prefix=checkout/", f"--output={folder / 'checkout.tar'}", "HEAD"]
        subprocess.run(archive, cwd=ROOT, check=True)
        with tarfile.open(folder / "checkout.tar") as tar:
            tar.extractall(folder, filter="data")
        (folder / "checkout.tar").unlink()
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(args.out, "w:gz") as out:
            for part in ("wheels", "checkout", "install.sh"):
                out.add(folder / part, part)
    print(f"{args.out}: {args.out.stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
