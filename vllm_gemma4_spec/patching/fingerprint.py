"""Fingerprints of vLLM's source: what a patch was written for, and what is installed.

A fingerprint is the first 16 hex digits of the SHA-256 of a symbol's source text, decorators included,
indentation removed. ``fingerprints.json`` holds those of 0.19.1, with the digest of each whole file, so
that the usual check reads a file and hashes it (0.3 ms) instead of parsing it (100 ms for a model runner).

``make fingerprints`` rewrites the file from an installed vLLM 0.19.1.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import json
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vllm_gemma4_spec.errors import TargetError, VersionError

RECORD = Path(__file__).with_name("fingerprints.json")


@functools.cache
def record() -> dict[str, Any]:
    """``{module: {"file": digest, "symbols": {qualname: fingerprint}}}`` of vLLM 0.19.1."""
    return dict(json.loads(RECORD.read_text()))


def wanted(symbol: str) -> str:
    """The fingerprint of ``symbol`` in 0.19.1.

    Raises:
        TargetError: ``fingerprints.json`` does not hold the symbol (a patch was added without it).
    """
    module, _, name = symbol.partition(":")
    try:
        return str(record()[module]["symbols"][name])
    except KeyError:
        raise TargetError(
            f"{symbol}: not in {RECORD.name}; run `make fingerprints` with vLLM 0.19.1 installed"
        ) from None


def source_file(module: str) -> Path | None:
    """The file of ``module``, found without importing it or its parents; None where there is none."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or not spec.submodule_search_locations:
        return None
    for location in spec.submodule_search_locations:
        base = Path(location, *rest)
        for candidate in (base / "__init__.py", base.with_suffix(".py")):
            if candidate.is_file():
                return candidate
    return None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _find(body: list[ast.stmt], name: str) -> ast.stmt | None:
    found: ast.stmt | None = None
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node.name == name:
            found = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(t, ast.Name) and t.id == name for t in targets):
                found = node
        elif isinstance(node, (ast.If, ast.Try)):
            found = _find(node.body, name) or found
    return found


@functools.lru_cache(maxsize=8)
def _parse(text: str) -> ast.Module:
    return ast.parse(text)


def of_source(text: str, qualname: str) -> str | None:
    """The fingerprint of ``qualname`` in a module's text; None where it does not stand there."""
    body: list[ast.stmt] = _parse(text).body
    node: ast.stmt | None = None
    for part in qualname.split("."):
        node = _find(body, part)
        if node is None:
            return None
        body = getattr(node, "body", [])
    assert node is not None
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    lines = text.splitlines()[first - 1 : node.end_lineno]
    return _digest(textwrap.dedent("\n".join(line.rstrip() for line in lines)).encode())


def installed(symbols: Iterable[str]) -> dict[str, str | None]:
    """The fingerprint of each of ``symbols`` as installed, each file read once; None where one is gone."""
    out: dict[str, str | None] = {}
    by_module: dict[str, list[str]] = {}
    for symbol in symbols:
        module, _, name = symbol.partition(":")
        by_module.setdefault(module, []).append(name)
    for module, names in by_module.items():
        path = source_file(module)
        data = path.read_bytes() if path is not None else None
        known = record().get(module, {"file": None, "symbols": {}})
        unchanged = data is not None and _digest(data) == known["file"]
        for name in names:
            if unchanged and name in known["symbols"]:
                mark: str | None = known["symbols"][name]
            else:
                mark = None if data is None else of_source(data.decode(), name)
            out[f"{module}:{name}"] = mark
    return out


def check(symbols: Iterable[str], version: str) -> None:
    """Compare every symbol with its fingerprint.

    Raises:
        TargetError: names each symbol that differs, its fingerprint and the one wanted.
    """
    wrong = []
    for symbol, have in installed(symbols).items():
        want = wanted(symbol)
        if have != want:
            wrong.append(f"{symbol} ({'is gone' if have is None else f'is {have}'}, wanted {want})")
    if wrong:
        raise TargetError(
            f"vLLM {version} is not the 0.19.1 these patches were written for: {'; '.join(wrong)}. "
            "Install vllm==0.19.1, or set VLLM_GEMMA4_SPEC=0 to run without the plugin."
        )


def build_record(symbols: list[str]) -> dict[str, Any]:
    """Fingerprint ``symbols`` in the installed vLLM.

    Raises:
        TargetError: a symbol does not exist.
    """
    out: dict[str, Any] = {}
    for symbol in sorted(set(symbols)):
        module, _, name = symbol.partition(":")
        path = source_file(module)
        text = path.read_text() if path else ""
        mark = of_source(text, name) if path else None
        if mark is None:
            raise TargetError(f"{symbol}: not found in the installed vLLM")
        entry = out.setdefault(module, {"file": _digest(text.encode()), "symbols": {}})
        entry["symbols"][name] = mark
    return out


def write_record(symbols: list[str]) -> None:
    """Rewrite ``fingerprints.json`` from the installed vLLM.

    Raises:
        VersionError: it is not 0.19.1.
    """
    from vllm_gemma4_spec.patching.version import SUPPORTED, vllm_version

    if vllm_version() != SUPPORTED:
        raise VersionError(f"fingerprints are taken from vLLM {SUPPORTED}, not {vllm_version()}")
    RECORD.write_text(json.dumps(build_record(symbols), indent=1, sort_keys=True) + "\n")
