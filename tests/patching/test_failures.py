"""A patch that does not fit, at the start or long after it: left out, or the end of the process; never half on."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vllm_gemma4_spec
from tests.support.engine import engine
from tests.support.stock import without
from vllm_gemma4_spec.engine.patches import PATCH_FAILURES
from vllm_gemma4_spec.errors import PatchStateError, SettingError, TargetError
from vllm_gemma4_spec.patching import engine as patch_engine
from vllm_gemma4_spec.patching import failure
from vllm_gemma4_spec.patching.engine import Patcher
from vllm_gemma4_spec.patching.failure import gate
from vllm_gemma4_spec.patching.patch import Edit, Group, Patch
from vllm_gemma4_spec.registry import PATCHER, PATCHES


def new(original: Any) -> Any:
    return lambda: "patched"


def patch(name: str, group: Group, *targets: str, **more: Any) -> Patch:
    """A patch that adds names; one that its module has already makes it fail."""
    edits = tuple(Edit(target, new, adds=True) for target in targets)
    return Patch(name, group, "why", "how", "retire", "scope", "none found", edits, **more)


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """Two modules that nobody has imported; both have a function ``there``."""
    names = [f"target_{request.node.name.split('[')[0][:40]}_{n}" for n in "ab"]
    for name in names:
        (tmp_path / f"{name}.py").write_text("def there(): return 'own'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield names
    for name in names:
        sys.modules.pop(name, None)
    failure.forget()


def states(patcher: Patcher) -> dict[str, str]:
    return {s.name: s.state for s in patcher.status()}


def test_a_convenience_patch_that_does_not_fit_is_left_out(modules: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, in whichever module it fails; the others go on."""
    a, b = modules
    said: list[str] = []
    monkeypatch.setattr(patch_engine.logger, "warning", lambda text, *values: said.append(text % values))
    extra = patch("extra", Group.CONVENIENCE, f"{a}:one", f"{b}:there")
    needed = patch("needed", Group.CORRECTNESS, f"{a}:two", f"{b}:three")
    patcher = Patcher((extra, needed))
    patcher.apply([extra, needed])
    first = importlib.import_module(a)
    assert first.one() == first.two() == "patched"
    second = importlib.import_module(b)
    assert second.there() == "own"
    assert second.three() == first.two() == "patched"
    assert not hasattr(first, "one")
    assert states(patcher) == {"extra": "left out", "needed": "on"}
    assert len(said) == 1
    assert f"the patch extra is left out, answers stay right: {b}:there" in said[0]
    assert failure.first() is None
    patcher.apply([extra, needed])  # a second load of the plugin does not try again
    assert states(patcher) == {"extra": "left out", "needed": "on"}
    patcher.undo()


def test_a_correctness_patch_that_fails_later_undoes_nothing_and_ends_the_process(modules: list[str]) -> None:
    """The importer swallows the error, as vLLM does when it inspects a model; the gate does not."""
    a, b = modules
    needed = patch("needed", Group.CORRECTNESS, f"{a}:one", f"{b}:there", f"{b}:two")
    other = patch("other", Group.CORRECTNESS, f"{b}:three")
    patcher = Patcher((needed, other))
    patcher.apply([needed, other])
    first = importlib.import_module(a)
    start = gate(lambda: "started")
    assert start() == "started"
    with contextlib.suppress(Exception):
        importlib.import_module(b)
    assert first.one() == "patched"  # objects of it may be in use
    assert states(patcher) == {"needed": "failed", "other": "on"}
    assert isinstance(failure.first(), TargetError)
    with pytest.raises(TargetError, match=rf"{b}:there: the patch needed cannot be applied: .* exists already"):
        start()
    with pytest.raises(TargetError):
        start()
    patcher.undo()
    assert start() == "started"


