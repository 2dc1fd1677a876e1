"""Applies patches once per process, now or when their modules are imported, and undoes them."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import wrapt

from vllm_gemma4_spec import settings
from vllm_gemma4_spec.errors import Gemma4SpecError, PatchStateError, SettingError, TargetError, stop
from vllm_gemma4_spec.patching import failure, fingerprint
from vllm_gemma4_spec.patching.patch import Edit, Group, Patch
from vllm_gemma4_spec.patching.version import require_supported

MISSING: Any = object()
logger = logging.getLogger("vllm.plugins.gemma4_spec")


@dataclass(frozen=True)
class PatchStatus:
    """What became of a patch in this process.

    Attributes:
        state: ``on`` (all targets replaced), ``waiting`` (some of their modules are not imported yet), ``left out`` (a
            convenience patch that could not be applied), ``failed`` (a correctness patch that could not: the process
            ends before an engine is made), ``off`` (switched off) or ``not applied``.
        replaced: targets that are replaced now.
    """

    name: str
    group: str
    state: str
    targets: tuple[str, ...]
    switch: str
    replaced: tuple[str, ...] = ()


@dataclass
class _Applied:
    """One edit in force: what stood there (MISSING: inherited or absent) and what stands there now."""

    edit: Edit
    owner: Any
    attribute: str
    original: Any
    replacement: Any

    def revert(self) -> None:
        if self.original is MISSING:
            delattr(self.owner, self.attribute)
        else:
            setattr(self.owner, self.attribute, self.original)


def _check_on_top(off: Sequence[_Applied]) -> None:
    """Nothing else stands on a target whose edits ``off``, last applied first, are to be reverted.

    Raises:
        PatchStateError: names the target.
    """
    after: dict[tuple[int, str], Any] = {}  # of those before it
    for applied in off:
        place = (id(applied.owner), applied.attribute)
        now = after.get(place, vars(applied.owner).get(applied.attribute, MISSING))
        if now is not applied.replacement:
            raise PatchStateError(f"{applied.edit.target} was replaced again after this package did; undo that first")
        after[place] = applied.original


def _resolve(module: ModuleType, qualname: str) -> tuple[Any, str]:
    *path, attribute = qualname.split(".")
    return functools.reduce(getattr, path, module), attribute


def _check_live(edit: Edit, original: Any) -> None:
    """A function must still come from its own module's file: someone else may have replaced it."""
    symbol = edit.checked_symbol
    function = original.__func__ if isinstance(original, (staticmethod, classmethod)) else original
    if symbol is None or not inspect.isfunction(function):
        return
    code = inspect.unwrap(function).__code__
    path = fingerprint.source_file(symbol.partition(":")[0])
    ours = code.co_filename.startswith(os.path.dirname(os.path.dirname(__file__)) + os.sep)
    if not ours and (path is None or os.path.realpath(code.co_filename) != os.path.realpath(path)):
        raise TargetError(
            f"{edit.target} was replaced before this package could patch it: found {function.__module__}."
            f"{function.__qualname__}, wanted the function of vLLM 0.19.1; remove the other patch or set "
            "VLLM_GEMMA4_SPEC=0"
        )


