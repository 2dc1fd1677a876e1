"""The choice of experts of 26B-A4B as one kernel."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor

logger = logging.getLogger("vllm.plugins.gemma4_spec")


class OneKernel:
    """A ``custom_routing_function`` that runs one kernel on a GPU, and vLLM's own function elsewhere.

    Args:
        own: vLLM's.
        scales: the experts' ``per_expert_scale``.
    """

    def __init__(self, own: Callable[..., tuple[Tensor, Tensor]], scales: Tensor) -> None:
        self.own, self.scales = own, scales
        self.works: bool | None = None  # not tried yet

    def __call__(
        self, hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool
    ) -> tuple[Tensor, Tensor]:
        if self.works is not False and gating_output.is_cuda:
            from vllm_gemma4_spec.kernels.routing import route

            try:
                found = route(gating_output, self.scales, topk)
            except Exception as error:  # of Triton's compiler, which raises anything
                if self.works:
                    raise
                logger.info("Experts are chosen by vLLM's own function: %s", f"{error}".partition("\n")[0])
                self.works = False
            else:
                self.works = True
                return found
        return self.own(hidden_states, gating_output, topk, renormalize)


def moe_init(original: Callable[..., None]) -> Callable[..., None]:
    """``Gemma4MoE.__init__``: then its experts are chosen by :class:`OneKernel`.

    Patch: ``expert-routing``. Evidence:
    ``tests/performance/test_expert_routing.py::test_stock_chooses_with_pytorchs_functions``. Related upstream change:
    none found.
    """

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        router = self.experts.router
        router.custom_routing_function = OneKernel(router.custom_routing_function, self.per_expert_scale)

    return wrapper
