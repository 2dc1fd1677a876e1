"""What imports what inside the package, and that a process may import any of its modules first."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "vllm_gemma4_spec"

# Each may import what stands above it, and no other of its own line.
LAYERS = (
    ("_version", "errors"),
    ("json_file", "settings", "scope"),
    ("patching",),
    ("hf_config",),
    ("checkpoints",),
    ("kernels", "metrics"),
    ("chat", "cpu", "engine", "lora", "multimodal", "quantization", "requests", "scheduling", "spec_decode", "startup"),
    ("performance",),
    ("mtp",),
    ("registry",),
    ("demo", "ops", "plugin"),
    ("cli",),
    (PACKAGE,),
)


@functools.cache
def modules() -> dict[str, Path]:
    names = (path.relative_to(ROOT).with_suffix("") for path in sorted((ROOT / PACKAGE).rglob("*.py")))
    return {".".join(name.parts).removesuffix(".__init__"): ROOT / name.with_suffix(".py") for name in names}


@functools.cache
def imports() -> dict[str, set[str]]:
    """Modules of the package that each of them imports, at its top or in a function."""
    found: dict[str, set[str]] = {}
    for name, path in modules().items():
        targets: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert not node.level, f"{name}: a relative import"
                targets |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
            elif isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
        targets = {t for t in targets if t in modules()}
        # `from package import module` names the package, too, which is imported before its modules anyway.
        found[name] = {t for t in targets if not any(other.startswith(f"{t}.") for other in targets)} - {name}
    return found


def topic(module: str) -> str:
    """The folder or module directly below the package; the package itself for its own ``__init__``."""
    return module.split(".")[1] if "." in module else module


def test_every_module_has_a_layer() -> None:
    assert {topic(name) for name in modules()} == {name for layer in LAYERS for name in layer}


def test_nothing_imports_a_higher_layer() -> None:
    height = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    wrong = [
        f"{name} imports {target}"
        for name, targets in imports().items()
        for target in targets
        if topic(name) != topic(target) and height[topic(name)] <= height[topic(target)]
    ]
    assert not wrong


def test_no_circle() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for target in imports()[name]:
                visit(target, (*path, name))
            done.add(name)

    for name in modules():
        visit(name, ())


# Forks a process per module from one that has what vLLM builds on but no vLLM, so that each starts as if fresh.
_EACH_FIRST = """
import importlib, os, sys, traceback
import numpy, torch, transformers, triton  # noqa
from transformers import PreTrainedModel, PretrainedConfig  # noqa
assert not [m for m in sys.modules if m == "vllm" or m.startswith(("vllm.", "vllm_gemma4_spec"))]

def child(module, patched):
    import vllm_gemma4_spec
    if patched:
        vllm_gemma4_spec.apply()
    importlib.import_module(module)
    if patched:
        states = {s.name: s.state for s in vllm_gemma4_spec.status()}
        assert set(states.values()) <= {"on", "waiting"}, states

patched, failed = sys.argv[1] == "patched", 0
for module in sys.argv[2:]:
    pid = os.fork()
    if pid == 0:
        try:
            child(module, patched)
        except BaseException:
            print(module, traceback.format_exc(), flush=True)
            os._exit(1)
        os._exit(0)
    failed += os.waitpid(pid, 0)[1] != 0
sys.exit(failed != 0)
"""

# A class of it replaces the one of vLLM's that another is derived from.
_CLOSEST = [f"{PACKAGE}.quantization.linear"]


@pytest.mark.parametrize(
    ("names", "patched"),
    [
        (_CLOSEST, "patched"),
        pytest.param(list(modules()), "patched", marks=pytest.mark.slow, id="all-patched"),
        pytest.param(list(modules()), "unpatched", marks=pytest.mark.slow, id="all-unpatched"),
    ],
)
def test_every_module_imports_first(names: list[str], patched: str) -> None:
    """With the patches applied before, and without."""
    done = subprocess.run(
        [sys.executable, "-c", _EACH_FIRST, patched, *names], cwd=ROOT, capture_output=True, text=True, timeout=3000
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
