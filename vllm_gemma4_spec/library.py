"""What a program of your own gets from :func:`status`, and is warned of by :func:`apply`."""

from __future__ import annotations

import ast
import importlib.metadata
import logging
import multiprocessing
import os
import sys
from pathlib import Path

from vllm_gemma4_spec import settings
from vllm_gemma4_spec._version import __version__
from vllm_gemma4_spec.patching.engine import PatchStatus
from vllm_gemma4_spec.registry import PATCHER

logger = logging.getLogger("vllm.plugins.gemma4_spec")
PLUGIN = "gemma4_spec"  # the entry point's name in pyproject.toml


class Status(list[PatchStatus]):
    """The patches of one process; as text, one line for the process and one for each patch.

    Attributes:
        pid: the process.
        process: its name, ``MainProcess`` where it is no child that multiprocessing started.
    """

    def __init__(self, patches: list[PatchStatus]) -> None:
        super().__init__(patches)
        self.pid = os.getpid()
        self.process = multiprocessing.current_process().name

    def __str__(self) -> str:
        states = [s.state for s in self]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        width = max((len(s.name) for s in self), default=0)
        lines = [f"vllm-gemma4-spec {__version__} in process {self.pid} ({self.process}): {counts}"]
        for s in self:
            switch = f"  ({s.switch}=0)" if s.state == "off" and settings.ALL.on() else ""
            lines.append(f"  {s.name:<{width}}  {s.state}{switch}")
        return "\n".join(lines)


def status() -> Status:
    return Status(PATCHER.status())


def warn_of_unpatched_processes() -> None:
    """Say why processes that vLLM starts from here will not have the patches, or will not start."""
    alone = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0"  # the engine is in this process
    if alone or not settings.ALL.on() or multiprocessing.parent_process() is not None:
        return
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in [name.strip() for name in allowed.split(",")]:
        logger.warning(
            "vllm-gemma4-spec: VLLM_PLUGINS=%s leaves %s out: this process is patched, the engine process and workers "
            "that vLLM spawns are not; add %s to VLLM_PLUGINS, or unset it",
            *(allowed or "''", PLUGIN, PLUGIN),
        )
    elif not any(p.name == PLUGIN for p in importlib.metadata.entry_points(group="vllm.general_plugins")):
        logger.warning(
            "vllm-gemma4-spec: not installed, only importable: this process is patched, the engine process and workers "
            "that vLLM spawns are not; install it with pip"
        )
    script = _script_without_guard()
    if script is not None:
        logger.warning(
            'vllm-gemma4-spec: %s has no `if __name__ == "__main__":`: where vLLM spawns its engine process, that '
            "process runs the whole file again and ends; put what starts the engine under it",
            script,
        )


def _script_without_guard() -> str | None:
    """The file that this program is, if it looks nowhere whether it is the main program."""
    main = sys.modules.get("__main__")
    file = getattr(main, "__file__", None)
    if file is None or getattr(main, "__spec__", None) is not None:
        return None  # a prompt, `-c`, or `-m`
    try:
        tree = ast.parse(Path(file).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None
    named = any(isinstance(node, ast.Name) and node.id == "__name__" for node in ast.walk(tree))
    return None if named else file
