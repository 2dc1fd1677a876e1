"""The patch engine on modules of its own: what stands where after each call, and what is said of it."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm_gemma4_spec.errors import PatchStateError, SettingError, TargetError, VersionError
from vllm_gemma4_spec.patching import engine as patch_engine
from vllm_gemma4_spec.patching import failure, fingerprint
from vllm_gemma4_spec.patching.engine import Patcher
from vllm_gemma4_spec.patching.patch import Edit, Group, Patch

SOURCE = """
def function(): return "own"
VALUE = "own"
class Base:
    def inherited(self): return "base"
class Owner(Base):
    def method(self): return "own"
    @staticmethod
    def static(): return "own"
    @classmethod
    def of_class(cls): return "own"
"""
NAMES = ("function", "VALUE", "Owner.method", "Owner.static", "Owner.of_class", "Base.inherited")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a package with the modules ``a`` and ``b``, in the state that patches were written for."""
    name = "patched_" + request.node.name.partition("[")[0]
    folder = tmp_path / name
    folder.mkdir()
    (folder / "__init__.py").touch()
    for module in "ab":
        (folder / f"{module}.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    record = fingerprint.build_record([f"{name}.{module}:{symbol}" for module in "ab" for symbol in NAMES])
    monkeypatch.setattr(fingerprint, "record", lambda: record)
    yield name
    for module in [m for m in sys.modules if m.partition(".")[0] == name]:
        del sys.modules[module]
    failure.forget()


def load(package: str, module: str = "a") -> Any:
    return importlib.import_module(f"{package}.{module}")


def say(word: str) -> Callable[[Any], Any]:
    """A wrapper: what the original says, and ``word``."""

    def wrapper(original: Any) -> Any:
        below = original.__func__ if isinstance(original, (staticmethod, classmethod)) else original

        def replacement(*args: Any) -> str:
            return f"{below(*args) if below else 'nothing'} {word}"

        if below:
            replacement.__wrapped__ = below  # type: ignore[attr-defined]
        return type(original)(replacement) if below is not original else replacement

    return wrapper


def patch(name: str, *edits: Edit, group: Group = Group.CORRECTNESS, needs: tuple[str, ...] = ()) -> Patch:
    return Patch(name, group, "why", "how", "retire", "scope", "none found", edits, needs=needs)


def states(patcher: Patcher) -> dict[str, str]:
    return {s.name: s.state for s in patcher.status()}


def test_a_target_is_replaced_now_or_when_its_module_is_imported(package: str) -> None:
    a = load(package)
    one = patch("one", Edit(f"{package}.a:function", say("one")), Edit(f"{package}.b:Owner.method", say("one")))
    patcher = Patcher([one])
    assert states(patcher) == {"one": "not applied"}
    told: list[dict[str, str]] = []
    patcher.on_change.append(lambda: told.append(states(patcher)))
    patcher.apply([one])
    assert a.function() == "own one"
    assert told == [{"one": "waiting"}]
    (status,) = patcher.status()
    assert (status.name, status.group, status.state) == ("one", "correctness", "waiting")
    assert status.targets == (f"{package}.a:function", f"{package}.b:Owner.method")
    assert status.switch == "VLLM_GEMMA4_SPEC_PATCH_ONE"
    assert status.replaced == (f"{package}.a:function",)
    b = load(package, "b")
    assert b.Owner().method() == "own one"
    assert told[1:] == [{"one": "on"}]
    assert patcher.status()[0].replaced == status.targets
    patcher.apply([one])
    assert a.function() == b.Owner().method() == "own one"
    assert len(told) == 2
    patcher.undo()
    assert a.function() == b.Owner().method() == "own"
    assert told[2:] == [{"one": "not applied"}]
    importlib.reload(b)  # its hook is still there, and has nothing to do
    assert b.function() == "own"
    assert len(told) == 3
    patcher.apply([one])
    assert a.function() == b.Owner().method() == "own one"
    patcher.undo()


def test_a_hook_is_registered_once(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hooks: list[str] = []
    monkeypatch.setattr(patch_engine.wrapt, "register_post_import_hook", lambda _, module: hooks.append(module))
    one = patch("one", Edit(f"{package}.a:function", say("one")), Edit(f"{package}.a:VALUE", say("one")))
    two = patch("two", Edit(f"{package}.a:Owner.method", say("two")), Edit(f"{package}.b:function", say("two")))
    patcher = Patcher([one, two])
    patcher.apply([one])
    patcher.apply([one, two])
    assert hooks == [f"{package}.a", f"{package}.b"]


def test_every_kind_of_attribute_comes_back(package: str) -> None:
    owner = load(package).Owner
    before = dict(vars(owner))
    inherited = Edit(f"{package}.a:Owner.inherited", say("x"), source=f"{package}.a:Base.inherited")
    names = ("method", "static", "of_class")
    edits = (*(Edit(f"{package}.a:Owner.{n}", say("x")) for n in names), inherited)
    patcher = Patcher([patch("x", *edits, Edit(f"{package}.a:Owner.added", say("x"), adds=True))])
    patcher.apply(patcher.known)
    assert [getattr(owner(), n)() for n in names] == ["own x"] * 3
    assert owner.static() == owner.of_class() == "own x"
    assert owner().inherited() == "base x"
    assert owner().added() == "nothing x"
    patcher.undo()
    assert dict(vars(owner)) == before
    assert owner().inherited() == "base"


def test_patches_that_share_a_target_stand_on_each_other(package: str) -> None:
    a = load(package)
    one, two, other = (
        patch("one", Edit(f"{package}.a:function", say("one"))),
        patch("two", Edit(f"{package}.a:function", say("two"))),
        patch("other", Edit(f"{package}.a:Owner.method", say("other"))),
    )
    patcher = Patcher([one, two, other])
    patcher.apply([one, two, other])
    kept = vars(a.Owner)["method"]
    assert a.function() == "own one two"
    patcher.undo([one])
    assert a.function() == "own two"
    assert states(patcher) == {"one": "not applied", "two": "on", "other": "on"}
    assert vars(a.Owner)["method"] is kept
    patcher.apply([one])
    assert a.function() == "own two one"
    patcher.undo([one, two])
    assert a.function() == "own"
    assert states(patcher) == {"one": "not applied", "two": "not applied", "other": "on"}
    patcher.undo()
    assert a.Owner().method() == "own"
    assert patcher._applied == []


@pytest.mark.parametrize("name", ["function", "Owner.method", "Owner.static", "Owner.of_class"])
def test_what_someone_else_replaced_before_is_named(package: str, name: str) -> None:
    a = load(package)
    owner, attribute = patch_engine._resolve(a, name)
    kind = type(vars(owner)[attribute])

    def theirs(*_: Any) -> str:
        return "theirs"

    put = kind(theirs) if kind in (staticmethod, classmethod) else theirs
    setattr(owner, attribute, put)
    one = patch("one", Edit(f"{package}.a:{name}", say("one")))
    patcher = Patcher([one])
    where = (
        rf"{package}\.a:{name} was replaced before .* found {__name__}\.test_what.*theirs, wanted the function of vLLM"
    )
    with pytest.raises(TargetError, match=where):
        patcher.apply([one])
    assert vars(owner)[attribute] is put
    assert states(patcher) == {"one": "not applied"}


def test_what_is_no_function_or_wraps_the_right_one_is_taken(package: str) -> None:
    a = load(package)
    inner = a.function

    def outer() -> Any:
        return inner()

    outer.__wrapped__ = inner  # type: ignore[attr-defined]
    a.function = outer
    a.VALUE = type("Callable", (), {"__call__": lambda self: "an object"})()
    one = patch("one", Edit(f"{package}.a:function", say("one")), Edit(f"{package}.a:VALUE", say("one")))
    patcher = Patcher([one])
    patcher.apply([one])
    assert a.function() == "own one"
    assert a.VALUE() == "an object one"
    patcher.undo()


@pytest.mark.parametrize(
    ("name", "adds", "says"), [("function", True, "exists already"), ("Owner.method", False, "is gone")]
)
def test_a_target_must_be_there_or_not(package: str, name: str, adds: bool, says: str) -> None:
    a = load(package)
    if not adds:
        del a.Owner.method
    one = patch("one", Edit(f"{package}.a:{name}", say("one"), adds=adds))
    patcher = Patcher([one])
    with pytest.raises(
        TargetError, match=rf"{name}: the patch one cannot be applied: {package}\.a:{name} {says}; wanted"
    ):
        patcher.apply([one])


def test_a_wrapper_that_raises_is_the_patchs_fault(package: str) -> None:
    def broken(_: Any) -> Any:
        raise KeyError("no")

    load(package)
    one = patch("one", Edit(f"{package}.a:function", broken))
    with pytest.raises(TargetError, match=r"the patch one cannot be applied: KeyError: 'no'") as error:
        Patcher([one]).apply([one])
    assert isinstance(error.value.__cause__, KeyError)


def test_a_changed_source_stops_correctness_patches_and_leaves_others_out(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(patch_engine.logger, "warning", lambda text, *values: said.append(text % values))
    a = load(package)
    needed = patch("needed", Edit(f"{package}.a:function", say("needed")))
    extra = patch("extra", Edit(f"{package}.b:function", say("extra")), group=Group.CONVENIENCE)
    patcher = Patcher([needed, extra])
    record = fingerprint.record()
    for module in "ab":
        record[f"{package}.{module}"] = {"file": "another", "symbols": {"function": "of another release"}}
    with pytest.raises(TargetError, match=rf"{package}\.a:function \(is [0-9a-f]+, wanted of another release\)"):
        patcher.apply([needed, extra])
    assert a.function() == "own"
    assert states(patcher) == {"needed": "not applied", "extra": "not applied"}
    assert said == []
    with monkeypatch.context() as without:
        without.setattr(patch_engine.wrapt, "register_post_import_hook", None)  # there is nothing to wait for
        patcher.apply([extra])
    assert states(patcher) == {"needed": "not applied", "extra": "left out"}
    assert len(said) == 1
    assert said[0].startswith("vllm-gemma4-spec: the patch extra is left out")
    assert load(package, "b").function() == "own"
    patcher.apply([extra])
    assert len(said) == 1  # it is not tried again
    patcher.undo()
    record[f"{package}.b"] = fingerprint.build_record([f"{package}.b:{n}" for n in NAMES])[f"{package}.b"]
    patcher.apply([extra])
    assert states(patcher)["extra"] == "on"
    assert load(package, "b").function() == "own extra"
    patcher.undo()


def test_nothing_is_applied_beside_another_vllm(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def another() -> str:
        raise VersionError("another")

    monkeypatch.setattr(patch_engine, "require_supported", another)
    a = load(package)
    one = patch("one", Edit(f"{package}.a:function", say("one")))
    with pytest.raises(VersionError):
        Patcher([one]).apply([one])
    assert a.function() == "own"


def test_any_error_at_the_start_undoes_the_call_alone(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a = load(package)
    one, two = (patch(n, Edit(f"{package}.a:function", say(n))) for n in ("one", "two"))
    patcher = Patcher([one, two])
    patcher.apply([one])

    def interrupted(_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(patcher, "_hook", interrupted)
    with pytest.raises(KeyboardInterrupt):
        patcher.apply([one, two])
    assert a.function() == "own one"
    assert states(patcher) == {"one": "on", "two": "not applied"}
    patcher.undo()


def test_a_late_failure_is_kept_and_raised(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the ``vllm`` command as one line; the patch that fails first is the one that is named."""
    edits = [Edit(f"{package}.b:{n}", say("x"), adds=True) for n in ("function", "VALUE")]
    fits = patch("fits", Edit(f"{package}.b:Owner.method", say("fits")))
    patcher = Patcher([patch("first", edits[0]), patch("second", edits[1]), fits])
    patcher.apply(patcher.known)
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(TargetError, match="the patch first cannot"):
        load(package, "b")
    assert states(patcher) == {"first": "failed", "second": "failed", "fits": "on"}
    assert "the patch first cannot" in str(failure.first())
    patcher.undo(patcher.known[:1])
    assert states(patcher) == {"first": "not applied", "second": "failed", "fits": "on"}
    assert failure.first() is not None
    patcher.undo()
    assert set(states(patcher).values()) == {"not applied"}
    assert failure.first() is None


def test_a_convenience_patch_comes_off_whole(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch_engine.logger, "warning", lambda *_: None)
    a = load(package)
    edits = [Edit(f"{package}.a:{n}", say("x")) for n in ("function", "Owner.method")]
    gone = Edit(f"{package}.a:VALUE", say("x"), adds=True)
    last = Edit(f"{package}.a:Owner.static", say("x"))
    patcher = Patcher([patch("extra", edits[0], gone, edits[1], group=Group.CONVENIENCE), patch("needed", last)])
    patcher.apply(patcher.known)
    assert (a.function(), a.Owner().method(), a.Owner.static()) == ("own", "own", "own x")
    assert states(patcher) == {"extra": "left out", "needed": "on"}
    patcher.undo()
    assert states(patcher) == {"extra": "not applied", "needed": "not applied"}


def test_switches(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a = load(package)
    one = patch("one", Edit(f"{package}.a:function", say("one")))
    two = patch("two", Edit(f"{package}.a:Owner.method", say("two")), needs=("one",))
    three = patch("three", Edit(f"{package}.a:Owner.static", say("three")), group=Group.CONVENIENCE)
    patcher = Patcher([one, two, three])
    patcher.check_environment()
    monkeypatch.setenv("VLLM_GEMMA4_SPEC_PATCH_ONE", "0")
    for call in (patcher.check_environment, patcher.apply):
        with pytest.raises(
            SettingError, match=r"^VLLM_GEMMA4_SPEC_PATCH_ONE=0: the patch two needs one; unset it, or set"
        ):
            call()
    monkeypatch.setenv("VLLM_GEMMA4_SPEC_PATCH_TWO", "0")
    patcher.check_environment()
    assert states(patcher) == {"one": "off", "two": "off", "three": "not applied"}
    patcher.apply()
    assert states(patcher) == {"one": "off", "two": "off", "three": "on"}
    assert patcher.missing_correctness() == ["one", "two"]
    assert (a.function(), a.Owner().method(), a.Owner.static()) == ("own", "own", "own three")
    patcher.undo()
    monkeypatch.setenv("VLLM_GEMMA4_SPEC", "0")
    monkeypatch.delenv("VLLM_GEMMA4_SPEC_PATCH_TWO")
    patcher.check_environment()  # which patches need which is no matter where all are off
    patcher.apply()
    assert set(states(patcher).values()) == {"off"}
    monkeypatch.delenv("VLLM_GEMMA4_SPEC")
    monkeypatch.delenv("VLLM_GEMMA4_SPEC_PATCH_ONE")
    patcher.passed_over.add("three")
    patcher.apply()
    assert states(patcher) == {"one": "on", "two": "on", "three": "not applied"}
    assert patcher.missing_correctness() == []
    patcher.undo()
    for name, value in (("VLLM_GEMMA4_SPEC_PATCH_ONNE", "0"), ("VLLM_GEMMA4_SPEC", "0")):
        monkeypatch.setenv(name, value)
        for call in (patcher.check_environment, patcher.apply):
            with pytest.raises(SettingError, match="VLLM_GEMMA4_SPEC_PATCH_ONNE: no such patch switch"):
                call()


def test_a_patch_that_the_patcher_does_not_know_has_a_status_while_it_is_on(package: str) -> None:
    load(package)
    patcher = Patcher([])
    one = patch("one", Edit(f"{package}.a:function", say("one")))
    patcher.apply([one])
    assert states(patcher) == {"one": "on"}
    patcher.undo()
    assert states(patcher) == {}


def test_undo_names_what_stands_on_top_and_changes_nothing(package: str) -> None:
    a = load(package)
    edits = (Edit(f"{package}.a:function", say("x")), Edit(f"{package}.a:Owner.method", say("x")))
    patcher = Patcher([patch("x", *edits)])
    patcher.apply(patcher.known)
    ours, a.function = a.function, lambda: "theirs"
    with pytest.raises(PatchStateError, match=rf"^{package}\.a:function was replaced again .*; undo that first$"):
        patcher.undo()
    assert (a.function(), a.Owner().method()) == ("theirs", "own x")
    assert states(patcher) == {"x": "on"}
    a.function = ours
    patcher.undo()
    assert (a.function(), a.Owner().method()) == ("own", "own")


def test_a_callback_may_ask_and_other_threads_wait(package: str) -> None:
    load(package)
    one = patch("one", Edit(f"{package}.a:function", say("one")))
    patcher = Patcher([one])
    asked: list[dict[str, str]] = []
    other = threading.Thread(target=lambda: asked.append(states(patcher)))

    def started() -> None:
        if not other.ident:
            other.start()
            other.join(0.05)
            assert other.is_alive()
            patcher.status()

    patcher.on_change.append(started)
    patcher.apply([one])
    other.join(10)
    assert asked == [{"one": "on"}]
    patcher.undo()
