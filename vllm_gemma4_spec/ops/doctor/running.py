"""Which processes of a running server have which patches, from its ``/metrics``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from packaging.version import Version

from vllm_gemma4_spec.ops import server
from vllm_gemma4_spec.ops.doctor.findings import Finding, State
from vllm_gemma4_spec.patching.version import SUPPORTED


def running(url: str, api_key: str | None = None, workers: int | None = None) -> Iterator[Finding]:
    """Which processes of the server at ``url`` have which patches (see :mod:`vllm_gemma4_spec.metrics.reports`).

    Raises:
        ServerError: nothing answers there, or not vLLM.
    """
    section = "server"
    version = server.version(url, api_key)
    fine = Version(version).public == SUPPORTED
    yield Finding(section, "vllm", State.OK if fine else State.PROBLEM, version, SUPPORTED)
    on: dict[tuple[str, str], dict[str, bool]] = defaultdict(dict)
    figures = server.samples(url, api_key)
    for sample in figures:
        key = (sample.labels.get("process", ""), sample.labels.get("pid", ""))
        if sample.name == "gemma4_spec_process":
            on[key] = on[key] or {}
        elif sample.name == "gemma4_spec_patch_on":
            on[key][sample.labels["patch"]] = sample.value == 1
    if not on:
        advice = "pip install vllm-gemma4-spec into the server's environment and look for 'patches on' in its log"
        yield Finding(section, "plugin", State.PROBLEM, "no process reports it", "every process", advice)
        return
    reference = next(iter(on.values()))
    for (name, pid), states in on.items():
        enabled = sorted(patch for patch, state in states.items() if state)
        off = sorted(patch for patch, state in states.items() if not state)
        same = states == reference
        found = f"{len(enabled)} on: {', '.join(enabled)}" + (f"; off: {', '.join(off)}" if off else "")
        advice = "" if same else "not the patches of the other processes: give all of them one environment"
        yield Finding(section, f"{name} ({pid})", State.OK if same else State.PROBLEM, found, advice=advice)
    kinds = [name for name, _ in on]
    if not any(k.startswith("EngineCore") for k in kinds):
        advice = "the engine core runs unpatched, or inside the API server's process"
        yield Finding(section, "EngineCore", State.PROBLEM, "does not report", "reports", advice)
    found_workers = sum(k.startswith("VllmWorker") for k in kinds)
    text = f"{found_workers} report" if found_workers else "none of their own: one runs inside the engine core"
    if workers is None:
        yield Finding(section, "workers", State.NOTE, text, advice="give --workers N (GPUs used) to have it checked")
    elif max(found_workers, 1) == workers:
        yield Finding(section, "workers", State.OK, text, str(workers))
    else:
        advice = "a worker runs without the plugin (read its log), or --workers is not the number of GPUs used"
        yield Finding(section, "workers", State.PROBLEM, text, str(workers), advice)
