"""The doctor: one finding per fact about this environment and, if asked, about a running server."""

from __future__ import annotations

import sys

from vllm_gemma4_spec.ops.doctor import here
from vllm_gemma4_spec.ops.doctor.findings import Finding, Report, State
from vllm_gemma4_spec.ops.doctor.running import running

__all__ = ["Finding", "Report", "State", "examine"]


def examine(url: str | None = None, api_key: str | None = None, workers: int | None = None) -> Report:
    """All findings, in the order they are printed.

    Raises:
        ServerError: ``url`` was given and no vLLM server answers there.
    """
    asked = list(running(url, api_key, workers)) if url else []  # first: a wrong address is said at once
    findings = [*here.versions(), *here.plugin(), *here.device(), *here.patches(), *here.environment(), *asked]
    healthy = all(f.state is not State.PROBLEM for f in findings)
    return Report(healthy=healthy, python=sys.prefix, findings=findings)
