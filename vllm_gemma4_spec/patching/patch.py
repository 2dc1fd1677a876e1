"""What a patch is. Declarations live in ``vllm_gemma4_spec/patches``; nothing here imports vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from vllm_gemma4_spec.patching import fingerprint


class Group(str, Enum):
    """Correctness patches are applied all or none; a convenience patch may be missing without harm."""

    CORRECTNESS = "correctness"
    CONVENIENCE = "convenience"


@dataclass(frozen=True)
class Edit:
    """One attribute of vLLM that gets something else in its place.

    Symbols are written ``package.module:Class.attribute``.

    Attributes:
        target: the attribute that is replaced.
        replacement: ``package.module:function`` of ours; called once with the original, it returns what
            takes its place. Its module is imported only when the target's module has been.
        source: where the target's source stands, if ``target`` is a name imported from elsewhere or an
            attribute inherited from a base class.
        adds: the target does not exist in 0.19.1; the replacement function is called with ``None``.
    """

    target: str
    replacement: str
    source: str | None = None
    adds: bool = False

    @property
    def module(self) -> str:
        return self.target.partition(":")[0]

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
        edits: what it replaces, in order.
        watches: symbols it relies on without replacing them; fingerprinted like targets.
    """

    name: str
    group: Group
    why: str
    how: str
    retire: str
    edits: tuple[Edit, ...]
    watches: tuple[str, ...] = field(default=())

    @property
    def checked_symbols(self) -> tuple[str, ...]:
        """Every symbol whose source must be that of 0.19.1."""
        targets = (e.checked_symbol for e in self.edits)
        return tuple(dict.fromkeys([s for s in targets if s] + list(self.watches)))

    @property
    def fingerprints(self) -> dict[str, str]:
        """Symbol -> fingerprint of its source in 0.19.1."""
        return {s: fingerprint.wanted(s) for s in self.checked_symbols}

    def apply(self) -> None:
        """Apply this patch alone (tests, custom servers); see ``vllm_gemma4_spec.apply`` for all."""
        from vllm_gemma4_spec.patching.engine import PATCHER

        PATCHER.apply([self])

    def undo(self) -> None:
        """Put this patch's originals back."""
        from vllm_gemma4_spec.patching.engine import PATCHER

        PATCHER.undo([self])
