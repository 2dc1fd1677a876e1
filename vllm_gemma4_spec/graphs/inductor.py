"""How torch.compile makes the small kernels of a draft model.

A draft pass runs some 300 kernels of 1 to 3 us each, norms and activations between the products. Programmatic
dependent launch lets each of them start while the one before ends, and a reduction over one hidden state
(2,560 values) is read once instead of once per sum.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._inductor import config
from torch._inductor.choices import InductorChoices

# A row of this many values is kept in registers; Inductor's own limit is 1,024.
_LONGEST_ROW = 8192
_PDL = "triton.enable_pdl"


class Choices(InductorChoices):
    """Inductor's choices, with longer persistent reductions where :func:`get_model` compiles a draft model."""

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
    """``DraftModelProposer._get_model``: the compiler of the model made meanwhile gets these settings.

    vLLM's backend copies ``inductor_compile_config`` when the model is made and compiles at its first pass.
    """

    @functools.wraps(original)
    def wrapper(self: Any) -> Any:
        # Inductor has programmatic dependent launch from Hopper on.
        if self.device.type != "cuda" or torch.cuda.get_device_capability(self.device) < (9, 0):
            return original(self)
        settings = self.vllm_config.compilation_config.inductor_compile_config
        if _PDL in settings:  # the user's choice, for target and drafter
            return original(self)
        if config.inductor_choices_class is None:
            config.inductor_choices_class = Choices  # for the process; it differs under _PDL only
        settings[_PDL] = True
        try:
            return original(self)
        finally:
            del settings[_PDL]

    return wrapper
