"""What a patch is. Each topic declares its own in ``patches.py``; nothing here imports vLLM."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from vllm_gemma4_spec.patching import fingerprint


class Group(str, Enum):
    """Correctness patches are applied all or none; a convenience patch that does not fit is left out with a warning."""

    CORRECTNESS = "correctness"
    CONVENIENCE = "convenience"


@dataclass(frozen=True)
class Symbol:
    """``package.module:name`` of ours, imported when it is called."""

    path: str

    def __getattr__(self, name: str) -> Symbol:
        if name.startswith("__"):
            raise AttributeError(name)
        return Symbol(f"{self.path}.{name}")

    def __call__(self, original: Any) -> Any:
        module, _, name = self.path.partition(":")
        wrapper: Any = functools.reduce(getattr, name.split("."), importlib.import_module(module))
        return wrapper(original)


class Lazy:
    """Stands for a module of ours that is imported only when one of its functions is called.

    Wrappers import vLLM and torch, which a declaration must not. A type checker and an editor see the real
    module, imported under ``TYPE_CHECKING``, so that a wrapper's name in a declaration leads to it.
    """

    def __init__(self, module: str) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Symbol:
        if name.startswith("__"):
            raise AttributeError(name)
        return Symbol(f"{self._module}:{name}")


@dataclass(frozen=True)
class Edit:
    """One attribute of vLLM that gets something else in its place.

    Symbols are written ``package.module:Class.attribute``.

    Attributes:
        target: the attribute that is replaced.
        wrapper: function of ours, through :class:`Lazy`; called once with the original, it returns what takes
            its place. Its module is imported only when the target's module has been.
        source: where the target's source stands, if ``target`` is a name imported from elsewhere or an
            attribute inherited from a base class.
        adds: the target does not exist in 0.19.1; the wrapper is called with ``None``.
    """

    target: str
    wrapper: Callable[..., Any]
    source: str | None = None
    adds: bool = False

    @property
    def module(self) -> str:
        return self.target.partition(":")[0]

    @property
    def replacement(self) -> str:
        """``package.module:function`` of the wrapper."""
        wrapper = self.wrapper
        return wrapper.path if isinstance(wrapper, Symbol) else f"{wrapper.__module__}:{wrapper.__qualname__}"

    @property
    def checked_symbol(self) -> str | None:
        """The symbol whose source is fingerprinted, or None for an attribute that 0.19.1 lacks."""
        return None if self.adds else (self.source or self.target)


@dataclass(frozen=True)
class Patch:
    """One change to vLLM, with everything a reader needs to judge and to retire it.

    Attributes:
        name: kebab-case; its switch is ``VLLM_GEMMA4_SPEC_PATCH_<NAME>``.
        group: see :class:`Group`.
        why: what breaks without it.
        how: what it does instead.
        retire: the upstream change that makes it unnecessary.
        scope: which engines, models or checkpoints it acts on (see :mod:`vllm_gemma4_spec.scope`); for all others the
            original is called with the arguments that were given.
        related: upstream changes about the same thing, with the number of an issue or pull request; or "none found".
        edits: what it replaces, in order.
        watches: symbols it relies on without replacing them; fingerprinted like targets.
        needs: names of patches without which it would be wrong or without effect; a switch that leaves one of them out
            is refused while this patch is on.
    """

    name: str
    group: Group
    why: str
    how: str
    retire: str
    scope: str
    related: str
    edits: tuple[Edit, ...]
    watches: tuple[str, ...] = field(default=())
    needs: tuple[str, ...] = field(default=())

    @property
    def checked_symbols(self) -> tuple[str, ...]:
        """Every symbol whose source must be that of 0.19.1."""
        targets = (e.checked_symbol for e in self.edits)
        return tuple(dict.fromkeys([s for s in targets if s] + list(self.watches)))

    @property
    def fingerprints(self) -> dict[str, str]:
        """Symbol -> fingerprint of its source in 0.19.1."""
        return {s: fingerprint.wanted(s) for s in self.checked_symbols}