def test_in_the_vllm_command_it_is_one_line(modules: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (a, _) = modules
    monkeypatch.setattr(sys, "argv", ["/usr/bin/vllm"])
    patcher = Patcher((patch("needed", Group.CORRECTNESS, f"{a}:there"),))
    patcher.apply(patcher.known)
    with pytest.raises(SystemExit) as end:
        importlib.import_module(a)
    assert str(end.value.code).startswith(f"vllm-gemma4-spec: {a}:there")
    patcher.undo()


def test_at_the_start_correctness_patches_are_all_or_none(modules: list[str]) -> None:
    a, _ = modules
    module = importlib.import_module(a)
    known = (patch("fits", Group.CORRECTNESS, f"{a}:one"), patch("needed", Group.CORRECTNESS, f"{a}:there"))
    patcher = Patcher(known)
    with pytest.raises(TargetError, match="the patch needed cannot be applied"):
        patcher.apply(known)
    assert not hasattr(module, "one")
    assert set(states(patcher).values()) == {"not applied"}
    assert failure.first() is None


def test_no_engine_is_made_once_a_patch_has_failed(tiny: dict[str, Path]) -> None:
    """The gates of the real package."""
    vllm_gemma4_spec.apply()
    failure.keep(TargetError("something is gone"))
    try:
        with pytest.raises(TargetError, match="something is gone"), engine(tiny["target"]):
            pass
    finally:
        failure.forget()


def test_stock_makes_an_engine_whatever_has_failed(tiny: dict[str, Path]) -> None:
    """Without the gates nobody asks."""
    failure.keep(TargetError("something is gone"))
    try:
        with without(PATCH_FAILURES), engine(tiny["target"]) as llm:
            assert llm is not None
    finally:
        failure.forget()


@pytest.mark.parametrize(("name", "needs"), [(p.name, n) for p in PATCHES for n in p.needs])
def test_a_switch_that_drops_what_another_patch_needs_is_refused(
    name: str, needs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable = f"VLLM_GEMMA4_SPEC_PATCH_{needs.upper().replace('-', '_')}"
    monkeypatch.setenv(variable, "0")
    with pytest.raises(SettingError, match=rf"{variable}=0: the patch [a-z0-9-]+ needs {needs}; unset it, or set"):
        Patcher(PATCHES).check_environment()
    # Without all that need it, it may be left out.
    needing = {needs}
    while more := {p.name for p in PATCHES if needing & set(p.needs)} - needing:
        needing |= more
    for other in needing:
        monkeypatch.setenv(f"VLLM_GEMMA4_SPEC_PATCH_{other.upper().replace('-', '_')}", "0")
    Patcher(PATCHES).check_environment()
    assert name in needing


def test_what_is_needed_exists() -> None:
    names = [p.name for p in PATCHES]
    assert all(need in names for p in PATCHES for need in p.needs)


def test_what_someone_else_put_on_top_stays_and_is_named() -> None:
    class Owner:
        ours = "ours"
        inherited = theirs = "replacement"

    def applied(name: str, original: object, replacement: str = "replacement") -> patch_engine._Applied:
        edit = Edit(f"package.module:Owner.{name}", lambda _: replacement)
        return patch_engine._Applied(edit, Owner, name, original, replacement)

    off = [applied("theirs", "original"), applied("ours", "below", "ours"), applied("ours", "original", "below")]
    Owner.theirs = "someone else's"
    for order in (off, off[1:] + off[:1]):  # wherever it is found, nothing has been undone by then
        with pytest.raises(PatchStateError, match=r"package\.module:Owner\.theirs was replaced again"):
            patch_engine._check_on_top(order)
    Owner.theirs = "replacement"
    patch_engine._check_on_top(off)
    with pytest.raises(PatchStateError, match=r"Owner\.ours"):
        patch_engine._check_on_top(off[:0:-1])  # the lower one of two cannot go first
    for each in off:
        each.revert()
    assert (Owner.theirs, Owner.ours) == ("original", "original")
    applied("inherited", patch_engine.MISSING).revert()
    assert not hasattr(Owner, "inherited")


def test_nothing_is_undone_where_something_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    importlib.import_module("vllm.v1.core.sched.scheduler")  # patches are applied to what has been imported
    vllm_gemma4_spec.apply()
    first = PATCHER._applied[0]  # the last one to be undone
    places = [(a.owner, a.attribute) for a in PATCHER._applied]
    before = [vars(owner)[attribute] for owner, attribute in places]
    with monkeypatch.context() as someone_else:
        someone_else.setattr(first.owner, first.attribute, lambda *_: None)
        with pytest.raises(PatchStateError, match="was replaced again"):
            vllm_gemma4_spec.undo()
    assert [(a.owner, a.attribute) for a in PATCHER._applied] == places
    assert all(vars(owner)[name] is value for (owner, name), value in zip(places, before, strict=True))
    vllm_gemma4_spec.undo()
    assert not PATCHER._applied
