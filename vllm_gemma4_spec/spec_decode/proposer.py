"""Wrappers around ``SpecDecodeBaseProposer``: where several KV cache groups come in."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec, UniformTypeKVCacheSpecs

from vllm_gemma4_spec import scope, settings
from vllm_gemma4_spec.errors import Gemma4SpecError
from vllm_gemma4_spec.spec_decode.invariants import CheckedBuilder
from vllm_gemma4_spec.spec_decode.kv_cache_groups import DraftGroups

# Attributes that this package adds to a proposer of an engine in scope; one without them keeps vLLM's own path.
RUNNER = "_gemma4_spec_runner"
GROUPS = "_gemma4_spec_groups"


def keep_runner(original: Callable[..., None]) -> Callable[..., None]:
    """``__init__``: the proposer is handed the model runner and forgets it; the block tables are there.

    Patch: ``draft-groups``. Evidence:
    ``tests/patching/test_stock.py::test_draft_layers_in_several_groups_are_refused``. Related upstream change: none
    found; since 0.32.0 the V2 runner drafts over several groups, eagerly.
    """

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if scope.gemma4_speculation(kwargs.get("vllm_config", args[0] if args else None)):
            setattr(self, RUNNER, kwargs.get("runner", args[3] if len(args) > 3 else None))
            setattr(self, GROUPS, None)
        original(self, *args, **kwargs)

    return __init__


def initialize_attn_backend(original: Callable[..., None]) -> Callable[..., None]:
    """One call of the original per KV cache group and layer spec, for that group's draft layers alone.

    Patch: ``draft-groups``. Evidence:
    ``tests/patching/test_stock.py::test_draft_layers_in_several_groups_are_refused``. Related upstream change: none
    found; since 0.32.0 the V2 runner drafts over several groups, eagerly.
    """

    @functools.wraps(original)
    def wrapper(self: Any, kv_cache_config: KVCacheConfig, kernel_block_sizes: list[int] | None = None) -> None:
        if getattr(self, RUNNER, None) is None:
            original(self, kv_cache_config, kernel_block_sizes)
            return
        names = self._draft_attn_layer_names
        parts = _split_by_group_and_spec(names, kv_cache_config)
        primary = _primary_group(self, [gid for gid, _ in parts])
        if len(parts) <= 1 and all(gid == primary for gid, _ in parts):
            original(self, kv_cache_config, kernel_block_sizes)
            if settings.CHECK.on():
                _check_every_pass(self)
            return

        attn_groups = []
        try:
            for layers in parts.values():
                self._draft_attn_layer_names = layers
                original(self, kv_cache_config, kernel_block_sizes)
                attn_groups += self.draft_attn_groups
        finally:
            self._draft_attn_layer_names = names
        backends = {g.backend.get_name() for g in attn_groups}
        if "TREE_ATTN" in backends:
            raise Gemma4SpecError(
                "tree attention drafts for one KV cache group only, and this drafter spans "
                f"{len(parts)}; leave out speculative_token_tree or choose another attention backend"
            )
        block_sizes = [
            kernel_block_sizes[gid]
            if kernel_block_sizes is not None and gid < len(kernel_block_sizes)
            else group.kv_cache_spec.block_size
            for gid, group in enumerate(kv_cache_config.kv_cache_groups)
        ]
        groups = DraftGroups(self, getattr(self, RUNNER), attn_groups, block_sizes)
        setattr(self, GROUPS, groups)
        self.draft_attn_groups = groups.attn_groups
        # The block table in `common_attn_metadata` is the primary group's: its block size must match it.
        self.kv_cache_gid, self.block_size = primary, block_sizes[primary]

    return wrapper


def _check_every_pass(proposer: Any) -> None:
    """Check the passes of a drafter in one KV cache group; ``DraftGroups`` checks those of any other itself."""
    proposer.draft_attn_groups = [
        group
        # Tree attention asks for its builder's class, and several of its drafts stand at one position.
        if group.backend.get_name() == "TREE_ATTN"
        else replace(
            group, metadata_builders=[CheckedBuilder(proposer, getattr(proposer, RUNNER), group.get_metadata_builder())]
        )
        for group in proposer.draft_attn_groups
    ]


def _split_by_group_and_spec(names: set[str], config: KVCacheConfig) -> dict[tuple[int, KVCacheSpec], set[str]]:
    """Draft layers by KV cache group id and their own spec, in group order."""
    parts: dict[tuple[int, KVCacheSpec], set[str]] = defaultdict(set)
    for gid, group in enumerate(config.kv_cache_groups):
        for name in group.layer_names:
            if name in names:
                spec = group.kv_cache_spec
                if isinstance(spec, UniformTypeKVCacheSpecs):
                    spec = spec.kv_cache_specs[name]
                parts[gid, spec].add(name)
    return dict(parts)


def _primary_group(proposer: Any, gids: list[int]) -> int:
    """The group whose metadata the model runner passes to ``propose``.

    ``GPUModelRunner._build_attention_metadata`` gives an ``EagleProposer`` the group ``kv_cache_gid``
    and every other proposer the first group, which is the target's.
    """
    from vllm.v1.spec_decode.eagle import EagleProposer

    return min(gids, default=0) if isinstance(proposer, EagleProposer) else 0


def get_slot_mapping(original: Callable[..., dict[str, torch.Tensor]]) -> Callable[..., dict[str, torch.Tensor]]:
    """``_get_slot_mapping``: each draft layer's own group's slots instead of the primary group's for all.

    Patch: ``draft-groups``. Evidence:
    ``tests/patching/test_stock.py::test_draft_layers_in_several_groups_are_refused``. Related upstream change: none
    found; since 0.32.0 the V2 runner drafts over several groups, eagerly.
    """

    @functools.wraps(original)
    def wrapper(self: Any, num_tokens: int, slot_mapping: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        # The original also refreshes the proposer's primary buffer, which the next draft step reads.
        primary = original(self, num_tokens, slot_mapping)
        groups: DraftGroups | None = getattr(self, GROUPS, None)
        return primary if groups is None else groups.slot_mapping(num_tokens)

    return wrapper
