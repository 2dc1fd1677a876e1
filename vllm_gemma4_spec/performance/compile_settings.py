"""How torch.compile makes the small kernels of a decode step, of the target and of a draft model.

A step of 31B runs some 500 kernels of 1 to 4 us between its GEMMs, a draft pass 300: norms, rotary, activations.
Programmatic dependent launch lets each of them start while the one before ends, and a GEMM fetch its first weights
while a norm runs; a reduction over one hidden state (2,560 to 5,376 values) is read once instead of once per sum.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._inductor import config
from torch._inductor.choices import InductorChoices

from vllm_gemma4_spec import scope

# A row of this many values is kept in registers; Inductor's own limit is 1,024.
_LONGEST_ROW = 8192
_PDL = "triton.enable_pdl"


class LaunchChoices(InductorChoices):
    """Inductor's choices, with longer persistent reductions where a model is compiled with our settings, and kernels
    that let the next one start before they wait for the one before."""

    def triton_kernel_kwargs(
        self, kernel_cls: type[Any], features: Any, groups: list[Any], kernel_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        launch_early(kernel_cls)  # asked for before any kernel is written
        return super().triton_kernel_kwargs(kernel_cls, features, groups, kernel_kwargs)

    def should_use_persistent_reduction(self, features: Any, cooperative_reduction: bool) -> bool:
        if super().should_use_persistent_reduction(features, cooperative_reduction):
            return True
        from torch._inductor.runtime.hints import ReductionHint
        from torch._inductor.virtualized import V

        return (
            config.triton.enable_pdl
            and config.triton.persistent_reductions
            and not cooperative_reduction
            and features.get_reduction_hint() == ReductionHint.INNER
            and V.graph.sizevars.statically_known_leq(features.reduction_numel, _LONGEST_ROW)
        )


def get_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """``DraftModelProposer._get_model``: Inductor asks :class:`LaunchChoices`, before target or drafter are compiled.

    The class is part of the key of every compiled graph, so a second start must set it at the same time as the first.

    Patch: ``draft-compile``. Evidence:
    ``tests/performance/test_draft_compile.py::test_stock_compiles_a_drafter_as_the_target``. Related upstream change:
    none found.
    """

    @functools.wraps(original)
    def wrapper(self: Any) -> Any:
        if scope.gemma4_drafter(self.vllm_config):
            use_choices()
        return original(self)

    return wrapper


def vllm_config(original: Callable[..., None]) -> Callable[..., None]:
    """``VllmConfig.__post_init__``: the settings of an engine whose target is a Gemma 4, and so the key of its graphs.

    Patch: ``target-compile``. Evidence:
    ``tests/performance/test_target_compile.py::test_stock_compiles_a_target_without_dependent_launch``. Related
    upstream change: none found.
    """

    @functools.wraps(original)
    def __post_init__(self: Any) -> None:
        original(self)
        if scope.gemma4_model(self.model_config) and card_takes_pdl():
            self.compilation_config.inductor_compile_config.setdefault(_PDL, True)  # what a user set stays

    return __post_init__


def target_backend(original: Callable[..., None]) -> Callable[..., None]:
    """``VllmBackend.__init__``: Inductor asks :class:`LaunchChoices` before anything of such an engine is compiled.

    Patch: ``target-compile``. Evidence:
    ``tests/performance/test_target_compile.py::test_stock_compiles_a_target_without_dependent_launch``. Related
    upstream change: none found.
    """

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if scope.gemma4_engine(self.vllm_config) and self.inductor_config.get(_PDL):
            use_choices()

    return wrapper


def _before_load(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def wrapper(self: Any, wait_buffer: Any) -> None:
        if _ours() and self._load_index == 0:  # the first load; the original writes the wait behind this line
            (self.body if self.inside_reduction else wait_buffer).writeline("tl.extra.cuda.gdc_launch_dependents()")
        original(self, wait_buffer)

    return wrapper


def _after_load(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def wrapper(self: Any, *args: Any) -> None:
        if not _ours():
            original(self, *args)

    return wrapper


def _codegen_body(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def wrapper(self: Any) -> None:
        if _ours() and self._load_index == 0 and (self.stores or self.post_loop_store):
            self.loads.writeline("tl.extra.cuda.gdc_wait()")
        original(self)

    return wrapper


def _before_access(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def wrapper(self: Any, wait_buffer: Any, *dependencies: Any, **how: Any) -> None:
        if not (_ours() and self._enable_pdl_codegen()):
            original(self, wait_buffer, *dependencies, **how)
            return
        # Whatever it reads: the kernel ahead may have let this one start before it waited itself.
        before = self.body if self.inside_reduction and self.range_trees[-1].is_loop else wait_buffer
        before.writeline(self.GDC_LAUNCH)
        before.writeline(self.GDC_WAIT)

    return wrapper


def _filter(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def wrapper(self: Any, code: Any) -> None:
        if not (_ours() and self._enable_pdl_codegen()):
            original(self, code)
            return
        kept: list[Any] = []
        seen: set[str] = set()
        for line in code._lines:
            marks = {m for m in (self.GDC_LAUNCH, self.GDC_WAIT) if isinstance(line, str) and m in line}
            if not marks & seen:
                kept.append(line)
            seen |= marks
        code._lines = kept

    return wrapper


_WRAPPERS = {
    "_handle_pdl_before_load": _before_load,
    "_handle_pdl_after_load": _after_load,
    "codegen_body": _codegen_body,
}
_LATER_WRAPPERS = {  # Inductor 2.11's
    "_handle_pdl_before_access": _before_access,
    "_handle_pdl_after_load": _after_load,
    "_filter_pdl": _filter,
}


def launch_early(kernel_class: type[Any]) -> None:
    """Wrap what writes ``gdc_wait`` before a Triton kernel's first load and ``gdc_launch_dependents`` behind its last.

    A kernel lets the next one start at once instead, which waits where it loads itself: a GEMM's first weights come
    while a norm waits for the GEMM before. A kernel that loads nothing must wait, too: it may write what kernels before
    it still read, and the next one waits for it alone.

    - Inductor 2.10, vLLM 0.19.1's, ends in an assertion where it writes the second line (repaired in 2.11: pytorch PR
      170981).
    - Inductor 2.11 loads what the kernel just ahead did not write before it waits. That is right only while every
      kernel waits before it lets the next one start, which ours do not.

    Any other Inductor's own dependent launch stays as it is.
    """
    for wrappers, known in ((_WRAPPERS, _is_first), (_LATER_WRAPPERS, _is_later)):
        owners = {name: next((c for c in kernel_class.__mro__ if name in vars(c)), None) for name in wrappers}
        found = {name: vars(owner)[name] for name, owner in owners.items() if owner is not None}
        if len(found) < len(wrappers) or any(hasattr(f, "__wrapped__") for f in found.values()):
            continue
        if known(found):
            for name, wrapper in wrappers.items():
                setattr(owners[name], name, wrapper(found[name]))


def _is_first(found: dict[str, Any]) -> bool:
    counts = (found["_handle_pdl_before_load"], found["_handle_pdl_after_load"])
    indexed = all("_load_index" in f.__code__.co_names for f in counts)
    return indexed and "generate" in counts[1].__code__.co_names


def _is_later(found: dict[str, Any]) -> bool:
    names = {name: set(f.__code__.co_names) for name, f in found.items()}
    writes = {"_enable_pdl_codegen", "GDC_WAIT", "writeline"}
    return (
        writes | {"range_trees", "body"} <= names["_handle_pdl_before_access"]
        and writes | {"GDC_LAUNCH"} <= names["_handle_pdl_after_load"]
        and {"GDC_WAIT", "GDC_LAUNCH", "_lines"} <= names["_filter_pdl"]
    )


def _ours() -> bool:
    """Whether what is compiled now is a model of ours, on a card with programmatic dependent launch."""
    return config.inductor_choices_class is LaunchChoices and config.triton.enable_pdl and _takes_pdl()


def use_choices() -> None:
    """Inductor asks :class:`LaunchChoices` from now on."""
    if _takes_pdl() and config.inductor_choices_class is None:
        config.inductor_choices_class = LaunchChoices  # for the process; it differs under _PDL only


def backend(original: Callable[..., None]) -> Callable[..., None]:
    """``VllmBackend.__init__``: the copy of the compiler's settings that a draft model's backend keeps.

    A backend is made with its model, and again where a compiled model is loaded from the cache.

    Patch: ``draft-compile``. Evidence:
    ``tests/performance/test_draft_compile.py::test_stock_compiles_a_drafter_as_the_target``. Related upstream change:
    none found.
    """

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if scope.drafters_graph(self) and _takes_pdl():
            self.inductor_config.setdefault(_PDL, True)  # what a user set stays, for target and drafter

    return wrapper


def mark(config: Any, name: str) -> None:
    """A ``VllmConfig`` says by this name what is compiled into its graphs: ``additional_config`` is part of the key of
    vLLM's cache of them. One that holds something else than a dict stays without."""
    if isinstance(config.additional_config, dict):
        config.additional_config = {**config.additional_config, name: True}


def marked(config: Any, name: str) -> bool:
    """Whether a config, or None, has such a mark."""
    added = getattr(config, "additional_config", None)
    return isinstance(added, dict) and name in added


def card_takes_pdl() -> bool:
    """As :func:`_takes_pdl`, where a process must not touch the card: it may fork, or never compute."""
    from vllm.platforms import current_platform

    return current_platform.is_cuda() and current_platform.has_device_capability(90)


def _takes_pdl() -> bool:
    """Inductor has programmatic dependent launch from Hopper on."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
