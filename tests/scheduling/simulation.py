"""vLLM's real scheduler and KV cache manager, with random tokens in the model's place."""

from __future__ import annotations

import copy
import random
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

BLOCK = 4  # tokens, of the finest group
VOCABULARY = 50


@dataclass(frozen=True)
class Job:
    """A request: ``shared`` tokens of a prefix common to all, then its own; images as ``(offset, length)``."""

    shared: int
    own: int
    output: int
    images: tuple[tuple[int, int], ...] = ()

    @property
    def prompt(self) -> int:
        return self.shared + self.own


@dataclass(frozen=True)
class World:
    """What a scheduler is made with; ``groups`` are ``(window or 0, blocks of BLOCK tokens in one of its blocks)``."""

    groups: tuple[tuple[int, int], ...]
    num_blocks: int
    batched_tokens: int
    max_num_seqs: int
    k: int = 0
    asynchronous: bool = False
    prefix_caching: bool = False
    reserve: bool = True
    uncut_images: bool = False
    encoder_cache: int = 64
    acceptance: float = 0.5

    def specs(self) -> list[Any]:
        import torch
        from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

        common: dict[str, Any] = {"num_kv_heads": 1, "head_size": 32, "dtype": torch.float32}
        return [
            SlidingWindowSpec(block_size=BLOCK * blocks, sliding_window=window, **common)
            if window
            else FullAttentionSpec(block_size=BLOCK * blocks, **common)
            for window, blocks in self.groups
        ]

    def step(self) -> Any:
        from vllm_gemma4_spec.scheduling.capacity import Step

        return Step(self.batched_tokens, self.k, self.k if self.asynchronous else 0)

    def longest(self, limit: int = 1000) -> int:
        from vllm_gemma4_spec.scheduling.capacity import longest_request

        return longest_request(self.specs(), self.num_blocks, self.step(), limit)


@cache
def engine_config(model: Path) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model=str(model), dtype="float32", skip_tokenizer_init=True, max_model_len=1024, enforce_eager=True
    ).create_engine_config()


