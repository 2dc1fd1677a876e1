"""Drafters of other models, whose layers share one KV cache group, keep vLLM's own path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support import tiny_models
from tests.support.engine import acceptance, engine, generate, random_prompts
from tests.support.stock import without
from vllm_gemma4_spec.spec_decode.patches import OWN_BLOCKS


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).float().save_pretrained(folder)
    return folder


def drafter_of(llm: Any) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.drafter


def test_a_single_group_drafter_is_left_alone(llama: Path) -> None:
    from vllm_gemma4_spec.spec_decode.kv_cache_groups import GroupBuilder

    prompts = random_prompts((3, 40, 100))
    with engine(llama) as llm:
        want = generate(llm, prompts, 12)
    with engine(llama, llama, 3) as llm:
        before = acceptance(llm)
        assert generate(llm, prompts, 12) == want
        counts = acceptance(llm) - before
        assert counts.accepted == counts.proposed > 0
        drafter = drafter_of(llm)
        assert not [name for name in vars(drafter) if "gemma4_spec" in name]
        assert not any(isinstance(g.get_metadata_builder(), GroupBuilder) for g in drafter.draft_attn_groups)


@pytest.fixture(scope="module")
def one_group(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 4 of full layers alone; as its own drafter it has one KV cache group."""
    config = tiny_models.target_config(num_hidden_layers=2)
    config.layer_types = ["full_attention"] * 2
    return tiny_models.save(config, tmp_path_factory.mktemp("full") / "model")


def test_a_single_group_drafter_is_checked_too(one_group: Path) -> None:
    from vllm_gemma4_spec.spec_decode.invariants import CheckedBuilder, InvariantError

    prompts = random_prompts((16, 32, 48))  # each ends with its block
    with engine(one_group, one_group, 3) as llm:
        assert all(isinstance(g.get_metadata_builder(), CheckedBuilder) for g in drafter_of(llm).draft_attn_groups)
        generate(llm, prompts, 4)
    with (
        without(OWN_BLOCKS),
        engine(one_group, one_group, 3) as llm,
        pytest.raises(InvariantError, match=r"position \d+ of KV cache group 0 .*does not own"),
    ):
        generate(llm, prompts, 4)


def test_groups_of_a_gemma_drafter(tiny: dict[str, Path]) -> None:
    """Metadata is built once per distinct spec; every draft layer is served by exactly one group."""
    with engine(tiny["target"], tiny["drafter"], 3) as llm:
        drafter = drafter_of(llm)
        names = [name for group in drafter.draft_attn_groups for name in group.layer_names]
        assert sorted(names) == sorted(drafter._draft_attn_layer_names)
        gids = {g.kv_cache_group_id for g in drafter.draft_attn_groups}
        specs = {g.kv_cache_spec for g in drafter.draft_attn_groups}
        assert len(gids) > len(specs) == 2  # sliding and full
        builds: list[Any] = []
        for builder in {
            id(g.get_metadata_builder().builder): g.get_metadata_builder().builder for g in drafter.draft_attn_groups
        }.values():
            original = builder.build_for_drafting

            def counted(*args: Any, original: Any = original, **kwargs: Any) -> Any:
                builds.append(kwargs["draft_index"])
                return original(*args, **kwargs)

            builder.build_for_drafting = counted
        generate(llm, random_prompts((20,)), 2)
    # A prefill and at most two decode steps, three passes each, two builds a pass; of a first one two more, for the
    # last tokens alone.
    assert builds
    assert builds.count(0) // 2 == builds.count(1) == builds.count(2)
    assert builds.count(0) % 4 == 0
    assert builds.count(1) <= 2 * 3
