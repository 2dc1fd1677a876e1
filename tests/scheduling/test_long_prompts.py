"""Prompts longer than sliding-window groups hold at once, in the real engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.engine import engine, generate, random_prompts
from tests.support.stock import without
from vllm_gemma4_spec.scheduling import admission
from vllm_gemma4_spec.scheduling.patches import LONG_PROMPTS

PROMPT = random_prompts([900])[0]
OPTIONS: dict[str, Any] = {"max_num_batched_tokens": 256, "max_num_seqs": 4, "num_gpu_blocks_override": None}


@contextmanager
def just_enough(monkeypatch: pytest.MonkeyPatch, blocks: int | None = None) -> Iterator[list[Any]]:
    """The KV cache gets the least memory that start-up accepts (or ``blocks``); yields the configs made."""
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.engine import core

    original, made = core.get_kv_cache_configs, []

    def get_kv_cache_configs(config: Any, specs: Any, memory: list[int]) -> Any:
        groups = kv_cache_utils.get_kv_cache_groups(config, specs[0])
        least = kv_cache_utils._max_memory_usage_bytes_from_groups(config, groups)
        config.cache_config.num_gpu_blocks_override = blocks
        made.extend(original(config, specs, [least for _ in memory]))
        return made

    with monkeypatch.context() as patch:
        patch.setattr(core, "get_kv_cache_configs", get_kv_cache_configs)
        yield made


def steps_until_done(llm: Any, prompts: list[list[int]], max_tokens: int, limit: int = 400) -> int | None:
    """Engine steps until all are answered, or None if they are not after ``limit``."""
    from vllm import SamplingParams

    for number, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        llm.llm_engine.add_request(f"r{number}", {"prompt_token_ids": prompt}, params)
    for step in range(limit):
        llm.llm_engine.step()
        if not llm.llm_engine.has_unfinished_requests():
            return step
    llm.llm_engine.abort_request([f"r{n}" for n in range(len(prompts))])
    return None


@pytest.mark.parametrize("drafter", [False, True])
def test_what_start_up_accepts_is_answered(
    tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch, drafter: bool
) -> None:
    """A prompt of 900 tokens of the 1,024 allowed, alone and beside others, gets the answer of a large pool."""
    folder = tiny["drafter"] if drafter else None
    others = random_prompts([700, 30, 400], seed=2)
    with engine(tiny["target"], **OPTIONS | {"num_gpu_blocks_override": 2048}) as llm:
        wanted = generate(llm, [PROMPT, *others], 20)
    with just_enough(monkeypatch), engine(tiny["target"], folder, **OPTIONS) as llm:
        assert llm.model_config.max_model_len >= 1000
        assert steps_until_done(llm, [PROMPT], 100) is not None
        assert generate(llm, [PROMPT, *others], 20) == wanted


def test_stock_never_runs_it(tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with without(LONG_PROMPTS), just_enough(monkeypatch), engine(tiny["target"], **OPTIONS) as llm:
        assert steps_until_done(llm, [PROMPT], 4, limit=100) is None


def test_a_pool_too_small_lowers_the_maximum_length(tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(admission.logger, "warning", lambda text, *values: said.append(text % values))
    with just_enough(monkeypatch, blocks=60) as made, engine(tiny["target"], tiny["drafter"], **OPTIONS) as llm:
        longest = llm.model_config.max_model_len
        core = llm.llm_engine.engine_core.engine_core
        runner = core.model_executor.driver_worker.worker.model_runner
        assert 0 < longest < 1024
        assert made[0].num_blocks == 60
        assert core.scheduler.max_model_len == runner.max_model_len == runner.drafter.max_model_len == longest
        assert core.gemma4_spec_max_model_len() == runner.effective_drafter_max_model_len == longest
        (line,) = said
        assert line.startswith(
            f"The KV cache has 60 blocks and holds requests of up to {longest} tokens: max_model_len"
        )
        with pytest.raises(ValueError, match=rf"maximum context length is {longest} tokens"):
            generate(llm, random_prompts([1000]), 4)
        # The longest there can be ends at its length, not before and not never.
        prompt = random_prompts([longest - 40])[0]
        assert [len(a) for a in generate(llm, [prompt], 500)] == [40]
