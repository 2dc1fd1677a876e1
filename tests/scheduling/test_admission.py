"""What the gate counts, a pool that holds nothing, and the length that the engine cores tell the front end."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import vllm_gemma4_spec
from tests.scheduling.simulation import Job, Simulation, World, engine_config
from tests.support.configs import GEMMA4, LLAMA
from vllm_gemma4_spec.errors import Gemma4SpecError
from vllm_gemma4_spec.scheduling import admission

WORLD = World(groups=((0, 1), (8, 1)), num_blocks=50, batched_tokens=8, max_num_seqs=2)


def test_outside_the_gate_blocks_are_counted_as_in_stock(tiny: dict[str, Path]) -> None:
    vllm_gemma4_spec.apply()
    simulation = Simulation(WORLD, tiny["target"])
    assert simulation.run([Job(0, 100, 4)], limit=200)
    window = simulation.scheduler.kv_cache_manager.coordinator.single_type_managers[1]
    assert window.get_num_blocks_to_allocate("another", 100, [], 0, 100) == 25


def test_a_pool_that_holds_no_request_is_refused(tiny: dict[str, Path]) -> None:
    config = copy.copy(engine_config(tiny["target"]))
    config.model_config = copy.copy(config.model_config)
    groups = [SimpleNamespace(kv_cache_spec=spec) for spec in WORLD.specs()]
    made = SimpleNamespace(kv_cache_groups=groups, num_blocks=2)  # one of them is the null block
    with pytest.raises(Gemma4SpecError, match="a KV cache of 2 blocks holds no request; give it more memory"):
        admission.get_kv_cache_configs(lambda *_: [made])(config, [], [])


class Cores:
    """Engine cores in processes of their own, as far as a front end asks them here."""

    def __init__(self, *lengths: int) -> None:
        self.lengths, self.core_engines, self.asked = lengths, list(range(len(lengths))), 0

    def call_utility(self, name: str) -> int:
        return self._answer(name, 0)

    async def _call_utility_async(self, name: str, engine: int) -> int:
        return self._answer(name, engine)

    def _answer(self, name: str, engine: int) -> int:
        assert name == "gemma4_spec_max_model_len"
        self.asked += 1
        return self.lengths[engine]

    def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    async def get_supported_tasks_async(self) -> tuple[str, ...]:
        return ("generate",)


def front_end(cores: Any, model: Any = GEMMA4) -> Any:
    config = SimpleNamespace(hf_config=model.hf_config, max_model_len=100)
    return SimpleNamespace(engine_core=cores, vllm_config=SimpleNamespace(model_config=config, speculative_config=None))


def length(engine: Any) -> int:
    return int(engine.vllm_config.model_config.max_model_len)


def server(engine: Any) -> Any:
    from vllm.v1.engine.async_llm import AsyncLLM

    return asyncio.run(AsyncLLM.get_supported_tasks(engine))


def offline(engine: Any) -> Any:
    from vllm.v1.engine.llm_engine import LLMEngine

    return LLMEngine.get_supported_tasks(engine)


@pytest.mark.parametrize(
    ("start", "lengths", "learned"),
    [(server, (80, 64), 64), (offline, (64,), 64), (server, (200,), 100), (offline, (200,), 100)],
)
def test_the_front_end_refuses_by_the_shortest_core(
    start: Callable[[Any], Any], lengths: tuple[int, ...], learned: int
) -> None:
    vllm_gemma4_spec.apply()
    cores = Cores(*lengths)
    engine = front_end(cores)
    for _ in range(2):  # and asks each of them once
        assert start(engine) == ("generate",)
        assert length(engine) == learned
    assert cores.asked == len(lengths)


@pytest.mark.parametrize("start", [server, offline])
def test_another_models_cores_are_not_asked(start: Callable[[Any], Any]) -> None:
    vllm_gemma4_spec.apply()
    cores = Cores(64)
    engine = front_end(cores, LLAMA)
    assert start(engine) == ("generate",)
    assert (length(engine), cores.asked) == (100, 0)


def test_a_core_in_the_same_process_has_the_same_config() -> None:
    vllm_gemma4_spec.apply()
    engine = front_end(SimpleNamespace(get_supported_tasks=lambda: ("generate",)))
    assert offline(engine) == ("generate",)
    assert length(engine) == 100
