"""``tools.mutation``: what a removal leaves, and where it is seen."""

from __future__ import annotations

import ast
from pathlib import Path

from tools import mutation


def test_every_statement_of_functions_is_removed_once_but_docstrings() -> None:
    source = 'X = 1\ndef f(a):\n    """Says."""\n    if a:\n        a += 1\n    return a\n'
    left = [(line, ast.unparse(tree)) for line, tree in mutation.mutants(source)]
    begin = 'X = 1\n\ndef f(a):\n    """Says."""\n'
    assert left == [
        (4, f"{begin}    pass\n    return a"),
        (5, f"{begin}    if a:\n        pass\n    return a"),
        (6, f"{begin}    if a:\n        a += 1\n    pass"),
    ]


def test_a_removal_is_in_a_copy_alone() -> None:
    name = "patching.failure"
    file = mutation.ROOT / mutation.PACKAGE / "patching" / "failure.py"
    before = file.read_text()
    _, tree = next(mutation.mutants(before))
    with mutation._copy(name, tree) as copy:
        assert (copy / file.relative_to(mutation.ROOT)).read_text() == ast.unparse(tree) != before
        assert (copy / "tests" / "tools" / Path(__file__).name).read_text() == Path(__file__).read_text()
        assert (copy / "pyproject.toml").exists()
    assert not copy.exists()
    assert file.read_text() == before
