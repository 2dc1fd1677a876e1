"""vLLM's source distributions from the package index: read as data, nothing of them is built or run.

The index is the one that ``PIP_INDEX_URL`` names, else pypi-simple's default.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

from packaging.version import Version
from pypi_simple import PYPI_SIMPLE_ENDPOINT, DistributionPackage, PyPISimple


def _client() -> PyPISimple:
    return PyPISimple(endpoint=os.environ.get("PIP_INDEX_URL", PYPI_SIMPLE_ENDPOINT))


def releases(since: str) -> dict[str, DistributionPackage]:
    """Version -> its source distribution, oldest first; final releases from ``since`` on that were not withdrawn."""
    with _client() as client:
        packages = client.get_project_page("vllm").packages
    found = {
        Version(p.version): p
        for p in packages
        if p.package_type == "sdist" and p.version is not None and not p.is_yanked
    }
    return {str(v): found[v] for v in sorted(found) if v >= Version(since) and not v.is_prerelease}


def fetch(package: DistributionPackage, cache: Path) -> Path:
    """The archive in ``cache``, downloaded (and its digest compared with the index's) if it is not there."""
    cache.mkdir(parents=True, exist_ok=True)
    archive = cache / package.filename
    if not archive.exists():
        partial = archive.with_suffix(".part")
        with _client() as client:
            client.download_package(package, partial)
        partial.rename(archive)
    return archive


def read_python(archive: Path) -> dict[str, str]:
    """Texts of the release's Python modules, by path inside it (``vllm/…``)."""
    texts = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.partition("/")[2]
            if name.startswith("vllm/") and name.endswith(".py") and member.isfile():
                file = tar.extractfile(member)
                assert file is not None
                texts[name] = file.read().decode()
    return texts


def unpack(archive: Path, parts: Sequence[str], folder: Path) -> Path:
    """Unpack the top-level ``parts`` of a release into ``folder``, which is returned."""
    with tarfile.open(archive) as tar:
        for member in tar:
            member.name = member.name.partition("/")[2]
            if member.name.split("/")[0] in parts:
                tar.extract(member, folder, filter="data")
    return folder
