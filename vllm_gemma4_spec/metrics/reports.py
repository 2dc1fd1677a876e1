"""Each process of a server writes its patches and counters; the API server shows them all at ``/metrics``.

vLLM 0.19.1 serves the API server's own Prometheus registry, which neither the engine core nor a worker can
reach. So every process keeps a small file in a folder that the first of them made (its name is inherited
through the environment), and a collector in the API server reads the files of living processes.

With ``--api-server-count`` above 1 vLLM's ``/metrics`` reads the files of prometheus_client's multiprocess mode
instead; there, a route in front of it shows both, and each API server the metrics of all processes.

Why not these files always: prometheus_client writes them where ``PROMETHEUS_MULTIPROC_DIR`` says, for every metric of
the process, and vLLM takes the variable for its own switch. Its ``/metrics`` would lose ``process_*`` and ``python_*``.
They are also mapped into memory: once their folder was removed, nothing that is counted afterwards is seen again, while
a report is written anew (``tests/metrics/test_reports.py`` shows both).
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vllm_gemma4_spec._version import __version__
from vllm_gemma4_spec.metrics import server_info

# Not VLLM_…: vLLM would make a name that differs in every run part of its compile cache key.
FOLDER = "GEMMA4_SPEC_REPORTS"

_METRICS_MODULE = "vllm.entrypoints.serve.instrumentator.metrics"
_registered: list[Any] = []
_report: dict[str, Any] = {}  # what this process wrote last
_patches_here: Callable[[], Sequence[Any]] = tuple  # the PatchStatus of every patch, once announced

# Counters beside vLLM's own: name -> help, its label (may be none) and the label's values. Others are never shown.
COUNTERS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "nan_blocks_repaired": (
        "NaN block scales of NVFP4 weights repaired at load: saturated (codes intact) or zeroed (codes destroyed).",
        "repair",
        ("saturated", "zeroed"),
    ),
    "drafts_skipped": (
        "Drafts (one per request and step) not made, because the batch was near the maximum length.",
        "",
        ("",),
    ),
    "drafts_left_out": (
        "Draft tokens that adaptive k did not make; vLLM counts them as drafted and rejected.",
        "",
        ("",),
    ),
}
_counts: dict[str, dict[str, int]] = {name: dict.fromkeys(values, 0) for name, (_, _, values) in COUNTERS.items()}


def process_name() -> str:
    """``APIServer``, ``EngineCore``, ``VllmWorker-0``, …: the name vLLM gave this process."""
    name = multiprocessing.current_process().name
    if name != "MainProcess":
        return name
    return "APIServer" if _METRICS_MODULE in sys.modules else "main"


def _folder() -> Path:
    """The folder of this server's reports; the first process makes it and removes it at its end.

    One that was removed meanwhile (some systems clean their temporary folder) is made again under the same name, which
    all processes of the server know.

    Raises:
        OSError: it cannot be made, or belongs to another user.
    """
    known = os.environ.get(FOLDER, "")
    if known:
        os.makedirs(known, mode=0o700, exist_ok=True)
        if os.stat(known).st_uid != os.getuid():
            raise PermissionError(f"{known} belongs to another user")
        return Path(known)
    folder, owner = tempfile.mkdtemp(prefix="gemma4-spec-"), os.getpid()
    os.environ[FOLDER] = folder

    def remove() -> None:
        if os.getpid() == owner:  # a forked child inherits the exit handler
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return Path(folder)


def write() -> None:
    """Write this process's report. A disk that is full or a folder that is gone stops no server."""
    _report.update(
        pid=os.getpid(),
        process=process_name(),
        version=__version__,
        patches={s.name: s.state for s in _patches_here()},
        counts=_counts,
        started=_started(os.getpid()),
    )
    _save()


def _save() -> None:
    with contextlib.suppress(OSError):
        path = _folder() / f"{os.getpid()}.json"
        scratch = path.with_suffix(".part")
        scratch.write_text(json.dumps(_report))
        scratch.replace(path)


def count(name: str, more: int, label: str = "") -> None:
    """Add ``more`` to this process's ``gemma4_spec_<name>_total``; it writes a small file (some 0.2 ms)."""
    if more:
        values = _counts.setdefault(name, {})
        values[label] = values.get(label, 0) + more
        _save() if _report.get("pid") == os.getpid() else write()  # a forked child has its parent's report


