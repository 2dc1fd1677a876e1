"""pytest plugin for vLLM's own tests: the plugin as its switches say, in the test process, too.

Processes that the tests start load it as vLLM's plugin; the test process itself may never ask for plugins.
"""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path

import pytest

import vllm_gemma4_spec


def pytest_configure(config: pytest.Config) -> None:
    vllm_gemma4_spec.apply()


def pytest_collection_finish(session: pytest.Session) -> None:
    # vLLM's conftest unfreezes and collects all garbage after every test: half a second for the imported modules.
    gc.collect()
    gc.freeze()
    gc.unfreeze = lambda: None


# Module of vLLM's tests -> patch -> how many of its targets were replaced when the module's last test had run.
_in_force: dict[str, dict[str, list[int]]] = {}


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if nextitem is None or nextitem.path != item.path:
        name = str(item.path.relative_to(item.config.rootpath))
        _in_force[name] = {s.name: [len(s.replaced), len(s.targets)] for s in vllm_gemma4_spec.status()}


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    states = {s.name: s.state for s in vllm_gemma4_spec.status()}
    Path(os.environ["UPSTREAM_STATES"]).write_text(json.dumps({"states": states, "in_force": _in_force}))
