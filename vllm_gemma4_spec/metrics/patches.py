"""What a running server shows: docs/how-to/monitor.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_gemma4_spec.patching.patch import Edit, Group, Lazy, Patch

if TYPE_CHECKING:
    from vllm_gemma4_spec.metrics import reports
else:  # a wrapper's module is imported only after the module of vLLM that it patches
    reports = Lazy("vllm_gemma4_spec.metrics.reports")

_METRICS = "vllm.entrypoints.serve.instrumentator.metrics"

SERVER_FIGURES = Patch(
    name="server-figures",
    group=Group.CONVENIENCE,
    why="With --api-server-count above 1, or PROMETHEUS_MULTIPROC_DIR set, /metrics shows what prometheus_client's "
    "multiprocess files hold and nothing else: a plugin's own metrics are missing. "
    "They never say the method, the drafter or the parsers.",
    how="A route in front of vLLM's shows these files and the collector of this package's metrics, which reads the "
    "configuration from the application's state.",
    retire="A release whose /metrics shows what plugins register, whatever the number of API servers.",
    scope="Every server that loads this package: it adds the package's own metrics to vLLM's and changes none of them.",
    related="none found",
    edits=(Edit(f"{_METRICS}:attach_router", reports.attach_router),),
    watches=("vllm.v1.metrics.prometheus:get_prometheus_registry",),
)

PATCHES: tuple[Patch, ...] = (SERVER_FIGURES,)