class Patcher:
    """Applies and undoes ``known``, in their order. A process has one: ``vllm_gemma4_spec.registry.PATCHER``."""

    def __init__(self, known: Sequence[Patch]) -> None:
        self.known = tuple(known)
        self._lock = threading.RLock()
        self._patches: list[Patch] = []  # enabled, in the order they are applied
        self._applied: list[_Applied] = []
        self._hooked: set[str] = set()
        self._left_out: set[str] = set()  # convenience patches that could not be applied
        self._failed: set[str] = set()  # correctness patches that could not
        self.passed_over: set[str] = set()  # names that `apply()` takes for switched off; for tests
        self.on_change: list[Callable[[], None]] = []  # called after patches went on or off

    def apply(self, patches: Sequence[Patch] | None = None) -> None:
        """Apply ``patches`` (default: all that are switched on); those in force already are left alone.

        Everything is checked before anything is changed. Correctness patches are applied all or none: if one does not
        fit, all of this call's are undone. A convenience patch that does not fit is left out with a warning.

        Raises:
            SettingError: a switch leaves out a patch that another one needs.
        """
        with self._lock:
            if patches is None:
                patches = self._switched_on()
            new = [p for p in patches if p not in self._patches and p.name not in self._left_out]
            if not new:
                return
            version = require_supported()
            needed = [p for p in new if p.group is Group.CORRECTNESS]
            fingerprint.check([s for p in needed for s in p.checked_symbols], version)
            for patch in (p for p in new if p.group is not Group.CORRECTNESS):
                try:
                    fingerprint.check(patch.checked_symbols, version)
                except TargetError as error:
                    self._leave_out(patch, error)
            new = [p for p in new if p.name not in self._left_out]
            self._patches += new
            try:
                for module in dict.fromkeys(e.module for p in new for e in p.edits):
                    if (imported := sys.modules.get(module)) is not None:
                        self._apply_edits(imported)
                    self._hook(module)
            except BaseException:
                self.undo(new)
                raise

    def check_environment(self) -> None:
        """
        Raises:
            SettingError: a variable is unknown or unreadable, or a switch leaves out what another patch needs.
        """
        settings.check_environment([p.name for p in self.known])
        if settings.ALL.on():
            self._switched_on()

    def _switched_on(self) -> list[Patch]:
        names = [p.name for p in self.known]
        settings.check_environment(names)
        if not settings.ALL.on():
            return []
        off = {n for n in names if not settings.patch_switch(n).on()}
        on = [p for p in self.known if p.name not in off]
        for patch in on:
            for name in patch.needs:
                if name in off:
                    raise SettingError(
                        f"{settings.patch_switch(name).name}=0: the patch {patch.name} needs {name}; unset it, or set "
                        f"{settings.patch_switch(patch.name).name}=0 as well"
                    )
        return [p for p in on if p.name not in self.passed_over]

    def _leave_out(self, patch: Patch, error: Exception) -> None:
        """Go on without a convenience patch: what of it is on comes off."""
        if patch in self._patches:
            self.undo([patch])
        self._left_out.add(patch.name)
        logger.warning("vllm-gemma4-spec: the patch %s is left out, answers stay right: %s", patch.name, error)

    def _hook(self, module: str) -> None:
        if module not in self._hooked:
            self._hooked.add(module)
            wrapt.register_post_import_hook(self._apply_module, module)

    def _apply_module(self, module: ModuleType) -> None:
        """Apply every enabled edit of ``module`` that is not in force. wrapt calls it after an import.

        If a correctness patch fails here, long after the start, what is on stays on (engines may use it already), the
        importer gets the error, and where it swallows that, the next gate ends the process (``failure.py``).
        """
        with self._lock:
            try:
                self._apply_edits(module)
            except Gemma4SpecError as error:
                failure.keep(error)
                stop(error)

    def _apply_edits(self, module: ModuleType) -> None:
        done = {id(a.edit) for a in self._applied}
        todo = [
            (patch, edit)
            for patch in self._patches
            for edit in patch.edits
            if edit.module == module.__name__ and id(edit) not in done
        ]
        error: Gemma4SpecError | None = None
        for patch, edit in todo:
            if patch.name in self._left_out:
                continue
            try:
                self._applied.append(self._apply_edit(edit, module))
            except Exception as raised:
                text = raised if isinstance(raised, Gemma4SpecError) else f"{type(raised).__name__}: {raised}"
                wrong = TargetError(f"{edit.target}: the patch {patch.name} cannot be applied: {text}")
                wrong.__cause__ = raised
                if patch.group is Group.CONVENIENCE:
                    self._leave_out(patch, wrong)
                else:
                    self._failed.add(patch.name)
                    error = error or wrong
        if error is not None:
            raise error
        if todo:
            self._tell()

    def _apply_edit(self, edit: Edit, module: ModuleType) -> _Applied:
        owner, attribute = _resolve(module, edit.target.partition(":")[2])
        own = vars(owner).get(attribute, MISSING)
        original = own if own is not MISSING else inspect.getattr_static(owner, attribute, MISSING)
        if edit.adds != (original is MISSING):
            raise TargetError(f"{edit.target} {'exists already' if edit.adds else 'is gone'}; wanted vLLM 0.19.1")
        if not edit.adds:
            _check_live(edit, original)
        replacement = edit.wrapper(None if edit.adds else original)
        setattr(owner, attribute, replacement)
        return _Applied(edit, owner, attribute, own, vars(owner)[attribute])

    def undo(self, patches: Sequence[Patch] | None = None) -> None:
        """Put the originals of ``patches`` (default: all) back, last applied first.

        Raises:
            PatchStateError: something else was put on top of a target since; all patches are on as before.
        """
        with self._lock:
            chosen = list(self._patches if patches is None else patches)
            edits = {id(e) for p in chosen for e in p.edits}
            # Patches share targets: those on top of an undone one come off with it and go back on without it.
            targets = {e.target for p in chosen for e in p.edits}
            off = [a for a in self._applied if a.edit.target in targets]
            _check_on_top(off[::-1])  # before any is undone: all stay or none
            for applied in reversed(off):
                applied.revert()
                self._applied.remove(applied)
            self._patches = [p for p in self._patches if p not in chosen]
            self._failed -= {p.name for p in chosen}
            if not self._patches:
                failure.forget()
            if patches is None:
                self._left_out.clear()
            for edit in (a.edit for a in off if id(a.edit) not in edits):
                self._applied.append(self._apply_edit(edit, sys.modules[edit.module]))
            self._tell()

    def _tell(self) -> None:
        for callback in self.on_change:
            callback()

    def status(self) -> list[PatchStatus]:
        """One entry per known patch."""
        with self._lock:
            done = {id(a.edit) for a in self._applied}
            out = []
            marked = {**dict.fromkeys(self._left_out, "left out"), **dict.fromkeys(self._failed, "failed")}
            for patch in dict.fromkeys([*self.known, *self._patches]):
                switch = settings.patch_switch(patch.name)
                if patch.name in marked:
                    state = marked[patch.name]
                elif patch in self._patches:
                    state = "on" if all(id(e) in done for e in patch.edits) else "waiting"
                else:
                    state = "not applied" if settings.ALL.on() and switch.on() else "off"
                targets = tuple(e.target for e in patch.edits)
                replaced = tuple(e.target for e in patch.edits if id(e) in done)
                out.append(PatchStatus(patch.name, patch.group.value, state, targets, switch.name, replaced))
            return out

    def missing_correctness(self) -> list[str]:
        """Correctness patches that a switch leaves out while others are on."""
        return [s.name for s in self.status() if s.group == Group.CORRECTNESS.value and s.state == "off"]
