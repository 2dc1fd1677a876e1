"""Counts dropped drafts: those of steps near the maximum length, in which vLLM does not run the drafter."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm.distributed import get_tp_group

from vllm_gemma4_spec import scope
from vllm_gemma4_spec.metrics import reports


def propose_draft_token_ids(original: Callable[..., Any]) -> Callable[..., Any]:
    """``GPUModelRunner.propose_draft_token_ids``: notes that this step drafts.

    Patch: ``skipped-drafts``. Evidence: ``tests/metrics/test_reports.py::test_stock_counts_no_dropped_draft``. Related
    upstream change: none found.
    """

    @functools.wraps(original)
    def propose_draft_token_ids(self: Any, *args: Any, **kwargs: Any) -> Any:
        if scope.gemma4_speculation(self.vllm_config):
            self.gemma4_spec_drafted = True
        return original(self, *args, **kwargs)

    return propose_draft_token_ids


def sample_tokens(original: Callable[..., Any]) -> Callable[..., Any]:
    """``GPUModelRunner.sample_tokens``: counts a step that samples and does not draft; 0.19.1 counts none.

    Patch: ``skipped-drafts``. Evidence: ``tests/metrics/test_reports.py::test_stock_counts_no_dropped_draft``. Related
    upstream change: none found.
    """

    @functools.wraps(original)
    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        if not scope.gemma4_speculation(self.vllm_config):
            return original(self, grammar_output)
        samples = self.execute_model_state is not None
        self.gemma4_spec_drafted = False
        output = original(self, grammar_output)
        if samples and not self.gemma4_spec_drafted and get_tp_group().rank_in_group == 0:
            reports.count("drafts_skipped", self.input_batch.num_reqs)
        return output

    return sample_tokens
