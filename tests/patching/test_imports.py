"""What imports what inside the package, and that a process may import any of its modules first."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

from tests.support.fresh import run

ROOT = Path(__file__).parents[2]
PACKAGE = "vllm_gemma4_spec"

# Each may import what stands above it, and no other of its own line.
LAYERS = (
    ("_version", "errors", "interrupts"),
    ("json_file", "settings", "scope"),
    ("patching",),
    ("hf_config",),
    ("checkpoints",),
    ("kernels", "metrics"),
    ("chat", "cpu", "engine", "lora", "multimodal", "quantization", "requests", "scheduling", "spec_decode", "startup"),
    ("performance",),
    ("mtp",),
    ("registry",),
    ("demo", "library", "ops", "plugin"),
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


# A class of each stands for, or comes from, one of vLLM's in a module that asks for its patch when it is imported.
_CLOSEST = [
    f"{PACKAGE}.{name}"
    for name in ("quantization.linear", "chat.seen_detokenizer", "requests.grammar", "requests.stop_strings")
]


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
    failed = {}
    for name in names:
        done = run(
            f"""
            import importlib, vllm_gemma4_spec
            if {patched == "patched"}:
                vllm_gemma4_spec.apply()
            importlib.import_module({name!r})
            if {patched == "patched"}:
                states = {{s.name: s.state for s in vllm_gemma4_spec.status()}}
                assert set(states.values()) <= {{"on", "waiting"}}, states
            """
        )
        if done.returncode:
            failed[name] = done.stderr[-2000:]
    assert not failed
