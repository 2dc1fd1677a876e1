"""Ends each wrapper's docstring with its patch, the test that shows stock vLLM, and the related upstream change.

Part of ``make ledger``. What stands before that paragraph, the cause, is written by hand.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections import defaultdict
from pathlib import Path

from tests.patching.test_every_patch import SHOWN
from vllm_gemma4_spec.registry import PATCHES

ROOT = Path(__file__).parents[1]
_OURS = re.compile(r"\s*\n\s*\n\s*Patch: ``.*\Z", re.DOTALL)


def wanted() -> dict[Path, dict[str, str]]:
    """File -> name of a wrapper in it -> its paragraph."""
    patches: dict[tuple[Path, str], list[str]] = defaultdict(list)
    said = {}
    for patch in PATCHES:
        file, _, test = SHOWN[patch.name].stock.partition("::")
        evidence = f"``tests/{file}.py::{test.partition('[')[0]}``"
        said[patch.name] = f"Patch: ``{patch.name}``. Evidence: {evidence}. Related upstream change: {patch.related}."
        for edit in patch.edits:
            module, _, name = edit.replacement.partition(":")
            path = ROOT / (module.replace(".", "/") + ".py")
            path = path if path.exists() else path.with_suffix("") / "__init__.py"
            names = patches[path, name.removesuffix(".on_cpu").split(".")[-1]]
            if patch.name not in names:
                names.append(patch.name)
    found: dict[Path, dict[str, str]] = defaultdict(dict)
    for (path, name), used in patches.items():
        found[path][name] = "\n".join(said[n] for n in used)
    return found


def written(text: str, paragraphs: dict[str, str]) -> str:
    """A module's source with these paragraphs at the end of its wrappers' docstrings."""
    lines = text.splitlines()
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    outer = {n.name: n for n in sorted(functions, key=lambda n: n.col_offset, reverse=True) if n.name in paragraphs}
    outer |= {n.name: n for n in functions if n.name in paragraphs and n.col_offset == 0}
    assert set(outer) == set(paragraphs), set(paragraphs) - set(outer)
    for name, node in sorted(outer.items(), key=lambda item: -item[1].lineno):
        first = node.body[0]
        assert isinstance(first, ast.Expr), f"{name}: no docstring"
        indent = " " * first.col_offset
        have = "\n".join(lines[first.lineno - 1 : first.end_lineno])
        before = _OURS.sub("", have.rstrip().removesuffix('"""'))
        more = [
            textwrap.fill(line, 120, initial_indent=indent, subsequent_indent=indent, break_long_words=False)
            for line in paragraphs[name].split("\n")
        ]
        new = "\n".join([before.rstrip(), "", *more, f'{indent}"""'])
        lines[first.lineno - 1 : first.end_lineno] = new.split("\n")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for path, paragraphs in wanted().items():
        path.write_text(written(path.read_text(), paragraphs))
