"""A second start finds the drafter's compiled code and keeps its compiler settings.

vLLM makes the drafter's backend before its weights on a first start and after them on a second one. Without the patch
the second start compiles layers that share a shape again, as the target's, and every draft pass is slower.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import vllm_gemma4_spec
from tests.gpu import device
from tests.support import engine, tiny_models
from vllm_gemma4_spec import scope

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda")]  # on a CPU: tests/performance/second_start.py


def start(target: Path, drafter: Path) -> dict[str, Any]:
    """In a process of its own: start, answer, and count what was compiled."""
    import torch
    from vllm.compilation.backends import VllmBackend
    from vllm.compilation.counter import compilation_counter

    vllm_gemma4_spec.apply()
    made, original = [], VllmBackend.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        made.append((self.prefix, bool(self.inductor_config.get("triton.enable_pdl", False))))

    VllmBackend.__init__ = init
    prompts = engine.random_prompts(device.LENGTHS[:4])
    with engine.engine(target, drafter, device.K, **device.options(mode=3)) as llm:
        found = device.ask(llm, prompts, 32)
    return {
        "saved": compilation_counter.num_compiled_artifacts_saved,
        "loaded": compilation_counter.num_compiled_artifacts_loaded,
        "backends": made,
        "capability": torch.cuda.get_device_capability(),
        "tokens": found.tokens,
        "accepted": found.accepted,
    }


def test_nothing_is_compiled_again(tmp_path: Path, measured: Any) -> None:
    # Two layers of each shape, so that a second start has something to look up by shape and settings.
    target = tiny_models.save(tiny_models.target_config(**device.HEADS), tmp_path / "target")
    drafter = tiny_models.save(tiny_models.drafter_config(**device.HEADS), tmp_path / "drafter", seed=1)
    first, second = device.two_starts("tests.gpu.test_second_start", target, drafter, tmp_path, 400)
    measured(**{name: {k: run[k] for k in ("saved", "loaded", "backends")} for name, run in
                (("first", first), ("second", second))})  # fmt: skip
    assert first["saved"] > 0
    assert second["saved"] == 0
    assert second["tokens"] == first["tokens"]
    pdl = tuple(first["capability"]) >= (9, 0)
    for run in (first, second):  # from Hopper on both have it
        assert {prefix in scope.HALVES for prefix, _ in run["backends"]} == {True, False}, run["backends"]
        assert all(enabled == pdl for _, enabled in run["backends"])


if __name__ == "__main__":
    Path(sys.argv[3]).write_text(json.dumps(start(Path(sys.argv[1]), Path(sys.argv[2]))))
