"""Compiled graphs of a drafter are kept under a key that the drafter is part of."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import fx

from vllm_gemma4_spec import scope


def compiled(original: Callable[..., Any]) -> Callable[..., Any]:
    """``VllmBackend.__call__``: a drafter's folder is found by its own configuration, not taken from the target.

    Target and drafter share the ``CompilationConfig`` in which the first of them leaves its folder. A folder that the
    user chose stays.

    Patch: ``draft-graph-key``. Evidence:
    ``tests/performance/test_draft_graph_key.py::test_stock_runs_the_graph_of_the_drafter_before``. Related upstream
    change: #53366, open: the number of drafts is no part of the key either; #17662, closed: a head has the target's.
    """

    @functools.wraps(original)
    def wrapper(self: Any, graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        config = self.compilation_config
        targets = config.cache_dir
        if not scope.drafters_graph(self) or not _vllms(targets):
            return original(self, graph, example_inputs)
        config.cache_dir = ""
        try:
            return original(self, graph, example_inputs)
        finally:
            config.cache_dir = targets

    return wrapper


def _vllms(folder: str) -> bool:
    """Whether vLLM has named this folder itself."""
    import vllm.envs

    return bool(folder) and Path(folder).parent == Path(vllm.envs.VLLM_CACHE_ROOT) / "torch_compile_cache"
