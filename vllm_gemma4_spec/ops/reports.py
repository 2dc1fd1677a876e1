"""Each process of a server writes which patches it has; the API server shows them all at ``/metrics``.

vLLM 0.19.1 serves the API server's own Prometheus registry, which neither the engine core nor a worker can
reach. So every process keeps a small file in a folder that the first of them made (its name is inherited
through the environment), and a collector in the API server reads the files of living processes.

With ``--api-server-count`` above 1 vLLM serves another registry and these figures are missing.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from vllm_gemma4_spec._version import __version__

# Not VLLM_…: vLLM would make a name that differs in every run part of its compile cache key.
FOLDER = "GEMMA4_SPEC_REPORTS"

_METRICS_MODULE = "vllm.entrypoints.serve.instrumentator.metrics"
_registered: list[Any] = []
_figures: dict[str, float] = {}


def process_name() -> str:
    """``APIServer``, ``EngineCore``, ``VllmWorker-0``, …: the name vLLM gave this process."""
    name = multiprocessing.current_process().name
    if name != "MainProcess":
        return name
    return "APIServer" if _METRICS_MODULE in sys.modules else "main"


def _folder() -> Path:
    """The folder of this server's reports; the first process makes it and removes it at its end."""
    if not os.path.isdir(os.environ.get(FOLDER, "")):
        folder, owner = tempfile.mkdtemp(prefix="gemma4-spec-"), os.getpid()
        os.environ[FOLDER] = folder

        def remove() -> None:
            if os.getpid() == owner:  # a forked child inherits the exit handler
                shutil.rmtree(folder, ignore_errors=True)

        atexit.register(remove)
    return Path(os.environ[FOLDER])


def write() -> None:
    """Write this process's report. A disk that is full or a folder that is gone stops no server."""
    from vllm_gemma4_spec.patching.engine import PATCHER

    report = {
        "pid": os.getpid(),
        "process": process_name(),
        "version": __version__,
        "patches": {s.name: s.state for s in PATCHER.status()},
        "figures": _figures,
    }
    with contextlib.suppress(OSError):
        path = _folder() / f"{os.getpid()}.json"
        scratch = path.with_suffix(".part")
        scratch.write_text(json.dumps(report))
        scratch.replace(path)


def figure(name: str, value: float) -> None:
    """Show ``value`` of this process as ``gemma4_spec_<name>`` at ``/metrics``; it writes a file."""
    _figures[name] = value
    write()


def announce() -> None:
    """Report now and after every change of the patches; in an API server, show all reports at ``/metrics``."""
    import wrapt

    from vllm_gemma4_spec.patching.engine import PATCHER

    if write not in PATCHER.on_change:
        PATCHER.on_change.append(write)
        wrapt.register_post_import_hook(_register, _METRICS_MODULE)
    write()


def _register(_module: Any) -> None:
    from prometheus_client import REGISTRY

    if not _registered:
        _registered.append(Collector())
        REGISTRY.register(_registered[0])
        write()  # the process's name is known now


def living() -> Iterator[dict[str, Any]]:
    """Reports of this process and of its descendants that still run, in the order of their ids."""
    import psutil  # vLLM needs it too

    me = psutil.Process()
    for pid in sorted([me.pid, *(child.pid for child in me.children(recursive=True))]):
        with contextlib.suppress(OSError, ValueError):
            yield json.loads((_folder() / f"{pid}.json").read_text())


class Collector:
    """``gemma4_spec_patch_on{process, pid, patch}``: 1 where the patch is in force, else 0.

    A patch whose modules a process has not imported is *waiting*: it will be in force as soon as they are,
    so it counts as on.
    """

    def collect(self) -> Iterable[Any]:
        from prometheus_client.core import GaugeMetricFamily

        info = GaugeMetricFamily(
            "gemma4_spec_process",
            "A process of this server that runs vllm-gemma4-spec (always 1).",
            labels=["process", "pid", "version"],
        )
        on = GaugeMetricFamily(
            "gemma4_spec_patch_on", "1: the patch is in force in that process.", labels=["process", "pid", "patch"]
        )
        figures: dict[str, Any] = {}
        for report in living():
            pid = str(report["pid"])
            info.add_metric([report["process"], pid, report["version"]], 1)
            for name, state in report["patches"].items():
                on.add_metric([report["process"], pid, name], float(state in ("on", "waiting")))
            for name, value in report["figures"].items():
                gauge = GaugeMetricFamily(f"gemma4_spec_{name}", name.replace("_", " "), labels=["process", "pid"])
                figures.setdefault(name, gauge).add_metric([report["process"], pid], value)
        return [info, on, *figures.values()]
