"""The doctor: one finding per fact about this environment and, if asked, about a running server."""

from __future__ import annotations

import sys

from vllm_gemma4_spec.ops.doctor import here
from vllm_gemma4_spec.ops.doctor.findings import Finding, Report, State
from vllm_gemma4_spec.ops.doctor.running import PATIENCE, running
from vllm_gemma4_spec.patching.version import vllm_version

__all__ = ["Finding", "Report", "State", "examine"]


def examine(
    url: str | None = None,
    api_key: str | None = None,
    workers: int | None = None,
    speculates: bool = True,
    patience: float = PATIENCE,
) -> Report:
    """All findings, section by section.

    With ``url`` and no vLLM here (a laptop that looks at a server) the server alone is examined.

    Raises:
        ServerError: ``url`` was given and no vLLM server answers there.
    """
    # First: a wrong address is said at once.
    asked = list(running(url, api_key, workers, speculates, patience)) if url else []
    local = [*here.versions(), *here.plugin(), *here.device(), *here.patches(), *here.environment()]
    if url and vllm_version() is None:
        local = [Finding("versions", "vllm", State.NOTE, "not installed here: the server alone was examined")]
    findings = [*local, *asked]
    healthy = all(f.state is not State.PROBLEM for f in findings)
    return Report(healthy=healthy, python=sys.prefix, findings=findings)