@dataclass
class Simulation:
    """Runs jobs to their end; raises where blocks are missing."""

    world: World
    model: Path
    seed: int = 0
    answers: dict[str, int] = field(default_factory=dict)
    steps: int = 0
    waited: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        from vllm.utils.hashing import get_hash_fn_by_name
        from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        world = self.world
        self.random = random.Random(self.seed)
        config = copy.copy(engine_config(self.model))
        for name in ("scheduler_config", "cache_config", "model_config"):
            setattr(config, name, copy.copy(getattr(config, name)))
        scheduler = config.scheduler_config
        scheduler.max_num_batched_tokens = scheduler.max_num_scheduled_tokens = world.batched_tokens
        scheduler.max_num_seqs = world.max_num_seqs
        scheduler.async_scheduling = world.asynchronous
        scheduler.scheduler_reserve_full_isl = world.reserve
        scheduler.enable_chunked_prefill = True
        config.cache_config.num_gpu_blocks = world.num_blocks
        config.cache_config.enable_prefix_caching = world.prefix_caching
        self.longest = config.model_config.max_model_len = world.longest()
        if world.k:
            config.speculative_config = SimpleNamespace(
                num_speculative_tokens=world.k,
                use_eagle=lambda: False,
                uses_draft_model=lambda: True,
                draft_model_config=None,
            )
        groups = [KVCacheGroupSpec([f"layer.{n}"], spec) for n, spec in enumerate(world.specs())]
        hash_fn = get_hash_fn_by_name("sha256")
        init_none_hash(hash_fn)
        self.hasher = get_request_block_hasher(BLOCK, hash_fn) if world.prefix_caching else None
        self.scheduler = (AsyncScheduler if world.asynchronous else Scheduler)(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(num_blocks=world.num_blocks, kv_cache_tensors=[], kv_cache_groups=groups),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK,
        )
        self.scheduler.encoder_cache_manager = EncoderCacheManager(world.encoder_cache)
        self.scheduler.max_num_encoder_input_tokens = world.encoder_cache

    def add(self, name: str, job: Job) -> None:
        from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        own = random.Random(f"{self.seed} {name}")
        tokens = [(7 * i) % VOCABULARY for i in range(job.shared)]
        tokens += [own.randrange(VOCABULARY) for _ in range(job.own)]
        params = SamplingParams(max_tokens=job.output, ignore_eos=True)
        params.update_from_generation_config({}, None)
        features = [
            MultiModalFeatureSpec(None, "image", f"{name} {offset}", PlaceholderRange(offset, length))
            for offset, length in job.images
        ]
        request = Request(name, tokens, params, None, mm_features=features, block_hasher=self.hasher)
        self.scheduler.add_request(request)

    def run(self, jobs: Sequence[Job], limit: int) -> bool:
        """Whether all jobs end within ``limit`` steps."""
        for number, job in enumerate(jobs):
            self.add(str(number), job)
        in_flight: deque[Any] = deque()
        while self.scheduler.has_requests() and self.steps < limit:
            in_flight.append(self.step())
            if len(in_flight) > self.world.asynchronous:
                self.finish(*in_flight.popleft())
        while in_flight:
            self.finish(*in_flight.popleft())
        return not self.scheduler.has_requests()

    def step(self) -> tuple[Any, Any]:
        """Schedule, check the blocks, and make the step's output."""
        from vllm.v1.outputs import ModelRunnerOutput

        self.steps += 1
        output = self.scheduler.schedule()
        self.waited.update(request.request_id for request in self.scheduler.waiting)
        ids = list(output.num_scheduled_tokens)
        sampled = []
        for name in ids:
            request = self.scheduler.requests[name]
            self._check(request, output.num_scheduled_tokens[name])
            drafts = len(output.scheduled_spec_decode_tokens.get(name, ()))
            kept = 0
            while kept < drafts and self.random.random() < self.world.acceptance:
                kept += 1
            tokens = [self.random.randrange(VOCABULARY) for _ in range(1 + kept)]
            sampled.append([] if request.is_prefill_chunk else tokens)
        return output, ModelRunnerOutput(ids, {name: n for n, name in enumerate(ids)}, sampled)

    def finish(self, output: Any, made: Any) -> None:
        from vllm.v1.outputs import DraftTokenIds

        for core in self.scheduler.update_from_output(output, made).values():
            for each in core.outputs:
                self.answers[each.request_id] = self.answers.get(each.request_id, 0) + len(each.new_token_ids)
        if self.world.k and not self.world.asynchronous:
            drafts = [[1] * self.world.k for _ in made.req_ids]
            self.scheduler.update_draft_token_ids(DraftTokenIds(list(made.req_ids), drafts))

    def _check(self, request: Any, scheduled: int) -> None:
        """What a step reads and writes lies in blocks of the request, and the pool's books are right."""
        manager = self.scheduler.kv_cache_manager
        step = self.world.step()
        start = request.num_computed_tokens - scheduled
        # Drafts of a step in flight may be rejected; what has been answered is computed but for its last token.
        real = max(start - step.margin, min(start, request.num_tokens - 1))
        stop = min(request.num_computed_tokens + step.lookahead, self.longest)
        for group in manager.coordinator.single_type_managers:
            window = getattr(group, "sliding_window", 0)
            first = max(0, real - window + 1) if window else 0
            blocks = group.req_to_blocks[request.request_id]
            needed = blocks[first // group.block_size : -(-stop // group.block_size)]
            assert len(needed) == -(-stop // group.block_size) - first // group.block_size
            assert not any(block.is_null for block in needed)
        groups = manager.coordinator.single_type_managers
        held = {b.block_id for g in groups for blocks in g.req_to_blocks.values() for b in blocks if not b.is_null}
        assert manager.block_pool.get_num_free_blocks() == self.world.num_blocks - 1 - len(held)
