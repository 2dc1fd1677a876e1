"""What vLLM's plugin loader runs: apply, declare the settings, say so in one line."""

from __future__ import annotations

import logging
import os

from vllm_gemma4_spec import settings
from vllm_gemma4_spec._version import __version__
from vllm_gemma4_spec.errors import Gemma4SpecError, stop
from vllm_gemma4_spec.metrics import reports
from vllm_gemma4_spec.registry import PATCHER

# vLLM configures the logger "vllm" only: a logger outside that namespace prints no INFO line.
logger = logging.getLogger("vllm.plugins.gemma4_spec")
_said: set[int] = set()  # process ids that have logged; a forked worker says it again


def declare_settings() -> None:
    """Make our variables known to vLLM: not reported as unknown, part of the compile cache key."""
    import vllm.envs

    names = [p.name for p in PATCHER.known]
    for name, read in settings.declared(names).items():
        vllm.envs.environment_variables.setdefault(name, read)
    # Not a variable a user sets: a graph compiled under other patches must not be reused.
    vllm.envs.environment_variables.setdefault(f"{settings.PREFIX}_STATE", _state)


def _state() -> str:
    on = [s.name for s in PATCHER.status() if s.state in ("on", "waiting")]
    return f"{__version__} " + " ".join(on)


def summary() -> str:
    """``vllm-gemma4-spec 0.1.0: 3 patches on: a, b, c``; what is switched off is named too."""
    states = PATCHER.status()
    on = [s.name for s in states if s.state in ("on", "waiting")]
    off = [s.name for s in states if s.state not in ("on", "waiting")]
    text = f"vllm-gemma4-spec {__version__}: " + (f"{len(on)} patches on: {', '.join(on)}" if on else "no patch on")
    return text + (f"; off: {', '.join(off)}" if off else "")


def load() -> None:
    try:
        PATCHER.apply()
    except Gemma4SpecError as error:
        stop(error)
    declare_settings()
    reports.announce(PATCHER.status, PATCHER.on_change)
    if os.getpid() not in _said:
        _said.add(os.getpid())
        logger.info("%s [process %d]", summary(), os.getpid())
        missing = PATCHER.missing_correctness()
        if missing and settings.ALL.on():
            logger.warning("vllm-gemma4-spec: answers may be wrong, switched off: %s", ", ".join(missing))