def announce(status: Callable[[], Sequence[Any]], on_change: list[Callable[[], None]]) -> None:
    """Report now and after every change of the patches; in an API server, show all reports at ``/metrics``.

    Args:
        status: gives the ``PatchStatus`` of every patch in this process.
        on_change: functions called after a change of the patches; this module's is added.
    """
    import wrapt

    global _patches_here
    _patches_here = status
    if write not in on_change:
        on_change.append(write)
        wrapt.register_post_import_hook(_register, _METRICS_MODULE)
    write()


def _register(_module: Any) -> None:
    from prometheus_client import REGISTRY

    if not _registered:
        _registered.append(Collector())
        REGISTRY.register(_registered[0])
        write()  # the process's name is known now


def attach_router(original: Callable[[Any], None]) -> Callable[[Any], None]:
    """``attach_router``: where vLLM's ``/metrics`` reads multiprocess files alone, one that shows our metrics, too.

    Patch: ``server-figures``. Evidence:
    ``tests/metrics/test_api_servers.py::test_stock_shows_what_the_files_hold_and_no_more``. Related upstream change:
    none found.
    """

    @functools.wraps(original)
    def wrapper(app: Any) -> None:
        original(app)
        server_info.remember(app)
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return  # it serves the process's own registry, which has the collector
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
        from starlette.responses import Response
        from starlette.routing import Route
        from vllm.v1.metrics.prometheus import get_prometheus_registry

        registry = get_prometheus_registry()
        registry.register(Collector())

        def metrics(_request: Any) -> Response:
            return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

        app.routes.insert(0, Route("/metrics", metrics))

    return wrapper


def _started(pid: int) -> float | None:
    """When a process that runs now was started; None if there is none, or only what it left for its parent."""
    import psutil  # vLLM needs it too

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.Error:
        return None


def _relatives() -> set[int] | None:
    """Ids of the processes that this one's starter started, and its own; None where that cannot be told any more."""
    import psutil

    starter = multiprocessing.parent_process()  # of one API server among several, whose siblings are the engine cores
    try:
        root = psutil.Process(starter.pid if starter else None)
        return {root.pid, *(child.pid for child in root.children(recursive=True))}
    except psutil.Error:  # the starter is gone: whoever reports to this folder belongs to this server
        return None


def living() -> Iterator[dict[str, Any]]:
    """Reports of this server's processes that still run, in the order of their ids; unreadable ones are left out."""
    try:
        if not (_folder() / f"{os.getpid()}.json").exists():
            write()  # the folder was removed
        files = sorted(_folder().glob("*.json"), key=lambda file: (len(file.stem), file.stem))
    except OSError:
        return
    relatives = _relatives()
    for file in files:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            report = json.loads(file.read_text())
            pid = int(report["pid"])
            if (relatives is None or pid in relatives) and _started(pid) == report["started"]:
                yield report


class Collector:
    """``gemma4_spec_process``, ``gemma4_spec_patch_on`` and the :data:`COUNTERS`, labelled by process and pid, and
    ``gemma4_spec_server`` with the labels of :mod:`.server_info`.

    A patch whose modules a process has not imported is *waiting*: it will be in force as soon as they are,
    so it counts as on.
    """

    def collect(self) -> Iterable[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        own = ["process", "pid"]
        info = GaugeMetricFamily(
            "gemma4_spec_process",
            "A process of this server that runs vllm-gemma4-spec (always 1).",
            labels=[*own, "version"],
        )
        on = GaugeMetricFamily(
            "gemma4_spec_patch_on", "1: the patch is in force in that process.", labels=[*own, "patch"]
        )
        counters = {
            name: CounterMetricFamily(f"gemma4_spec_{name}", text, labels=[*own, label] if label else own)
            for name, (text, label, _) in COUNTERS.items()
        }
        for report in living():
            process = [report["process"], str(report["pid"])]
            info.add_metric([*process, report["version"]], 1)
            for name, state in report["patches"].items():
                on.add_metric([*process, name], float(state in ("on", "waiting")))
            for name, (_, _, labels) in COUNTERS.items():  # a report may have others, or lack some
                for label in labels:
                    value = report["counts"].get(name, {}).get(label, 0)
                    counters[name].add_metric([*process, label] if label else process, value)
        server = GaugeMetricFamily("gemma4_spec_server", "What this server runs (always 1).", labels=server_info.LABELS)
        runs = server_info.labels()
        if runs is not None:
            server.add_metric([runs[name] for name in server_info.LABELS], 1)
        return [info, on, server, *counters.values()]
